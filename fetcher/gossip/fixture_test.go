package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func TestMain(m *testing.M) {
	code := m.Run()
	// A ping of memberlist's under way when its node was closed ends by itself (see Gossip.Close).
	time.Sleep(probeEvery)
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// network is a network of loopback ports that can be cut.
type network struct {
	mu  sync.Mutex // guards following
	cut func(from, to uint16) bool
}

func (w *network) set(cut func(from, to uint16) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.cut = cut
}

func (w *network) blocked(from, to uint16) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.cut != nil && (w.cut(from, to) || w.cut(to, from))
}

// cutPackets is a packet socket on that network.
type cutPackets struct {
	net.PacketConn
	w    *network
	port uint16
	mu   sync.Mutex // guards following
	sent [][]byte   // for tests that send them again
}

func (c *cutPackets) WriteTo(b []byte, to net.Addr) (int, error) {
	if c.w.blocked(c.port, uint16(to.(*net.UDPAddr).Port)) {
		return len(b), nil
	}
	c.mu.Lock()
	if len(c.sent) < 100 {
		c.sent = append(c.sent, slices.Clone(b))
	}
	c.mu.Unlock()
	return c.PacketConn.WriteTo(b, to)
}

type node struct {
	*Gossip
	l       *trust.Listener
	packets *cutPackets
	port    uint16
}

func (n *node) addr() string { return fmt.Sprintf("127.0.0.1:%d", n.port) }

type setup struct {
	w      *network
	secret trust.Secret
	listen string
	log    *slog.Logger
}

func newSetup() *setup {
	return &setup{w: &network{}, secret: trust.NewSecret(), listen: "127.0.0.1"}
}

// open opens a node's port without starting it.
func (s *setup) open(t testing.TB) *node {
	t.Helper()
	id, err := s.secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := trust.Listen(s.listen, trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	n := &node{l: l, port: l.Addr().Port()}
	n.packets = &cutPackets{PacketConn: l.Packets(), w: s.w, port: n.port}
	n.Gossip = &Gossip{o: Options{Identity: id}} // until start
	return n
}

func (s *setup) start(t testing.TB, n *node, change func(*Options)) *node {
	t.Helper()
	o := Options{
		Identity: n.o.Identity, Key: s.secret.GossipKey(),
		Streams: n.l.Gossip(), Packets: n.packets, Log: s.log,
	}
	o.hooks.dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
		if s.w.blocked(n.port, a.Port()) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.EHOSTUNREACH}
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", a.String())
	}
	if change != nil {
		change(&o)
	}
	g, err := Start(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	n.Gossip = g
	t.Cleanup(func() { g.Close() })
	return n
}

// node starts a node with these peers.
func (s *setup) node(t testing.TB, peers ...string) *node {
	t.Helper()
	return s.start(t, s.open(t), func(o *Options) { o.Peers = peers })
}

// within waits until ok holds and returns how long that took.
func within(t testing.TB, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(start)
}

// sees reports whether n's members are exactly others.
func (n *node) sees(others ...*node) bool {
	have := n.Members()
	if len(have) != len(others) {
		return false
	}
	for _, o := range others {
		if !slices.ContainsFunc(have, func(m Node) bool { return m.ID == o.Self().ID && m.Addr.Port() == o.port }) {
			return false
		}
	}
	return true
}

func allSee(nodes []*node) func() bool {
	return func() bool {
		for i, n := range nodes {
			if !n.sees(slices.Concat(nodes[:i], nodes[i+1:])...) {
				return false
			}
		}
		return true
	}
}

// resolver answers for one name.
type resolver struct {
	mu   sync.Mutex // guards following
	ips  map[string][]string
	asks int
}

func (r *resolver) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asks++
	var ips []netip.Addr
	for _, ip := range r.ips[host] {
		ips = append(ips, netip.MustParseAddr(ip))
	}
	if ips == nil {
		return nil, errors.New("no such host")
	}
	return ips, nil
}

func (r *resolver) set(host string, ips ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ips = map[string][]string{host: ips}
}
