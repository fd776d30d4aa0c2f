package open

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"net/netip"
)

// Both kinds of pieces cover the blob without gaps, and agree on who overlaps whom.
func TestLayout(t *testing.T) {
	for _, c := range []layout{
		{size: 1, sp: 256, mp: 512}, {size: 1000, sp: 256, mp: 512}, {size: 1024, sp: 256, mp: 256}, {size: 1000, sp: 256, mp: 100},
		{size: 1001, sp: 100, mp: 301}, {size: 999, sp: 1000, mp: 7},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			seen := make([]int, c.size)
			for i := range c.storePieces() {
				m := c.metaOf(i)
				for j := range c.metaPieces() {
					off, n := c.overlap(i, j)
					if (n > 0) != (j >= m.first && j <= m.last) {
						t.Errorf("store piece %d, metainfo piece %d: overlap %d, range %v", i, j, n, m)
					}
					if s := c.storeOf(j); (n > 0) != (i >= s.first && i <= s.last) {
						t.Errorf("metainfo piece %d, store piece %d: overlap %d, range %v", j, i, n, s)
					}
					for k := off; k < off+n; k++ {
						seen[k]++
					}
				}
			}
			for k, n := range seen {
				if n != 1 {
					t.Fatalf("byte %d is covered %d times", k, n)
				}
			}
		})
	}
}

// The table of a piece's states.
func TestPieceStates(t *testing.T) {
	l := layout{size: 1 << 20, sp: 256 << 10, mp: 512 << 10} // 4 store pieces in 2
	p := newPieces(l, nil)
	expect := func(what string, want ...pieceState) {
		t.Helper()
		if !slices.Equal(p.state, want) {
			t.Fatalf("%s: states %v, expected %v", what, p.state, want)
		}
	}
	check := func(j int) { p.state[j] = checked }
	expect("new", absent, absent)
	b := p.fill(0)
	expect("a chunk arrives", filling, absent)
	if p.fill(0) != b || p.used != 512<<10 {
		t.Error("another buffer for the same piece")
	}
	p.reset(0)
	expect("the hash is wrong", absent, absent)
	p.fill(0)
	check(0)
	if p.fill(0) != nil {
		t.Error("a buffer for what is checked")
	}
	if p.deliverable(0) {
		t.Error("deliverable though nobody wants it")
	}
	p.want(0)
	if !p.deliverable(0) || p.deliverable(2) {
		t.Error("what is checked and wanted is deliverable, and nothing else")
	}
	if c := p.have(0); len(c) != 0 || p.used == 0 {
		t.Errorf("half of it is held: changed %v, %d bytes of buffers", c, p.used)
	}
	expect("half is held", checked, absent)
	if c := p.have(1); !slices.Equal(c, []int{0}) || p.used != 0 || !p.trusted[0] {
		t.Errorf("all is held: changed %v, %d bytes of buffers", c, p.used)
	}
	expect("all is held", held, absent)
	if c := p.lost(1); !slices.Equal(c, []int{0}) || p.trusted[0] {
		t.Errorf("lost: changed %v", c)
	}
	expect("lost", absent, absent)
	p.fill(1)
	p.have(2)
	p.have(3)
	expect("it came another way", absent, held)
	if p.used != 0 || p.trusted[1] || p.missing != 1 {
		t.Errorf("%d bytes of buffers, trusted %v, %d missing", p.used, p.trusted[1], p.missing)
	}
	for _, i := range []int{-1, 4, 99} {
		if p.want(i) || p.unwant(i) || p.have(i) != nil || p.lost(i) != nil {
			t.Errorf("piece %d exists", i)
		}
	}
}

// The plan goes by the order of wishes, never asks for more than fits but for the first, and makes room.
func TestPlan(t *testing.T) {
	l := layout{size: 8 << 20, sp: 1 << 20, mp: 1 << 20}
	p := newPieces(l, nil)
	for _, i := range []int{5, 1, 7, 2} {
		p.want(i)
	}
	plan := func(budget int64) []int {
		now, _ := p.plan(budget)
		var all []int
		for j := range now {
			all = append(all, j)
		}
		slices.Sort(all)
		return all
	}
	for budget, want := range map[int64][]int{0: {5}, 1 << 20: {5}, 3<<20 - 1: {1, 5}, 3 << 20: {1, 5, 7}, 100 << 20: {1, 2, 5, 7}} {
		if got := plan(budget); !slices.Equal(got, want) {
			t.Errorf("budget %d: %v, expected %v", budget, got, want)
		}
	}
	p.fill(0) // what came along
	p.state[0] = checked
	if _, dropped := p.plan(5 << 20); len(dropped) != 0 || p.used == 0 {
		t.Errorf("there was room, dropped %v", dropped)
	}
	if _, dropped := p.plan(4 << 20); !slices.Equal(dropped, []int{0}) || p.used != 0 {
		t.Errorf("there was none, dropped %v, %d bytes", dropped, p.used)
	}
}

// Whatever chunks arrive, a buffer gives out all of a piece or nothing.
func FuzzBuffer(f *testing.F) {
	f.Add(int64(100<<10+7), uint64(1))
	f.Add(int64(1), uint64(2))
	f.Add(int64(16<<10), uint64(3))
	f.Fuzz(func(t *testing.T, size int64, seed uint64) {
		if size <= 0 || size > 1<<20 {
			t.Skip()
		}
		want := make([]byte, size)
		r := rand.New(rand.NewPCG(seed, 0))
		for i := range want {
			want[i] = byte(r.Uint32())
		}
		b := newBuffer(size)
		order := r.Perm(int((size + chunkSize - 1) / chunkSize))
		for k, c := range order {
			got := make([]byte, size)
			if n, err := b.read(got, 0); err == nil || n != 0 {
				t.Fatalf("%d bytes before all chunks were there", n)
			}
			off := int64(c) * chunkSize
			end := min(off+chunkSize, size)
			if _, err := b.write(want[off:end], off); err != nil {
				t.Fatal(err)
			}
			if _, err := b.write(want[off:end], off+1); err == nil {
				t.Fatal("a chunk was taken at an odd offset")
			}
			if b.full() != (k == len(order)-1) {
				t.Fatalf("full: %v after %d of %d", b.full(), k+1, len(order))
			}
		}
		got := make([]byte, size)
		if n, err := b.read(got, 0); err != nil || int64(n) != size || !slices.Equal(got, want) {
			t.Fatalf("%d bytes, %v", n, err)
		}
	})
}

// Dials are repeated with growing pauses, and given up; there is room for who answers.
func TestAddressBook(t *testing.T) {
	b := newAddressBook()
	a := netip.MustParseAddrPort("192.0.2.1:6881")
	if !b.add(a) || b.add(a) {
		t.Error("an address is new once")
	}
	now := time.Now()
	start, dials := now, 0
	for b.len() > 0 {
		due, next := b.due(now, nil, false)
		dials += len(due)
		if next.Before(now) || next.Sub(now) > lastRetry*5/4 {
			t.Fatalf("next %v", next.Sub(now))
		}
		now = next
		if dials > maxTries {
			t.Fatal("it is dialled for ever")
		}
	}
	if d := now.Sub(start); dials != maxTries || d < 10*time.Minute || d > time.Hour {
		t.Errorf("%d dials in %v", dials, d)
	}
	b.add(a)
	if due, _ := b.due(now, map[string]bool{a.String(): true}, false); len(due) != 0 {
		t.Error("a connected peer is dialled")
	}
	if due, _ := b.due(now.Add(firstRetry), nil, true); len(due) != 1 {
		t.Error("a complete node does not call once")
	}
	if due, _ := b.due(now.Add(time.Hour), nil, true); len(due) != 0 {
		t.Error("a complete node calls again")
	}
	for k := range 1000 {
		b.add(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(k >> 8), byte(k)}), 1))
	}
	if b.len() != maxPeers {
		t.Errorf("%d addresses kept", b.len())
	}
}
