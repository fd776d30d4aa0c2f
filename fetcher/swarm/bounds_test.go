package swarm

import (
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"
)

// TestBackoff: the pauses between tries of one address, of which the first are run's own.
func TestBackoff(t *testing.T) {
	a, now := &address{}, time.Now()
	for try, most := range []time.Duration{
		retryPeers / 2, retryPeers / 2, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second, retryMost, retryMost, retryMost,
	} {
		a.tried(now)
		if pause := a.next.Sub(now); pause > most || pause < most*4/5 && try >= retryKeep-1 {
			t.Errorf("after try %d: %v, want at most %v and little less", try+1, pause, most)
		}
	}
	for range 100 { // no overflow
		a.tried(now)
	}
	if pause := a.next.Sub(now); pause > retryMost || pause < retryMost*4/5 {
		t.Errorf("in the end: %v", pause)
	}
}

// TestForeignAddressGetsFewDials: a stranger whose address a member advertised is left alone soon.
func TestForeignAddressGetsFewDials(t *testing.T) {
	t.Parallel()
	stranger, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var dials atomic.Int32
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := stranger.Accept()
			if err != nil {
				return
			}
			dials.Add(1)
			c.Close()
		}
	}()
	t.Cleanup(func() { stranger.Close(); <-done })
	n := newNode(t)
	to := n.add(t, newBlob("foreign", 1), none)
	to.AddPeers([]netip.AddrPort{stranger.Addr().(*net.TCPAddr).AddrPort()})
	time.Sleep(6500 * time.Millisecond)
	if d := dials.Load(); d < 2 || d > 5 { // at 0, 1, 2 and 4 s; each second would be 7
		t.Errorf("%d dials in 6.5 s", d)
	}
}

// TestBackoffEnds: an address that did not answer for long is forgiven once its node is connected.
func TestBackoffEnds(t *testing.T) {
	t.Parallel()
	b := newBlob("forgiven", 2)
	seeder, leecher := newNode(t), newNode(t)
	seeder.add(t, b, all)
	tl := leecher.add(t, b, none)
	tl.AddPeers(addrs(seeder))
	tl.mu.Lock()
	a := tl.peers[seeder.addr]
	a.tries, a.next = 20, time.Now().Add(time.Second)
	tl.mu.Unlock()
	hears(t, tl, seeder, "++")
	wait(t, "forgiven", func() bool {
		tl.mu.Lock()
		defer tl.mu.Unlock()
		return a.tries == 0 && a.next.IsZero()
	})
}

// TestPeersAreBounded: addresses that failed make room, those that did not are kept.
func TestPeersAreBounded(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	to := n.add(t, newBlob("bounded", 1), all) // complete: it dials nobody
	at := func(i int) netip.AddrPort {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 9, byte(i >> 8), byte(i)}), 9)
	}
	for i := range maxPeers + 10 {
		to.AddPeers([]netip.AddrPort{at(i)})
	}
	to.mu.Lock()
	if len(to.peers) != maxPeers || to.peers[at(maxPeers)] != nil {
		t.Errorf("%d addresses kept, want the first %d", len(to.peers), maxPeers)
	}
	to.peers[at(7)].tries = retryKeep + 2
	to.peers[at(8)].tries = retryKeep + 1
	to.mu.Unlock()
	to.AddPeers([]netip.AddrPort{at(1000)})
	to.mu.Lock()
	defer to.mu.Unlock()
	if to.peers[at(7)] != nil || to.peers[at(8)] == nil || to.peers[at(1000)] == nil {
		t.Error("the address that failed most often did not make room")
	}
}

// TestConnectionCaps: with more peers than connections a node has no more than it may, and knows some peers all the same.
func TestConnectionCaps(t *testing.T) {
	t.Parallel()
	const most = 2
	for name, capped := range map[string]nodeOption{
		"of the node": func(o *Options) { o.Connections = most },
		"of a blob":   func(o *Options) { o.ConnectionsPerTorrent = most },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBlob(name, 8)
			leecher := newNode(t, capped)
			tl := leecher.add(t, b, none)
			var seeders []*node
			for range 5 {
				s := newNode(t)
				s.add(t, b, some(0, 1, 2)).AddPeers(addrs(leecher))
				seeders = append(seeders, s)
			}
			tl.AddPeers(addrs(seeders...))
			wait(t, "peers", func() bool { return len(tl.Peers()) == most })
			never(t, "more connections than allowed", 2*time.Second, func() bool {
				// A connection that the library turns away is open for its handshake.
				return tl.Connections() > most || name == "of the node" && leecher.Connections() > most
			})
			if n := len(tl.Peers()); n != most {
				t.Errorf("%d peers in the end", n)
			}
		})
	}
	full := newNode(t, func(o *Options) { o.Connections = 1 })
	other, third := newNode(t), newNode(t)
	b := newBlob("full", 1)
	full.add(t, b, none).AddPeers(addrs(other))
	other.add(t, b, all)
	wait(t, "the one connection", func() bool { return full.Connections() == 1 })
	if _, err := (dialer{full.Swarm}).Dial(t.Context(), third.addr.String()); !errors.Is(err, errFull) {
		t.Errorf("a dial beyond the bound: %v", err)
	}
}
