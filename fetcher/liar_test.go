package fetcher

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/gossip"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// rogue holds the secret, is a member like any other, and says what its test likes.
type rogue struct {
	id     *trust.Identity
	ln     *trust.Listener
	gossip *gossip.Gossip
	client *http.Client
	// answer serves what other members ask; nil: 404.
	answer atomic.Pointer[http.HandlerFunc]
	asked  atomic.Int64
}

// newRogue starts a rogue. Connections for BitTorrent are taken and never answered.
func newRogue(t *testing.T, s *trust.Secret, peers ...string) *rogue {
	t.Helper()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	r := &rogue{id: id, ln: ln, client: &http.Client{
		Transport: &http.Transport{TLSClientConfig: id.Client(trust.ProtoHTTP1)}, Timeout: 20 * time.Second,
	}}
	r.gossip, err = gossip.Start(t.Context(), gossip.Options{
		Identity: id, Key: s.GossipKey(), Streams: ln.Gossip(), Packets: ln.Packets(), Peers: peers, Self: gossip.Node{Origin: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.asked.Add(1)
		if h := r.answer.Load(); h != nil {
			(*h)(w, q)
			return
		}
		http.NotFound(w, q)
	})}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(ln.HTTP()) }()
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		_ = r.gossip.Close()
		_ = srv.Close()
		_ = ln.Close()
		<-served
	})
	return r
}

func (r *rogue) addr() string { return r.ln.Addr().String() }

// post sends a message to a node as this member, and returns the status.
func (r *rogue) post(t *testing.T, to *testNode, path string, msg any, answer any) int {
	t.Helper()
	body, ok := msg.([]byte)
	if !ok {
		body = jsonOf(t, msg)
	}
	resp, err := r.client.Post("https://"+to.Addr().String()+path, "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if answer != nil && resp.StatusCode == http.StatusOK {
		if err := json.Unmarshal(b, answer); err != nil {
			t.Fatal(err)
		}
	}
	return resp.StatusCode
}

// acquainted waits until each of the nodes has so many members.
func acquainted(t *testing.T, members int, nodes ...*testNode) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d members", members), func() bool {
		for _, n := range nodes {
			if len(n.Members()) != members {
				return false
			}
		}
		return true
	})
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	for !ok() {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// known waits until these nodes agree on which of them keeps a blob's list first, and
// that one knows how many hold all of the blob. Members that are none of them, at most
// one, may come before it in rank.
func known(t *testing.T, dg digest.Digest, holders int, nodes ...*testNode) {
	t.Helper()
	byID := map[string]*testNode{}
	for _, n := range nodes {
		byID[n.NodeID()] = n
	}
	eventually(t, "the keeper knows who holds the blob", func() bool {
		var keeper *testNode
		for _, n := range nodes {
			ks := n.cluster.Keepers(dg)
			i := slices.IndexFunc(ks, func(m cluster.Member) bool { return byID[m.ID] != nil })
			if i < 0 || keeper != nil && byID[ks[i].ID] != keeper {
				return false
			}
			keeper = byID[ks[i].ID]
		}
		k, _ := keeper.cluster.Kept(dg)
		return k.Complete >= holders
	})
}

// right checks that a fetch ends well and how long it took.
func right(t *testing.T, b *Blob, data []byte, limit time.Duration) time.Duration {
	t.Helper()
	begun := time.Now()
	if err := b.Wait(within(t, limit)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, b), data) {
		t.Fatal("other bytes")
	}
	return time.Since(begun)
}

// banned says for what a node does not ask a peer for a blob any more; "" while
// it does.
func banned(b *Blob, n *testNode) BanReason {
	b.d.mu.Lock()
	defer b.d.mu.Unlock()
	if !b.d.banned[n.NodeID()] {
		return ""
	}
	return b.d.bannedFor[n.NodeID()]
}

// neverWrong watches what a node would give to others, from now to the end of the
// test: each piece that it has must be right.
func neverWrong(t *testing.T, b *Blob, data []byte) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		seen := map[int]bool{}
		p := make([]byte, b.d.st.PieceSize())
		for {
			changed := b.d.st.Changed()
			for i := range b.d.pieces {
				if seen[i] || !b.d.st.Has(i) {
					continue
				}
				off, n := b.d.st.PieceRange(i)
				if _, err := b.d.st.ReadAt(p[:n], off); err != nil {
					continue
				}
				seen[i] = true
				if !bytes.Equal(p[:n], data[off:off+n]) && b.d.st.Has(i) {
					t.Errorf("piece %d is given to others although it is wrong", i)
				}
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() { cancel(); <-done }
}

// leaf makes a certificate that looks like a member's, signed by an authority that
// looks like the cluster's.
func leaf(t *testing.T, name string) tls.Certificate {
	t.Helper()
	certify := func(c, by *x509.Certificate, pub ed25519.PublicKey, key ed25519.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, c, by, pub, key)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	caPub, caKey, _ := ed25519.GenerateKey(rand.Reader)
	pub, key, _ := ed25519.GenerateKey(rand.Reader)
	from, to := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2120, 1, 1, 0, 0, 0, 0, time.UTC)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "docker quay cluster"}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	ca, err := x509.ParseCertificate(certify(ca, ca, caPub, caKey))
	if err != nil {
		t.Fatal(err)
	}
	der := certify(&x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: from, NotAfter: to,
		KeyUsage: x509.KeyUsageDigitalSignature, DNSNames: []string{"node.docker-quay.internal"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, ca, pub, caKey)
	return tls.Certificate{Certificate: [][]byte{der, ca.Raw}, PrivateKey: key}
}

// forgeries are certificates of who does not hold the secret.
func forgeries(t *testing.T, of *testNode) map[string][]tls.Certificate {
	t.Helper()
	other, err := trust.NewSecret().Identity()
	if err != nil {
		t.Fatal(err)
	}
	// What a member shows of itself in each handshake, without its key.
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	shown := tls.Certificate{Certificate: of.id.Client(trust.ProtoHTTP1).Certificates[0].Certificate, PrivateKey: key}
	return map[string][]tls.Certificate{
		"none":                                nil,
		"another secret's":                    other.Client(trust.ProtoHTTP1).Certificates,
		"of an authority with the same name":  {leaf(t, of.NodeID())},
		"a member's own, without its key":     {shown},
		"a member's chain with another's key": {{Certificate: append([][]byte{leaf(t, of.NodeID()).Certificate[0]}, shown.Certificate...), PrivateKey: key}},
	}
}

// TestForgedLeavesGetNothing: whoever cannot prove the secret learns nothing by any
// protocol of the node's port, whatever its certificate looks like.
func TestForgedLeavesGetNothing(t *testing.T) {
	r := newRegistry(t)
	desc := r.add(random(1 << 20))
	n := newNode(t, t.TempDir(), secret())
	right(t, n.blob(t, desc, r.origin(t)), random(1<<20), 20*time.Second)
	hold := jsonOf(t, map[string]any{"port": 9, "holds": []cluster.Hold{{Digest: digest.FromString("x"), Size: 1}}})
	ask := func(method, path string, body []byte, header string) string {
		return fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s", method, path, header, len(body), body)
	}
	requests := map[string]string{
		trust.ProtoGossip:                "\x01\x02\x03\x04 hello",
		trust.ProtoSwarm:                 "\x13BitTorrent protocol" + strings.Repeat("\x00", 48),
		trust.ProtoHTTP1 + " blob":       ask("GET", "/quay/v1/blobs/"+desc.Digest.String(), nil, "Range: bytes=0-9\r\n"),
		trust.ProtoHTTP1 + " holds":      ask("POST", "/quay/v1/holds", hold, ""),
		trust.ProtoHTTP1 + " announce":   ask("POST", "/quay/v1/announce", jsonOf(t, map[string]any{"port": 9, "announcement": cluster.Announcement{Digest: desc.Digest, Size: desc.Size}}), ""),
		trust.ProtoHTTP1 + " statements": ask("POST", "/quay/v1/statements", jsonOf(t, map[string]any{"digest": desc.Digest, "size": desc.Size, "pieces": []int{0}}), ""),
	}
	exchange := func(t *testing.T, config *tls.Config, proto, request string) (string, error) {
		config.NextProtos = []string{strings.Fields(proto)[0]}
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", n.Addr().String(), config)
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(c, request); err != nil {
			return "", err
		}
		b := make([]byte, 12)
		k, err := io.ReadAtLeast(c, b, len(b))
		return string(b[:k]), err
	}
	kept := n.Stats().Kept
	for name, certs := range forgeries(t, n) {
		t.Run(name, func(t *testing.T) {
			for proto, request := range requests {
				got, err := exchange(t, &tls.Config{Certificates: certs, InsecureSkipVerify: true}, proto, request)
				if err == nil || got != "" {
					t.Errorf("%s: a stranger was answered %q, %v", proto, got, err)
				}
			}
		})
	}
	if s := n.Stats(); s.Uploaded != 0 || s.Members != 0 || s.Kept != kept {
		t.Errorf("strangers left traces: %+v", s)
	}
	// The same requests by a member: what is tested above is the door.
	member, err := n.o.Secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	for proto, request := range requests {
		if strings.HasPrefix(proto, trust.ProtoHTTP1) {
			if got, err := exchange(t, member.Client(trust.ProtoHTTP1), proto, request); err != nil || !strings.HasPrefix(got, "HTTP/1.1 20") {
				t.Errorf("%s: a member was answered %q, %v", proto, got, err)
			}
		}
	}
}

// TestForgedServersAreToldNothing: a node that is sent to a stranger's port, by a
// wrong --peer or a lie, ends the handshake without a word.
func TestForgedServersAreToldNothing(t *testing.T) {
	s := secret()
	model := newNode(t, t.TempDir(), s)
	for name, certs := range forgeries(t, model) {
		if len(certs) == 0 {
			continue // a server without a certificate cannot speak TLS
		}
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			heard := make(chan string, 16)
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					_ = c.SetDeadline(time.Now().Add(10 * time.Second))
					tc := tls.Server(c, &tls.Config{Certificates: certs, NextProtos: []string{trust.ProtoGossip}, ClientAuth: tls.RequestClientCert})
					b, _ := io.ReadAll(io.LimitReader(tc, 64))
					select {
					case heard <- string(b):
					default:
					}
					_ = c.Close()
				}
			}()
			n := newNode(t, t.TempDir(), s, l.Addr().String())
			select {
			case got := <-heard:
				if got != "" {
					t.Errorf("a stranger was told %q", got)
				}
			case <-time.After(20 * time.Second):
				t.Error("the node did not dial its peer")
			}
			if len(n.Members()) != 0 {
				t.Error("a stranger is a member")
			}
			_ = n.Close()
			_ = l.Close()
			<-done
		})
	}
}

// TestWrongPiecesWithRegistry: a member that sends other bytes than it signed for is
// found out by the first piece, in bulk and by a read that waits; nobody else gets
// such a piece from who got it.
func TestWrongPiecesWithRegistry(t *testing.T) {
	r := newRegistry(t)
	data := random(12 << 20)
	desc := r.add(data)
	fetch := func(t *testing.T, run func(liar *testNode, victim, third *Blob)) {
		s := secret()
		liar := newNode(t, t.TempDir(), s)
		right(t, liar.blob(t, desc, r.origin(t)), data, 20*time.Second)
		spoil(t, liar.dir, desc.Size)
		a := newNode(t, t.TempDir(), s, liar.Addr().String())
		b := newNode(t, t.TempDir(), s, a.Addr().String())
		acquainted(t, 2, a, b)
		known(t, desc.Digest, 1, liar, a, b)
		defer a.Close()
		defer b.Close()
		before := r.served.Load()
		victim, third := a.blob(t, desc, r.origin(t)), b.blob(t, desc, r.origin(t))
		defer neverWrong(t, victim, data)()
		defer neverWrong(t, third, data)()
		run(liar, victim, third)
		if why := banned(victim, liar); why != WrongBytes {
			t.Errorf("the liar is banned for %q", why)
		}
		for _, x := range []*Blob{victim, third} {
			if why := banned(x, a) + banned(x, b); why != "" {
				t.Errorf("an honest node is banned for %s", why)
			}
		}
		if a.Stats().WrongPieces == 0 {
			t.Error("no wrong piece was counted")
		}
		// One copy, and what two nodes ask for in doubt.
		if got := float64(r.served.Load()-before) / float64(desc.Size); got > 2.2 {
			t.Errorf("the registry gave %.2f copies", got)
		}
		acquainted(t, 2, a, b)
	}
	t.Run("bulk", func(t *testing.T) {
		fetch(t, func(_ *testNode, victim, third *Blob) {
			third.Fetch()
			t.Logf("in %s", right(t, victim, data, 60*time.Second))
			right(t, third, data, 60*time.Second)
		})
	})
	t.Run("demand reads", func(t *testing.T) {
		fetch(t, func(liar *testNode, victim, third *Blob) {
			for off := int64(0); off < desc.Size; off += 1 << 20 {
				for _, b := range []*Blob{victim, third} {
					p := make([]byte, 5000)
					if _, err := b.ReadAt(within(t, 20*time.Second), p, off, Demand); err != nil || !bytes.Equal(p, data[off:off+5000]) {
						t.Fatalf("read at %d: %v", off, err)
					}
				}
			}
			eventually(t, "the liar is banned", func() bool { return banned(victim, liar) != "" })
		})
	})
}

// TestClaimsAllGivesNothing: a member that says it holds everything and sends none
// of it is left out of account, and the registry is asked, once for all.
func TestClaimsAllGivesNothing(t *testing.T) {
	r := newRegistry(t)
	data := random(24 << 20)
	desc := r.add(data)
	s := secret()
	hole := newNodeWith(t, s, func(o *Options) { o.UploadRatePerBlob = 1 })
	right(t, hole.blob(t, desc, r.origin(t)), data, 20*time.Second)
	var nodes []*testNode
	for range 3 {
		nodes = append(nodes, newNode(t, t.TempDir(), s, hole.Addr().String()))
	}
	acquainted(t, 3, nodes...)
	known(t, desc.Digest, 1, append(nodes, hole)...)
	r.rate.Store(15 << 20)
	before := r.served.Load()
	begun := time.Now()
	var blobs []*Blob
	for _, n := range nodes {
		b := n.blob(t, desc, r.origin(t))
		b.Fetch()
		blobs = append(blobs, b)
	}
	for _, b := range blobs {
		right(t, b, data, 60*time.Second)
	}
	copies := float64(r.served.Load()-before) / float64(desc.Size)
	t.Logf("in %s, %.2f copies", time.Since(begun).Round(time.Millisecond), copies)
	// Three would be each on its own.
	if copies > 2.5 {
		t.Errorf("%.2f copies from the registry", copies)
	}
}

// keptBy returns a blob whose list a member keeps.
func (r *registry) keptBy(t *testing.T, id string, size int, as *testNode) ([]byte, ocispec.Descriptor) {
	t.Helper()
	for n := size; ; n++ {
		data := random(n)
		if as.cluster.Keeper(digest.FromBytes(data)).ID == id {
			return data, r.add(data)
		}
	}
}
