package swarm

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// stranger is an ordinary BitTorrent client (the same library, as it comes), which knows the infohash and the whole info
// dictionary of a blob, and dials as it is told.
func stranger(t *testing.T, dial func(context.Context, string) (net.Conn, error)) *torrent.Client {
	t.Helper()
	c := torrent.NewDefaultClientConfig()
	c.DefaultStorage = noStorage{}
	c.NoDHT, c.DisableTrackers, c.DisableUTP, c.NoDefaultPortForwarding, c.DisableIPv6 = true, true, true, true, true
	c.DisableWebtorrent = true
	c.ListenHost = func(string) string { return "127.0.0.1" }
	c.ListenPort = 0
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 0)
	c.DialForPeerConns = dial == nil
	c.Slogger = noLog()
	cl, err := torrent.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	if dial != nil {
		cl.AddDialer(dialFunc(dial))
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

type dialFunc func(context.Context, string) (net.Conn, error)

func (dialFunc) DialerNetwork() string { return "tcp" }
func (f dialFunc) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return f(ctx, addr)
}

// addBlob gives a stranger the blob and wishes for all of it.
func addBlob(t *testing.T, cl *torrent.Client, m *memory) *torrent.Torrent {
	t.Helper()
	info := infoBytes(m.blob.digest, int64(len(m.blob.data)), pieceSize)
	owner := newTorrent(&Swarm{ctx: t.Context()}, metainfo.HashBytes(info), m.blob.digest, int64(len(m.blob.data)), pieceSize, m)
	to, _ := cl.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash: owner.infohash, InfoBytes: info, Storage: pieceStorage{owner}, DisableInitialPieceCheck: true,
	})
	if to.Info() == nil {
		t.Fatal("the stranger does not take the info dictionary")
	}
	to.DownloadAll()
	return to
}

// Who is outside the cluster gets no byte, whatever it knows and however it comes.
func TestStrangersGetNothing(t *testing.T) {
	t.Parallel()
	b := newBlob(1<<20, 30)
	foreign, err := trust.NewSecret().Identity()
	if err != nil {
		t.Fatal(err)
	}
	over := func(c *tls.Config) func(context.Context, string) (net.Conn, error) {
		return func(ctx context.Context, addr string) (net.Conn, error) {
			return (&tls.Dialer{Config: c}).DialContext(ctx, "tcp", addr)
		}
	}
	trusting := foreign.Client(trust.ProtoSwarm) // shows its own certificate, takes any
	trusting.InsecureSkipVerify, trusting.VerifyConnection = true, nil
	for _, c := range []struct {
		name string
		dial func(context.Context, string) (net.Conn, error)
	}{
		{"plain BitTorrent over TCP", nil},
		{"TLS without a certificate", over(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{trust.ProtoSwarm}})},
		{"a member of another cluster", over(foreign.Client(trust.ProtoSwarm))},
		{"a member of another cluster that checks nothing", over(trusting)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			seeder := newNode(t)
			ts := seeder.add(t, newMemory(b).fillAll())
			m := newMemory(b)
			cl := stranger(t, c.dial)
			to := addBlob(t, cl, m)
			// It tries again and again, for a second.
			never(t, "a stranger is connected or gets something", time.Second, func() bool {
				to.AddPeers([]torrent.PeerInfo{{Addr: net.TCPAddrFromAddrPort(seeder.addr), Trusted: true}})
				st := to.Stats()
				return len(m.marked) > 0 || st.BytesReadData.Int64() != 0 || st.BytesRead.Int64() != 0 ||
					ts.Stats().Peers != 0 || ts.Stats().Uploaded != 0
			})
			// And the other way round: we do not speak to it, told its address or not.
			for _, a := range cl.ListenAddrs() {
				ap := netip.MustParseAddrPort(a.String())
				leecher := newNode(t)
				ml := newMemory(b)
				tl := leecher.add(t, ml)
				tl.AddPeers([]netip.AddrPort{ap})
				wantAll(tl)
				never(t, "a stranger is taken for a peer", 500*time.Millisecond, func() bool {
					return tl.Stats().Peers != 0 || len(ml.marked) > 0
				})
			}
		})
	}
}

// The stranger of the tests above does get the blob when it holds the secret: it is only the secret that keeps it out.
func TestMemberWithAnotherClientGetsTheBlob(t *testing.T) {
	b := newBlob(1<<20, 31)
	seeder := newNode(t)
	seeder.add(t, newMemory(b).fillAll())
	id, err := secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	self, err := peerIDOf(id.ID())
	if err != nil {
		t.Fatal(err)
	}
	for _, honest := range []bool{true, false} {
		m := newMemory(b)
		cl := stranger(t, func(ctx context.Context, addr string) (net.Conn, error) {
			c, err := (&tls.Dialer{Config: id.Client(trust.ProtoSwarm)}).DialContext(ctx, "tcp", addr)
			if err != nil {
				return nil, err
			}
			if honest {
				c = &renamed{Conn: c, id: self}
			}
			return c, nil
		})
		to := addBlob(t, cl, m)
		to.AddPeers([]torrent.PeerInfo{{Addr: net.TCPAddrFromAddrPort(seeder.addr), Trusted: true}})
		if honest {
			wait(t, "complete", m.complete)
			m.check(t)
		} else { // its peer ID is not that of its certificate
			never(t, "an impostor gets something", 500*time.Millisecond, func() bool { return len(m.marked) > 0 })
		}
		cl.Close()
	}
}

// renamed puts the right peer ID into the handshake that the library writes piece by piece.
type renamed struct {
	net.Conn
	id   torrent.PeerID
	sent int
}

func (r *renamed) Write(p []byte) (int, error) {
	q := append([]byte(nil), p...)
	for i := range q {
		if at := r.sent + i - handshakePeer; at >= 0 && at < len(r.id) {
			q[i] = r.id[at]
		}
	}
	n, err := r.Conn.Write(q)
	r.sent += n
	return n, err
}

// A member that has proved itself and then says nothing, or nonsense, is let go.
func TestMemberThatSpeaksNonsense(t *testing.T) {
	n := newNode(t)
	id, err := secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	for _, say := range []string{"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: something that is longer than a handshake\r\n\r\n",
		pp.Protocol + "12345678" + "unknown infohash...." + "-XX0000-an impostor.."} {
		c, err := tls.Dial("tcp", n.addr.String(), id.Client(trust.ProtoSwarm))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, say)
		got, _ := io.ReadAll(c)
		if len(got) > handshakeSize {
			t.Errorf("answered %q", got)
		}
		c.Close()
	}
	wait(t, "the connections are forgotten", func() bool { return len(n.openConns()) == 0 })
}
