package trust

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"io"
	"net"
	"regexp"
	"testing"
	"time"
)

const (
	goldenGossipKey = "16836116153cad78d16e4aca436839d0c8e78bb041535c9ded245279e035f966"
	goldenAuthority = "d5d22a76bfd0f45a503bca895219ef976ff3237256def0cade8d23e182d65f1c"
)

func TestAuthorityIsTheSameOnEveryNode(t *testing.T) {
	der := func() []byte {
		ca, err := authority(ed25519.NewKeyFromSeed(fixed().derive(labelCA, ed25519.SeedSize)))
		if err != nil {
			t.Fatal(err)
		}
		return ca.Raw
	}
	a, b := der(), der()
	if string(a) != string(b) {
		t.Fatal("two derivations differ")
	}
	sum := sha256.Sum256(a)
	if got := hex.EncodeToString(sum[:]); got != goldenAuthority {
		t.Errorf("authority %s, want %s: nodes of other versions would derive another one", got, goldenAuthority)
	}
}

func identity(t testing.TB, s Secret) *Identity {
	t.Helper()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestIdentity(t *testing.T) {
	a, b := identity(t, fixed()), identity(t, fixed())
	if a.ID() == b.ID() {
		t.Error("two identities share a node ID")
	}
	if !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(a.ID()) {
		t.Errorf("node ID %q", a.ID())
	}
}

// shake runs one handshake over a pipe; the errors of both sides.
func shake(client, server *tls.Config) (cs, ss tls.ConnectionState, cerr, serr error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	p, q := net.Pipe()
	c, s := tls.Client(p, client), tls.Server(q, server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if serr = s.HandshakeContext(ctx); serr == nil {
			_, serr = s.Write([]byte("x"))
		}
		if serr != nil {
			q.Close()
		}
	}()
	if cerr = c.HandshakeContext(ctx); cerr == nil {
		// In TLS 1.3 the server's verdict on the client arrives with the first read.
		_, cerr = io.ReadFull(c, make([]byte, 1))
	}
	if cerr != nil {
		p.Close()
	}
	<-done
	return c.ConnectionState(), s.ConnectionState(), cerr, serr
}

func TestHandshake(t *testing.T) {
	ours, theirs := fixed(), NewSecret()
	a, b, x := identity(t, ours), identity(t, ours), identity(t, theirs)
	t.Run("members", func(t *testing.T) {
		cs, ss, cerr, serr := shake(a.Client(ProtoSwarm), b.Server(ProtoHTTP, ProtoSwarm))
		if cerr != nil || serr != nil {
			t.Fatal(cerr, serr)
		}
		if id, err := PeerID(cs); err != nil || id != b.ID() {
			t.Errorf("client sees %q (%v), want %q", id, err, b.ID())
		}
		if id, err := PeerID(ss); err != nil || id != a.ID() {
			t.Errorf("server sees %q (%v), want %q", id, err, a.ID())
		}
		if ss.Version != tls.VersionTLS13 || ss.NegotiatedProtocol != ProtoSwarm || ss.DidResume {
			t.Errorf("state %+v", ss)
		}
	})
	without := a.Client(ProtoSwarm)
	without.Certificates = nil
	naive := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{ProtoSwarm}}
	thief := x.Client(ProtoSwarm) // trusts us, shows its own
	thief.RootCAs = a.roots
	old := a.Client(ProtoSwarm)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	mute := a.Client(ProtoSwarm)
	mute.NextProtos = nil
	for _, c := range []struct {
		name           string
		client, server *tls.Config
		foreign        bool
	}{
		{"client of another secret", x.Client(ProtoSwarm), a.Server(ProtoSwarm), true},
		{"client of another secret that trusts us", thief, a.Server(ProtoSwarm), true},
		{"server of another secret", a.Client(ProtoSwarm), x.Server(ProtoSwarm), true},
		{"client without a certificate", without, a.Server(ProtoSwarm), true},
		{"client that checks nothing", naive, a.Server(ProtoSwarm), true},
		{"another protocol", a.Client("other/1"), a.Server(ProtoSwarm), false},
		{"no protocol", mute, a.Server(ProtoSwarm), false},
		{"TLS 1.2", old, a.Server(ProtoSwarm), false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, cerr, serr := shake(c.client, c.server)
			if cerr == nil {
				t.Error("the client got a byte")
			}
			if serr == nil && !c.foreign {
				t.Error("the server agreed")
			}
			if c.foreign && !Foreign(cerr) && !Foreign(serr) {
				t.Errorf("neither side knows why: %v, %v", cerr, serr)
			}
		})
	}
}
