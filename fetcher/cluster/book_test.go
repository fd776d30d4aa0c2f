package cluster

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

var addr = netip.MustParseAddrPort("192.0.2.1:6881")

// check computes all sums of a book anew and compares.
func check(t *testing.T, b *Book) {
	t.Helper()
	total, spent := 0, map[string]int{}
	for d, p := range b.pages {
		total += cost(p.segs)
		holders, complete, out := make([]uint16, p.segs), 0, 0
		degree := map[*entry]int{}
		for i, e := range p.order {
			if p.entries[e.ID] != e || e.index != i {
				t.Fatalf("%s: the entry of %s is not where it should be", d, e.ID)
			}
			spent[e.ID] += cost(p.segs)
			if e.whole {
				complete++
			}
			for s := range p.segs {
				if e.credited.Has(s) {
					holders[s]++
				}
			}
			if (e.whole || e.credited != nil) && (!e.counted || e.Leech) {
				t.Fatalf("%s: %s is counted and should not be", d, e.ID)
			}
			if len(e.near) > maxNeighbours {
				t.Fatalf("%s has %d neighbours", e.ID, len(e.near))
			}
			for _, n := range e.near {
				degree[n]++
			}
		}
		for _, e := range p.order {
			if degree[e] != e.degree || e.degree > maxDegree {
				t.Fatalf("%s: %s is named to %d, the book has %d", d, e.ID, degree[e], e.degree)
			}
		}
		each := map[*entry]int{}
		for s, ls := range p.leases {
			out += len(ls)
			for _, l := range ls {
				each[l.to]++
				if p.entries[l.to.ID] != l.to {
					t.Fatalf("%s: segment %d is lent to %s, which is not there", d, s, l.to.ID)
				}
			}
			if len(ls) == 0 {
				t.Fatalf("%s: an empty list of leases", d)
			}
		}
		if len(p.entries) != len(p.order) || !slices.Equal(holders, p.holders) || complete != p.complete || out != p.out {
			t.Fatalf("%s: %d entries, %d in order; %d complete, not %d; %d leases out, not %d; holders\n%v, not\n%v", d,
				len(p.entries), len(p.order), p.complete, complete, p.out, out, p.holders, holders)
		}
		if len(p.order) > maxEntries || len(p.owners) > maxOwners || len(p.took) > maxTook {
			t.Fatalf("%s: %d entries, %d owners", d, len(p.order), len(p.owners))
		}
		for _, o := range p.owners {
			if p.entries[o.ID] != o {
				t.Fatalf("%s: an owner that is not there", d)
			}
		}
	}
	if total != b.cost || total > maxCost {
		t.Fatalf("the pages cost %d, the book has %d", total, b.cost)
	}
	if len(spent) != len(b.spent) {
		t.Fatalf("%d members cost something, the book has %d", len(spent), len(b.spent))
	}
	for id, n := range spent {
		if b.spent[id] != n || n > maxCostPerMember {
			t.Fatalf("%s costs %d, the book has %d", id, n, b.spent[id])
		}
	}
}

// A book that was lost is there again after every node spoke once.
func TestClaimsRebuildABook(t *testing.T) {
	d := newDesk(t, 6)
	d.announces("a", d.announcement(part{held: []int{0}, claimed: []int{1}}), true)
	d.announces("b", d.announcement(part{held: []int{2}, claimed: []int{3, 4}}), true)
	d.pass(settleFor)
	if got := d.says("c", part{want: 3}).Granted; !slices.Equal(got, []int{5}) {
		t.Fatalf("lent %v", got)
	}
}

func TestLeechIsNamedToNobody(t *testing.T) {
	d := newDesk(t, 4)
	d.says("leech", part{held: []int{0, 1}, leech: true, want: 2})
	ans := d.says("a", part{want: 4})
	if len(ans.Peers) != 0 {
		t.Errorf("named: %v", ans.Peers)
	}
	if !slices.Contains(ans.Granted, 0) && !slices.Contains(ans.Granted, 1) {
		t.Errorf("what a leech holds is not lent to others: %v", ans.Granted)
	}
	if slices.ContainsFunc(ans.Owners, func(m Member) bool { return m.ID == "leech" }) {
		t.Error("a leech is to read for others")
	}
}

// What is said of a peer is what others need: where it is and what it holds.
func TestPeersAreSaidBriefly(t *testing.T) {
	d := newDesk(t, 4)
	d.says("a", part{held: []int{0}, claimed: []int{1}, want: 2, doubt: []string{"x"}})
	p := d.says("b", part{}).Peers[0]
	if p.ID != "a" || !p.Held.Has(0) || p.Want != 0 || p.Doubt != nil || p.Claimed != nil {
		t.Fatalf("%+v", p)
	}
}

func ids(said []Said) (all []string) {
	for _, s := range said {
		all = append(all, s.ID)
	}
	return all
}

// Neighbours stay, since connections hang on them, and are bounded both ways
// (check).
func TestNeighboursAreStable(t *testing.T) {
	for _, c := range []struct{ nodes, want int }{{20, 19}, {100, maxNeighbours}, {600, crowdNeighbours}} {
		d := newDesk(t, 4)
		first := map[string][]string{}
		for round := range 4 {
			for i := range c.nodes {
				id := fmt.Sprint("n", i)
				a := d.announcement(part{have: int64(round + 1)})
				first[id] = nil
				ans := d.book.Announce(d.now, d.member(id, ""), a, false)
				if round >= 2 {
					first[id] = ids(ans.Peers)
				}
			}
			d.pass(time.Second)
		}
		check(t, d.book)
		few := 0
		for id, was := range first {
			n := len(was)
			now := ids(d.book.Announce(d.now, d.member(id, ""), d.announcement(part{have: 10}), false).Peers)
			for _, p := range was {
				if !slices.Contains(now, p) {
					t.Fatalf("of %d: %s lost the neighbour %s, which is fine", c.nodes, id, p)
				}
			}
			if n < c.want {
				few++
			}
		}
		if few > c.nodes/10 {
			t.Errorf("of %d nodes %d have fewer than %d neighbours", c.nodes, few, c.want)
		}
	}
}

// The swarm is one: whoever has a piece, it gets to everybody.
func TestNeighboursConnectEverybody(t *testing.T) {
	d := newDesk(t, 4)
	const nodes = 2000
	for range 2 {
		for i := range nodes {
			d.book.Announce(d.now, d.member(fmt.Sprint("n", i), ""), d.announcement(part{}), false)
		}
		d.pass(time.Second)
	}
	edges := map[*entry][]*entry{}
	for _, e := range d.page().order {
		for _, n := range e.near {
			edges[e], edges[n] = append(edges[e], n), append(edges[n], e)
		}
	}
	reached := map[*entry]bool{d.page().order[0]: true}
	hops := 0
	for at := d.page().order[:1]; len(at) > 0; hops++ {
		var next []*entry
		for _, e := range at {
			for _, n := range edges[e] {
				if !reached[n] {
					reached[n] = true
					next = append(next, n)
				}
			}
		}
		at = next
	}
	if len(reached) != nodes || hops > 6 {
		t.Errorf("%d of %d nodes are reached in %d hops", len(reached), nodes, hops)
	}
}

// A zone gets the blob by a few connections, and passes it on within.
func TestZones(t *testing.T) {
	d := newDesk(t, 4)
	var last Reply
	for range 3 {
		for i := range 120 {
			last = d.book.Announce(d.now, d.member(fmt.Sprint("n", i), fmt.Sprint("zone", i%3)), d.announcement(part{}), false)
		}
		d.pass(time.Second)
	}
	check(t, d.book)
	home, away := 0, 0
	for _, p := range last.Peers {
		if p.Zone == "zone2" {
			home++
		} else {
			away++
		}
	}
	if away == 0 || away > awayNeighbours || home < maxNeighbours-awayNeighbours {
		t.Errorf("%d neighbours of the same zone and %d of others", home, away)
	}
}

// All nodes know the same owners, in the same order.
func TestOwners(t *testing.T) {
	d := newDesk(t, 4)
	for i := range 40 {
		d.says(fmt.Sprint("n", i), part{away: i%4 == 0})
	}
	owners := d.says("n1", part{}).Owners
	if len(owners) != maxOwners {
		t.Fatalf("%d owners", len(owners))
	}
	other := newDesk(t, 4) // who comes first does not matter
	for i := range 40 {
		other.says(fmt.Sprint("n", 39-i), part{away: (39-i)%4 == 0})
	}
	if !slices.Equal(owners, d.says("n2", part{}).Owners) || !slices.Equal(owners, other.says("n3", part{}).Owners) {
		t.Error("the owners differ")
	}
	gone := owners[0].ID
	d.says(gone, part{idle: true})
	if slices.ContainsFunc(d.says("n1", part{}).Owners, func(m Member) bool { return m.ID == gone }) {
		t.Error("a node that does not fetch any more is to read for others")
	}
}

// With more nodes each speaks less often: the keeper hears about as many a second.
func TestIntervals(t *testing.T) {
	d := newDesk(t, 4)
	var ans Reply
	for i := range 2000 {
		ans = d.book.Announce(d.now, d.member(fmt.Sprint("n", i), ""), d.announcement(part{}), false)
		if i == 0 && ans.Next != announceEvery {
			t.Errorf("alone: every %v", ans.Next)
		}
	}
	if ans.Next != 2000*time.Second/announceRate {
		t.Errorf("with 2000 nodes: every %v", ans.Next)
	}
}

func TestRetain(t *testing.T) {
	d := newDesk(t, 4)
	d.says("a", part{want: 2})
	d.says("b", part{})
	d.book.Retain(func(id string) bool { return id == "b" })
	check(t, d.book)
	if ans := d.says("b", part{}); len(ans.Peers) != 0 || ans.Nodes != 1 {
		t.Errorf("%+v", ans)
	}
	d.book.Retain(func(string) bool { return false })
	check(t, d.book)
	if d.book.Len() != 0 || len(d.book.spent) != 0 || d.book.cost != 0 {
		t.Errorf("%d blobs are left", d.book.Len())
	}
}

// One member fills its own share of the book, and no more.
func TestFloodByOneMember(t *testing.T) {
	b, now := NewBook(1), time.Unix(1e9, 0)
	m := Member{ID: "flood", Addr: addr}
	for i := range maxCostPerMember + 5000 {
		b.Announce(now, m, Announcement{Digest: digest.FromString(fmt.Sprint(i)), Size: 1, Active: true}, false)
	}
	check(t, b)
	if b.Len() > maxCostPerMember {
		t.Errorf("%d blobs", b.Len())
	}
	ans := b.Announce(now, Member{ID: "other", Addr: addr}, Announcement{Digest: digest.FromString("x"), Size: 1, Active: true, Registry: true, Want: 1}, false)
	if len(ans.Granted) != 1 {
		t.Errorf("another member is refused: %+v", ans)
	}
}

// A full book makes room for what is in use, and does not tear out that.
func TestEviction(t *testing.T) {
	b, now := NewBook(1), time.Unix(1e9, 0)
	for i := range maxCost {
		m := Member{ID: fmt.Sprint("m", i%8), Addr: addr}
		b.Announce(now, m, Announcement{Digest: digest.FromString(fmt.Sprint(i)), Size: 1, Have: 1}, false)
	}
	a := Announcement{Digest: digest.FromString("new"), Size: 1, Active: true, Registry: true, Want: 1}
	late := Member{ID: "late", Addr: addr}
	if ans := b.Announce(now, late, a, false); len(ans.Granted) != 0 || ans.Next != maxInterval {
		t.Errorf("everything is in use, and yet: %+v", ans)
	}
	now = now.Add(time.Minute)
	if ans := b.Announce(now, late, a, false); len(ans.Granted) != 1 {
		t.Errorf("nothing has been heard of for a minute, and yet: %+v", ans)
	}
	check(t, b)
}

func TestLargestBlob(t *testing.T) {
	d := newDesk(t, 1<<40/SegmentSize)
	begun := time.Now()
	for i := range 64 {
		d.book.Announce(d.now, d.member(fmt.Sprint("n", i), ""), d.announcement(part{want: 3, held: []int{i}}), false)
	}
	check(t, d.book)
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("64 announcements of a blob of 1 TiB took %v", took)
	}
	if d.book.spent["n0"] > maxCostPerMember/2 {
		t.Errorf("one blob of 1 TiB is %d of a member's share of %d", d.book.spent["n0"], maxCostPerMember)
	}
}

func TestEntriesAreBounded(t *testing.T) {
	d := newDesk(t, 1)
	a := d.announcement(part{})
	for i := range maxEntries + 100 {
		d.book.Announce(d.now, d.member(fmt.Sprint("n", i), ""), a, false)
	}
	check(t, d.book)
	if n := len(d.page().order); n != maxEntries {
		t.Errorf("%d entries", n)
	}
}

func TestHoldersAreBounded(t *testing.T) {
	d := newDesk(t, 4)
	for i := range 3 * maxHolders {
		d.book.Hold(d.now, d.member(fmt.Sprint("n", i), ""), []Hold{{d.dg, d.size}})
	}
	d.pass(2 * time.Second)
	if ans := d.says("a", part{}); ans.Complete > maxHolders {
		t.Errorf("%d complete holders are kept", ans.Complete)
	}
}

// Who lies about a blob's size first is corrected by who holds it.
func TestSizeLiar(t *testing.T) {
	d := newDesk(t, 4)
	d.book.Announce(d.now, d.member("liar", ""), Announcement{Digest: d.dg, Size: 7, Active: true}, false)
	if ans := d.says("a", part{want: 2}); len(ans.Granted) != 0 || ans.Next != maxInterval {
		t.Errorf("two sizes of one blob: %+v", ans)
	}
	d.book.Hold(d.now, d.member("seed", ""), []Hold{{d.dg, d.size}})
	check(t, d.book)
	if ans := d.says("a", part{want: 2}); len(ans.Peers) != 1 || ans.Peers[0].ID != "seed" {
		t.Errorf("%+v", ans)
	}
	d.book.Hold(d.now, d.member("liar", ""), []Hold{{d.dg, 7}})
	if d.page().size != d.size {
		t.Error("a holder of another size took the page over")
	}
}

// Whatever is announced in whatever order, the sums are right and the bounds hold.
func TestRandomAnnouncements(t *testing.T) {
	for seed := range uint64(30) {
		rng := rand.New(rand.NewPCG(seed, 0))
		b, now := NewBook(seed), time.Unix(1e9, 0)
		const segs = 12
		for range 400 {
			now = now.Add(time.Duration(rng.IntN(900)) * time.Millisecond)
			m := Member{ID: fmt.Sprint("n", rng.IntN(20)), Addr: addr, Zone: fmt.Sprint(rng.IntN(2))}
			a := Announcement{
				Digest: digest.FromString(fmt.Sprint(rng.IntN(3))), Size: segs * SegmentSize,
				Have: rng.Int64N(segs*SegmentSize + 1), Active: rng.IntN(4) > 0, Registry: rng.IntN(8) > 0,
				Leech: rng.IntN(8) == 0, Hungry: rng.IntN(4) == 0, Want: rng.IntN(9), Absent: rng.IntN(20) == 0,
				Held: Bitmap{byte(rng.Uint32()), byte(rng.Uint32())}, Claimed: Bitmap{byte(rng.Uint32() & rng.Uint32() & rng.Uint32())},
				Doubt: []string{fmt.Sprint("n", rng.IntN(20))},
			}
			if rng.IntN(6) == 0 {
				a.Have = a.Size
			}
			if err := a.validate(); err != nil {
				t.Fatal(err)
			}
			switch rng.IntN(20) {
			case 0:
				b.Hold(now, m, []Hold{{a.Digest, a.Size - int64(rng.IntN(2))}})
			case 1:
				dead := fmt.Sprint("n", rng.IntN(20))
				b.Retain(func(id string) bool { return id != dead })
			default:
				ans := b.Announce(now, m, a, rng.IntN(10) == 0)
				if err := ans.validate(a.Digest, a.Size); err != nil {
					t.Fatal(err)
				}
				if !slices.IsSorted(ans.Granted) || len(ans.Granted) > grantAlone {
					t.Fatalf("lent %v", ans.Granted)
				}
				for _, s := range ans.Granted {
					if a.Held.Has(s) {
						t.Fatalf("lent %d, which it holds", s)
					}
				}
			}
			check(t, b)
		}
	}
}
