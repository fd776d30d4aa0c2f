package gossip

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func TestThreeNodesFromOneAddress(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.start(t, s.open(t), func(o *Options) { o.Self = Node{Zone: "rack/1", Origin: true} })
	b := s.start(t, s.open(t), func(o *Options) { o.Peers = []string{a.addr()}; o.Self.Ephemeral = true })
	changed := b.Changed()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	b.Ready(ctx)
	if ctx.Err() != nil || !b.sees(a) {
		t.Fatalf("after Ready, b sees %v", b.Members())
	}
	select {
	case <-changed:
	default:
		t.Error("Changed was not closed")
	}
	c := s.node(t, a.addr())
	took := within(t, time.Second, "three see each other", allSee([]*node{a, b, c}))
	t.Logf("in %v", took)
	if m := c.Members(); !slices.IsSortedFunc(m, func(x, y Node) int { return slices.Compare([]byte(x.ID), []byte(y.ID)) }) {
		t.Errorf("not sorted: %v", m)
	}
	want := Node{ID: a.Self().ID, Addr: netip.MustParseAddrPort(a.addr()), Zone: "rack/1", Origin: true}
	if !slices.Contains(c.Members(), want) || a.Self() != want {
		t.Errorf("%v does not contain %v", c.Members(), want)
	}
	if i := slices.IndexFunc(c.Members(), func(m Node) bool { return m.Ephemeral }); i < 0 || c.Members()[i].ID != b.Self().ID {
		t.Errorf("the ephemeral one is not told: %v", c.Members())
	}
	a.SetOrigin(false)
	within(t, 2*time.Second, "c hears that a has lost the registries", func() bool {
		return !slices.ContainsFunc(c.Members(), func(m Node) bool { return m.Origin })
	})
	if s := c.Silent(); len(s) != 0 {
		t.Errorf("silent: %v", s)
	}
}

// Eight nodes are told the same peer, one of themselves, and start at once, the peer last.
func TestSimultaneousStart(t *testing.T) {
	t.Parallel()
	s := newSetup()
	var nodes []*node
	for range 8 {
		nodes = append(nodes, s.open(t))
	}
	peer := nodes[7].addr()
	for _, n := range nodes {
		s.start(t, n, func(o *Options) { o.Peers = []string{peer} })
	}
	took := within(t, 3*time.Second, "eight see each other", allSee(nodes))
	t.Logf("in %v", took)
	for _, n := range nodes {
		if len(n.Silent()) > 0 {
			t.Errorf("silent: %v", n.Silent())
		}
	}
}

// A peer that is started a moment after the others is found soon.
func TestPeerStartsLater(t *testing.T) {
	t.Parallel()
	s := newSetup()
	free, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	a, b := s.node(t, addr), s.node(t, addr)
	within(t, 2*time.Second, "the peer is silent", func() bool { return a.Silent()[addr] != nil && b.Silent()[addr] != nil })
	id, err := s.secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := trust.Listen(addr, trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := &node{l: l, port: l.Addr().Port(), packets: &cutPackets{PacketConn: l.Packets(), w: s.w, port: l.Addr().Port()}}
	c.Gossip = &Gossip{o: Options{Identity: id}}
	s.start(t, c, nil)
	took := within(t, 3*time.Second, "all see each other", allSee([]*node{a, b, c}))
	t.Logf("in %v", took)
	within(t, time.Second, "nobody is silent", func() bool { return len(a.Silent())+len(b.Silent()) == 0 })
}

func TestLeaveIsSeenAtOnce(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.node(t)
	b, c := s.node(t, a.addr()), s.node(t, a.addr())
	within(t, 2*time.Second, "all see each other", allSee([]*node{a, b, c}))
	start := time.Now()
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("Close took %v", took)
	}
	within(t, 500*time.Millisecond, "b is gone", func() bool { return a.sees(c) && c.sees(a) })
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}

func TestDeadNodeIsDropped(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.node(t)
	b, c := s.node(t, a.addr()), s.node(t, a.addr())
	within(t, 2*time.Second, "all see each other", allSee([]*node{a, b, c}))
	s.w.set(func(from, _ uint16) bool { return from == c.port })
	took := within(t, 8*time.Second, "c is gone", func() bool { return a.sees(b) && b.sees(a) })
	t.Logf("in %v", took)
}

// One side of UDP does not pass: streams keep the member alive.
func TestWithoutUDP(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.node(t)
	b := s.start(t, s.open(t), func(o *Options) {
		o.Peers = []string{a.addr()}
		o.Packets = dropPackets{o.Packets}
	})
	within(t, 2*time.Second, "both see each other", allSee([]*node{a, b}))
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if !a.sees(b) || !b.sees(a) {
			t.Fatal("a member that answers streams was dropped")
		}
	}
}

type dropPackets struct{ net.PacketConn }

func (dropPackets) WriteTo(b []byte, _ net.Addr) (int, error) { return len(b), nil }

func TestOtherSecret(t *testing.T) {
	t.Parallel()
	s, other := newSetup(), newSetup()
	a := s.node(t)
	b := other.node(t, a.addr())
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	b.Ready(ctx)
	err := b.Silent()[a.addr()]
	if !trust.Foreign(err) {
		t.Errorf("silent: %v, which is not told to be foreign", err)
	}
	time.Sleep(300 * time.Millisecond)
	if len(a.Members()) != 0 || len(b.Members()) != 0 {
		t.Error("strangers are members")
	}
	a.packets.mu.Lock()
	defer a.packets.mu.Unlock()
	if len(a.packets.sent) != 0 {
		t.Errorf("%d packets were sent to strangers", len(a.packets.sent))
	}
}

// Cut in two until each side has forgotten the other, then mended: no peer is configured that crosses the cut.
func TestPartitionHeals(t *testing.T) {
	t.Parallel()
	s := newSetup()
	quick := func(o *Options) {
		o.hooks.tune = func(c *memberlist.Config) { c.GossipToTheDeadTime = 300 * time.Millisecond }
	}
	a := s.start(t, s.open(t), quick)
	var nodes = []*node{a}
	for range 3 {
		n := s.start(t, s.open(t), func(o *Options) { quick(o); o.Peers = []string{a.addr()} })
		within(t, 2*time.Second, "joined", func() bool { return n.sees(nodes...) })
		nodes = append(nodes, n)
	}
	b, c, d := nodes[1], nodes[2], nodes[3]
	for _, n := range nodes {
		n.peers.mu.Lock()
		n.peers.configured = nil
		clear(n.peers.targets)
		n.peers.mu.Unlock()
	}
	side := map[uint16]bool{a.port: true, b.port: true}
	s.w.set(func(from, to uint16) bool { return side[from] != side[to] })
	took := within(t, 10*time.Second, "two clusters", func() bool {
		return a.sees(b) && b.sees(a) && c.sees(d) && d.sees(c)
	})
	t.Logf("two clusters in %v", took)
	// Each side forgets the other when its round of probes is over: one member is probed at a time.
	time.Sleep(300*time.Millisecond + 3*probeEvery)
	s.w.set(nil)
	took = within(t, 20*time.Second, "one cluster", allSee(nodes))
	t.Logf("healed in %v", took)
}

// A node's address changes while it lives: others follow at once, and nobody takes it for dead.
func TestAddressChange(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.node(t)
	s.listen = "0.0.0.0"
	local := atomic.Pointer[netip.Addr]{}
	first, second := netip.MustParseAddr("127.0.0.2"), netip.MustParseAddr("127.0.0.3")
	local.Store(&first)
	b := s.start(t, s.open(t), func(o *Options) {
		o.Peers = []string{a.addr()}
		o.hooks.mine = func(ip netip.Addr) bool { return ip == *local.Load() }
		o.hooks.dial = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: local.Load().AsSlice()}}
			return d.DialContext(ctx, "tcp", to.String())
		}
	})
	at := func(ip netip.Addr) func() bool {
		return func() bool {
			m := a.Members()
			return len(m) == 1 && m[0].Addr == netip.AddrPortFrom(ip, b.port)
		}
	}
	within(t, 2*time.Second, "a has b's first address", at(first))
	if b.Self().Addr.Addr() != first {
		t.Errorf("b takes itself to be at %v", b.Self().Addr)
	}
	// Whoever is sent to at the old address from now on is not b.
	s.w.set(nil)
	local.Store(&second)
	gone := false
	within(t, 4*time.Second, "a has b's second address", func() bool {
		gone = gone || len(a.Members()) == 0
		return at(second)()
	})
	if gone {
		t.Error("b was taken for dead meanwhile")
	}
}

// A node that listens on all addresses and has no peer learns its own from the first that comes.
func TestAddressFromAccepted(t *testing.T) {
	t.Parallel()
	s := newSetup()
	s.listen = ""
	a := s.node(t)
	if a.Self().Addr.IsValid() {
		t.Errorf("knows its address %v from nowhere", a.Self().Addr)
	}
	b := s.node(t, a.addr())
	within(t, 2*time.Second, "both see each other", allSee([]*node{a, b}))
	if got := a.Members()[0].Addr.String(); got != b.addr() {
		t.Errorf("b is at %s, not at %s", got, b.addr())
	}
}

func TestDNSName(t *testing.T) {
	t.Parallel()
	s := newSetup()
	r := &resolver{}
	const name = "nodes.example"
	// Two nodes on one port number at two addresses, a third to come.
	a := s.open(t)
	at := func(ip string) *node {
		sub := *s
		sub.listen = fmt.Sprintf("%s:%d", ip, a.port)
		return sub.open(t)
	}
	b, c := at("127.0.0.2"), at("127.0.0.3")
	s.start(t, a, nil)
	s.start(t, b, nil)
	d := s.start(t, s.open(t), func(o *Options) {
		o.Peers = []string{name}
		o.DefaultPort = a.port
		o.hooks.lookup = r.lookup
		o.hooks.lookupEvery = 300 * time.Millisecond
	})
	within(t, time.Second, "a name that does not resolve is silent", func() bool { return d.Silent()[name] != nil })
	r.set(name, "127.0.0.1", "127.0.0.2", "127.0.0.4") // nobody is at the last
	within(t, 5*time.Second, "both addresses are found", func() bool { return d.sees(a, b) && a.sees(b, d) })
	if len(d.Silent()) != 0 {
		t.Errorf("silent: %v", d.Silent())
	}
	s.start(t, c, nil)
	r.set(name, "127.0.0.1", "127.0.0.3")
	within(t, 3*time.Second, "the new address is found", func() bool { return d.sees(a, b, c) })
}

func TestPeerIsThisNode(t *testing.T) {
	s := newSetup()
	n := s.open(t)
	s.start(t, n, func(o *Options) { o.Peers = []string{n.addr()} })
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	n.Ready(ctx)
	if ctx.Err() != nil || len(n.Silent()) != 0 || len(n.Members()) != 0 {
		t.Errorf("ready: %v, silent %v, members %v", ctx.Err(), n.Silent(), n.Members())
	}
}

func TestParsePeer(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1:7000": "10.0.0.1 7000", "10.0.0.1": "10.0.0.1 9", "[::1]:7000": "::1 7000", "[::1]": "::1 9", "::1": "::1 9",
		"nodes.example": "nodes.example 9", "nodes.example:1": "nodes.example 1",
	} {
		p, err := parsePeer(in, 9)
		if err != nil || fmt.Sprint(p.host, " ", p.port) != want {
			t.Errorf("%q: %v, %v", in, p, err)
		}
	}
	for _, in := range []string{"", ":1", "a:0", "a:65536", "a:b", "0.0.0.0:1", "[::]:1", "239.1.1.1:1"} {
		if p, err := parsePeer(in, 9); err == nil {
			t.Errorf("%q is taken for %+v", in, p)
		}
	}
	if _, err := parsePeer("host", 0); err == nil {
		t.Error("a peer without a port is taken without a default")
	}
}

func TestStartRefuses(t *testing.T) {
	s := newSetup()
	for name, change := range map[string]func(*Options){
		"key":       func(o *Options) { o.Key = nil },
		"zone":      func(o *Options) { o.Self.Zone = "a zone" },
		"advertise": func(o *Options) { o.Advertise = netip.MustParseAddrPort("0.0.0.0:1") },
		"port":      func(o *Options) { o.Advertise = netip.MustParseAddrPort("10.0.0.1:0") },
		"peer":      func(o *Options) { o.Peers = []string{"host"} },
	} {
		n := s.open(t)
		o := Options{Identity: n.o.Identity, Key: s.secret.GossipKey(), Streams: n.l.Gossip(), Packets: n.packets}
		change(&o)
		if g, err := Start(context.Background(), o); err == nil {
			g.Close()
			t.Errorf("%s: started", name)
		}
		if _, err := n.packets.PacketConn.WriteTo([]byte("x"), n.packets.LocalAddr()); err == nil {
			t.Errorf("%s: the socket was left open", name)
		}
	}
}
