package layerstore

import (
	"context"
	"testing"
	"time"
)

func TestChunkTable(t *testing.T) {
	for _, c := range []struct {
		name string
		lens []int64
	}{
		{"none", nil},
		{"one", []int64{4096}},
		{"even", []int64{8192, 8192, 8192}},
		{"even but for the last", []int64{8192, 8192, 4096}},
		{"last is longer", []int64{4096, 4096, 8192}},
		{"uneven", []int64{4096, 12288, 4096, 40960}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var size int64
			for _, n := range c.lens {
				size += n
			}
			table, err := newTable(c.lens, size)
			if err != nil {
				t.Fatal(err)
			}
			if table, err = unpackTable(table.pack(), size); err != nil {
				t.Fatal(err)
			}
			var at int64
			for i, n := range c.lens {
				if table.start(i) != at || table.size(i) != n || table.at(at) != i || table.at(at+n-1) != i {
					t.Errorf("chunk %d: %d bytes from %d", i, table.size(i), table.start(i))
				}
				at += n
			}
			if len(c.lens) > 0 && table.at(size+100) != len(c.lens)-1 {
				t.Error("an offset beyond the end is not in the last chunk")
			}
		})
	}
	for _, bad := range [][]int64{{0}, {-4096, 8192}, {4096}, {8192, 4096}} {
		if _, err := newTable(bad, 8192); err == nil {
			t.Errorf("%v was taken for 8192 bytes", bad)
		}
	}
	if _, err := unpackTable([]byte{0xff}, 100); err == nil {
		t.Error("half a number was taken")
	}
}

func TestBitset(t *testing.T) {
	b := newBitset(200)
	for _, c := range []int{0, 1, 63, 64, 65, 130} {
		if !b.set(c) || b.set(c) || !b.has(c) {
			t.Errorf("set %d", c)
		}
	}
	for _, c := range [][3]int{{0, 199, 2}, {63, 65, -1}, {63, 66, 66}, {130, 130, -1}, {131, 199, 131}, {5, 4, -1}} {
		if got := b.missing(c[0], c[1]); got != c[2] {
			t.Errorf("the first missing of %d to %d is %d, not %d", c[0], c[1], got, c[2])
		}
	}
	if b.count() != 6 || !b.clear(64) || b.clear(64) || b.all(63, 65) || !b.any(63, 65) {
		t.Error("clear")
	}
}

// Who waits longest goes first among equals; demand before all, and into places that
// are kept for it; no layer takes more than its share.
func TestGate(t *testing.T) {
	g := newGate(4, 3)
	a, b := new(layer), new(layer)
	enter := func(l *layer, prio Priority) *ticket {
		tk := &ticket{l: l, prio: prio}
		ctx, cancel := context.WithCancel(t.Context())
		t.Cleanup(cancel)
		g.mu.Lock()
		n := len(g.waiting)
		g.mu.Unlock()
		go g.enter(ctx, tk)
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			g.mu.Lock()
			in := tk.ready != nil && (len(g.waiting) > n || inside(tk))
			g.mu.Unlock()
			if in {
				return tk
			}
		}
		t.Fatal("a ticket is lost")
		return nil
	}
	for range 3 {
		if tk := enter(a, Background); !inside(tk) {
			t.Fatal("a free place was not given")
		}
	}
	background, prefetch := enter(b, Background), enter(b, Prefetch)
	own := enter(a, Demand)
	if inside(background) || inside(prefetch) || inside(own) {
		t.Fatal("a kept place was given away, or one beyond a layer's share")
	}
	demand := enter(b, Demand)
	if !inside(demand) {
		t.Fatal("demand does not get the place that is kept for it")
	}
	g.leave(a)
	if !inside(own) || inside(prefetch) {
		t.Fatal("demand does not go first")
	}
	g.leave(a)
	if inside(prefetch) || inside(background) {
		t.Fatal("the last place is kept")
	}
	g.raise(background, Demand)
	if !inside(background) {
		t.Fatal("what somebody waits for now does not go first")
	}
	g.leave(a)
	g.leave(b)
	if !inside(prefetch) {
		t.Fatal("a place is lost")
	}
}

func inside(t *ticket) bool {
	select {
	case <-t.ready:
		return true
	default:
		return false
	}
}
