package gossip

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"
)

// heard collects what a node's OnMessage got.
type heard struct {
	mu  sync.Mutex // guards following
	all map[string]int
}

func (h *heard) add(from string, b []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.all[from+" "+string(b)]++
}

func (h *heard) count(from, prefix string) (different, most int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, n := range h.all {
		if bytes.HasPrefix([]byte(k), []byte(from+" "+prefix)) {
			different++
			most = max(most, n)
		}
	}
	return different, most
}

func casting(t *testing.T, s *setup, n int) ([]*node, []*heard) {
	t.Helper()
	var nodes []*node
	var ears []*heard
	for i := range n {
		h := &heard{all: map[string]int{}}
		nodes = append(nodes, s.start(t, s.open(t), func(o *Options) {
			o.OnMessage = h.add
			if i > 0 {
				o.Peers = []string{nodes[0].addr()}
			}
		}))
		ears = append(ears, h)
	}
	within(t, 3*time.Second, "all see each other", allSee(nodes))
	return nodes, ears
}

func TestBroadcastReachesAll(t *testing.T) {
	t.Parallel()
	nodes, ears := casting(t, newSetup(), 5)
	long := bytes.Repeat([]byte("x"), MaxMessage-1)
	for i := range 10 {
		if err := nodes[i%5].Broadcast(append([]byte{byte('a' + i)}, long...)); err != nil {
			t.Fatal(err)
		}
	}
	took := within(t, 3*time.Second, "everybody heard everything", func() bool {
		for i, h := range ears {
			for j, n := range nodes {
				if got, _ := h.count(n.Self().ID, ""); i != j && got != 2 {
					return false
				}
			}
		}
		return true
	})
	t.Logf("in %v", took)
	time.Sleep(500 * time.Millisecond)
	for i, h := range ears {
		for _, n := range nodes {
			if _, most := h.count(n.Self().ID, ""); most > 1 {
				t.Errorf("node %d heard a message %d times", i, most)
			}
		}
		if got, _ := h.count(nodes[i].Self().ID, ""); got > 0 {
			t.Errorf("node %d heard itself", i)
		}
	}
	for _, b := range [][]byte{nil, make([]byte, MaxMessage+1)} {
		if err := nodes[0].Broadcast(b); err == nil {
			t.Errorf("a message of %d bytes was taken", len(b))
		}
	}
}

func TestBroadcastFlood(t *testing.T) {
	t.Parallel()
	nodes, ears := casting(t, newSetup(), 3)
	liar, victim, c := nodes[0], nodes[1], ears[2]
	sent := 0
	for i := range 10 * castBurst {
		if err := liar.Broadcast(fmt.Appendf(nil, "own %d", i)); err == nil {
			sent++
		} else if !errors.Is(err, ErrTooFast) {
			t.Fatal(err)
		}
	}
	if sent < castBurst || sent > 2*castBurst {
		t.Errorf("%d messages in a moment", sent)
	}
	// One that does not keep to it, handed to a node as the network would.
	craft := func(as *node, number uint64, body string) []byte {
		m := append([]byte{castVersion}, as.transport.self[:]...)
		m = binary.BigEndian.AppendUint64(m, number)
		m = append(m, body...)
		return append(m, liar.self.id.Sign(labelCast, m)...)
	}
	for i := range 1000 {
		nodes[2].casts.receive(craft(liar, uint64(1000+i), fmt.Sprintf("flood %d", i)))
	}
	for i := range 100 {
		nodes[2].casts.receive(craft(victim, uint64(1000+i), "in another's name"))
	}
	nodes[2].casts.mu.Lock()
	if o := nodes[2].casts.origins[victim.Self().ID]; o != nil {
		t.Error("forgeries count for whom they name")
	}
	nodes[2].casts.mu.Unlock()
	if q := nodes[2].casts.queue.NumQueued(); q > castQueue {
		t.Errorf("%d messages wait", q)
	}
	if err := victim.Broadcast([]byte("true")); err != nil {
		t.Fatal(err)
	}
	within(t, 5*time.Second, "the victim is heard", func() bool { n, _ := c.count(victim.Self().ID, "true"); return n == 1 })
	if n, _ := c.count(liar.Self().ID, "flood"); n == 0 || n > 3*castBurst {
		t.Errorf("%d of 1000 messages got through", n)
	}
	if n, _ := c.count(victim.Self().ID, "in"); n != 0 {
		t.Errorf("%d messages in another's name", n)
	}
}
