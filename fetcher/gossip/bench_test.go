package gossip

import (
	"net/netip"
	"syscall"
	"testing"
	"time"
)

// BenchmarkIdle is what one of three nodes costs when nothing happens, in percent of a core.
func BenchmarkIdle(b *testing.B) {
	s := newSetup()
	first := s.node(b)
	nodes := []*node{first, s.node(b, first.addr()), s.node(b, first.addr())}
	within(b, 3*time.Second, "all see each other", allSee(nodes))
	time.Sleep(time.Second)
	cpu := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	const span = 5 * time.Second
	for b.Loop() {
		before := cpu()
		time.Sleep(span)
		b.ReportMetric(100*float64(cpu()-before)/float64(span)/float64(len(nodes)), "%cpu/node")
	}
}

// BenchmarkVerify is what the entry of a member costs that was not known.
func BenchmarkVerify(b *testing.B) {
	id, err := newSetup().secret.Identity()
	if err != nil {
		b.Fatal(err)
	}
	text := encodeMeta(id, Node{Addr: netip.MustParseAddrPort("10.0.0.1:7000")}, 1)
	for b.Loop() {
		if _, err := verifyMeta(id.ID(), text); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkMembers is what Members costs in a cluster of a thousand that does not change.
func BenchmarkMembers(b *testing.B) {
	m := newMembers("", nil)
	for i := range 1000 {
		m.live[nodeID{byte(i), byte(i >> 8)}.String()] = &member{}
	}
	for b.Loop() {
		if len(m.list()) != 1000 {
			b.Fatal("members are missing")
		}
	}
}

// BenchmarkJoin is how long 40 nodes take to see each other that are started at once with one peer.
func BenchmarkJoin(b *testing.B) {
	for b.Loop() {
		s := newSetup()
		var nodes []*node
		for range 40 {
			nodes = append(nodes, s.open(b))
		}
		start := time.Now()
		for _, n := range nodes {
			s.start(b, n, func(o *Options) { o.Peers = []string{nodes[0].addr()} })
		}
		within(b, 20*time.Second, "all see each other", allSee(nodes))
		b.ReportMetric(float64(time.Since(start).Milliseconds()), "ms")
		for _, n := range nodes {
			go n.Close()
		}
		time.Sleep(2 * time.Second)
	}
}
