package swarm

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pieceSize of all blobs in these tests.
const pieceSize = 256 << 10

// secret of the cluster in these tests.
var secret = trust.NewSecret()

// blob is one made up for a test; it needs no content.
type blob struct {
	digest digest.Digest
	size   int64
}

// newBlob has so many pieces, the last of them a short one.
func newBlob(name string, pieces int) blob {
	return blob{digest.FromString(name), int64(pieces)*pieceSize - 1000}
}

func (b blob) pieces() int { return numPieces(b.size, pieceSize) }

// all, none and some say what a node holds to begin with.
func all(int) bool  { return true }
func none(int) bool { return false }
func some(pieces ...int) func(int) bool {
	return func(i int) bool {
		for _, p := range pieces {
			if p == i {
				return true
			}
		}
		return false
	}
}

// node is a swarm with its listener.
type node struct {
	*Swarm
	id   *trust.Identity
	addr netip.AddrPort
}

type nodeOption func(*Options)

func newNode(t testing.TB, opts ...nodeOption) *node {
	t.Helper()
	return newNodeOf(t, secret, opts...)
}

func newNodeOf(t testing.TB, s trust.Secret, opts ...nodeOption) *node {
	t.Helper()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	ln, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	o := Options{ID: id, Listener: ln.Swarm()}
	for _, f := range opts {
		f(&o)
	}
	sw, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{sw, id, ln.Addr()}
	t.Cleanup(func() { n.close(t) })
	return n
}

func (n *node) close(t testing.TB) {
	t.Helper()
	start := time.Now()
	n.Close()
	if d := time.Since(start); d > 3*time.Second {
		t.Errorf("Close took %v", d)
	}
}

func (n *node) add(t testing.TB, b blob, has func(int) bool) *Torrent {
	t.Helper()
	to, err := n.Add(b.digest, b.size, pieceSize, has)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { noData(t, to) })
	return to
}

// noData checks that no piece, nor part of one, crossed in either direction.
func noData(t testing.TB, to *Torrent) {
	t.Helper()
	s := to.lib.Stats()
	for name, n := range map[string]int64{
		"bytes of pieces received": s.BytesReadData.Int64(), "bytes of pieces sent": s.BytesWrittenData.Int64(),
		"chunks received": s.ChunksRead.Int64(), "chunks sent": s.ChunksWritten.Int64(), "bytes hashed": s.BytesHashed.Int64(),
	} {
		if n != 0 {
			t.Errorf("%d %s", n, name)
		}
	}
}

// heard is what a torrent was told that a node holds, a + or - for each piece; "" when it is not connected.
func heard(to *Torrent, of *node) string {
	for _, p := range to.Peers() {
		if p.Node != of.id.ID() {
			continue
		}
		var b strings.Builder
		for _, has := range p.Pieces {
			b.WriteByte("-+"[btoi(has)])
		}
		return b.String()
	}
	return ""
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// hears waits until a torrent was told just this of a node.
func hears(t testing.TB, to *Torrent, of *node, want string) {
	t.Helper()
	var got string
	defer func() {
		if t.Failed() {
			t.Logf("was told %q, want %q", got, want)
		}
	}()
	wait(t, "word of a node's pieces", func() bool {
		got = heard(to, of)
		return got == want
	})
}

// wait until ok, at most a while.
func wait(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			t.Fatal("waited in vain: ", what)
		case <-tick.C:
		}
	}
}

// never checks that ok stays false for d.
func never(t testing.TB, what string, d time.Duration, ok func() bool) {
	t.Helper()
	end := time.After(d)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-end:
			return
		case <-tick.C:
			if ok() {
				t.Fatal("happened though it must not: ", what)
			}
		}
	}
}

func addrs(nodes ...*node) (a []netip.AddrPort) {
	for _, n := range nodes {
		a = append(a, n.addr)
	}
	return a
}

func noLog() *slog.Logger { return slog.New(slog.DiscardHandler) }
