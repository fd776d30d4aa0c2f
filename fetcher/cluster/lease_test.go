package cluster

import (
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// desk is a book, its clock and nodes that announce one blob.
type desk struct {
	t    *testing.T
	book *Book
	now  time.Time
	dg   digest.Digest
	size int64
	lent map[int][]string // by segment, to whom
}

func newDesk(t *testing.T, segments int) *desk {
	return &desk{
		t: t, book: NewBook(1), now: time.Unix(1e9, 0), dg: digest.FromString("blob"),
		size: int64(segments) * SegmentSize, lent: map[int][]string{},
	}
}

func (d *desk) pass(t time.Duration) { d.now = d.now.Add(t) }

// part is what a node says, made shorter.
type part struct {
	held, claimed []int
	have          int64 // bytes; 0: the held segments
	want          int
	hungry, leech bool
	idle          bool // does not fetch
	away          bool // cannot reach the registry
	doubt         []string
}

func (d *desk) announcement(p part) Announcement {
	a := Announcement{
		Digest: d.dg, Size: d.size, Have: p.have, Active: !p.idle, Registry: !p.away, Want: p.want,
		Hungry: p.hungry, Leech: p.leech, Doubt: p.doubt,
		Held: NewBitmap(Segments(d.size)), Claimed: NewBitmap(Segments(d.size)),
	}
	for _, s := range p.held {
		a.Held.Set(s)
	}
	for _, s := range p.claimed {
		a.Claimed.Set(s)
	}
	if a.Have == 0 {
		a.Have = int64(len(p.held)) * SegmentSize
	}
	return a
}

func (d *desk) member(id, zone string) Member { return Member{ID: id, Addr: addr, Zone: zone} }

func (d *desk) says(id string, p part) Reply { return d.announces(id, d.announcement(p), false) }

func (d *desk) announces(id string, a Announcement, fresh bool) Reply {
	d.t.Helper()
	if err := a.validate(); err != nil {
		d.t.Fatal(err)
	}
	ans := d.book.Announce(d.now, d.member(id, ""), a, fresh)
	for _, s := range ans.Granted {
		d.lent[s] = append(d.lent[s], id)
	}
	check(d.t, d.book)
	return ans
}

func (d *desk) page() *page { return d.book.pages[d.dg] }

func TestEachSegmentIsLentOnce(t *testing.T) {
	d := newDesk(t, 20)
	claimed := map[string][]int{}
	for range 4 {
		for i := range 5 {
			id := fmt.Sprint("n", i)
			ans := d.says(id, part{want: 3, claimed: claimed[id]})
			claimed[id] = append(claimed[id], ans.Granted...)
		}
		d.pass(200 * time.Millisecond)
	}
	if len(d.lent) != 20 {
		t.Errorf("%d of 20 segments are lent", len(d.lent))
	}
	for s, to := range d.lent {
		if len(to) != 1 {
			t.Errorf("segment %d was lent to %v", s, to)
		}
	}
}

func TestLeasesAreBounded(t *testing.T) {
	d := newDesk(t, 500)
	claimed := map[string][]int{}
	for range 5 {
		for i := range 60 {
			id := fmt.Sprint("n", i)
			claimed[id] = append(claimed[id], d.says(id, part{want: 8, claimed: claimed[id]}).Granted...)
			if len(claimed[id]) > maxLeases {
				t.Fatalf("%s has %d leases", id, len(claimed[id]))
			}
		}
	}
	if out := d.page().out; out != maxOut {
		t.Errorf("%d segments are out, at most %d should be", out, maxOut)
	}
}

// A node that is alone gets more with each segment that it has fetched, so that its
// requests can be large, but not before: others may come in a moment.
func TestAloneGetsMore(t *testing.T) {
	d := newDesk(t, 100)
	var claimed, held []int
	for range 5 {
		claimed = append(claimed, d.says("alone", part{want: 8, claimed: claimed}).Granted...)
	}
	if len(claimed) != 2*grantShared {
		t.Errorf("lent %v at first", claimed)
	}
	for i := range 10 {
		d.pass(100 * time.Millisecond)
		held, claimed = append(held, claimed[0]), claimed[1:]
		got := d.says("alone", part{want: 8, held: held, claimed: claimed}).Granted
		if claimed = append(claimed, got...); len(claimed) != min(grantShared*(3+i), maxLeases+grantAlone) && len(got) != grantAlone {
			t.Errorf("with %d segments fetched it has %d on loan", len(held), len(claimed))
		}
	}
	if n := len(d.says("second", part{want: 8}).Granted); n != grantShared {
		t.Errorf("with two nodes %d segments were lent", n)
	}
}

// What was lent to a node comes back when it is gone, in each of the ways to go.
func TestLeaseComesBack(t *testing.T) {
	for _, c := range []struct {
		name string
		then func(d *desk)
	}{
		{"silent", func(d *desk) { d.pass(silentAfter*announceEvery + time.Millisecond) }},
		{"stalled", func(d *desk) {
			for range 5 {
				d.pass(time.Second)
				d.says("a", part{claimed: []int{0, 1}})
			}
		}},
		{"gives up", func(d *desk) { d.says("a", part{}) }},
		{"says good-bye", func(d *desk) {
			d.announces("a", Announcement{Digest: d.dg, Size: d.size, Absent: true}, false)
		}},
		{"not a member", func(d *desk) { d.book.Retain(func(id string) bool { return id != "a" }) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDesk(t, 2)
			d.says("b", part{})
			if n := len(d.says("a", part{want: 2}).Granted); n != 2 {
				t.Fatalf("%d segments lent", n)
			}
			if n := len(d.says("b", part{want: 2}).Granted); n != 0 {
				t.Fatalf("%d segments lent twice", n)
			}
			c.then(d)
			d.says("b", part{}) // may be what makes the keeper look
			if got := d.says("b", part{want: 2}).Granted; len(got) != 2 {
				t.Errorf("lent again: %v", got)
			}
		})
	}
}

// A slow node's segment is lent to one more node that has nothing else to do.
func TestSlowLeaseIsLentAgain(t *testing.T) {
	d := newDesk(t, 2)
	d.says("fast", part{})
	d.says("slow", part{want: 1})
	d.says("fast", part{want: 1})
	have := int64(0)
	grow := func() { // a little of its segment came
		have += 1000
		d.says("slow", part{claimed: []int{0}, have: have})
	}
	d.pass(500 * time.Millisecond)
	if n := len(d.says("fast", part{held: []int{1}, want: 1}).Granted); n != 0 {
		t.Fatal("a segment that is out was lent at once")
	}
	for range 3 {
		d.pass(time.Second)
		grow()
		if n := len(d.says("fast", part{held: []int{1}, want: 1}).Granted); n != 0 {
			t.Fatalf("lent again before %v", slowAfter)
		}
	}
	d.pass(time.Second)
	grow()
	if got := d.says("fast", part{held: []int{1}, want: 1}).Granted; len(got) != 1 || got[0] != 0 {
		t.Fatalf("lent %v, want the slow node's", got)
	}
	if got := d.says("third", part{held: []int{1}, want: 1}).Granted; len(got) != 0 {
		t.Fatalf("a third copy: %v", got)
	}
}

// A keeper that may not be the first listens before it lends, and counts what
// the nodes say that they fetch already.
func TestNewKeeperSettles(t *testing.T) {
	d := newDesk(t, 4)
	if ans := d.announces("a", d.announcement(part{want: 2}), true); len(ans.Granted) != 0 {
		t.Fatalf("lent %v at once", ans.Granted)
	}
	d.says("b", part{claimed: []int{0, 2}, held: []int{1}})
	d.pass(settleFor)
	if got := d.says("a", part{want: 2}).Granted; len(got) != 1 || got[0] != 3 {
		t.Fatalf("lent %v, want 3 alone", got)
	}
}

func TestCompleteHolderStopsLeases(t *testing.T) {
	d := newDesk(t, 4)
	d.book.Hold(d.now, d.member("seed", ""), []Hold{{d.dg, d.size}})
	if ans := d.says("a", part{want: 2}); len(ans.Granted) != 0 || ans.Complete != 1 || len(ans.Peers) != 1 {
		t.Fatalf("%+v", ans)
	}
	// When it is found not to deliver, it does not count.
	if ans := d.says("a", part{want: 2, doubt: []string{"seed"}}); len(ans.Granted) != 2 || ans.Complete != 0 || len(ans.Peers) != 0 {
		t.Fatalf("%+v", ans)
	}
	if ans := d.says("seed", part{want: 2, doubt: []string{"seed"}}); len(ans.Granted) > 0 && len(d.lent[ans.Granted[0]]) > 1 {
		t.Fatalf("one that doubts itself: %+v", ans)
	}
}

// Doubt passes, so that a node that was cut off for a moment is of use again.
func TestDoubtPasses(t *testing.T) {
	d := newDesk(t, 4)
	d.book.Hold(d.now, d.member("seed", ""), []Hold{{d.dg, d.size}})
	d.says("a", part{doubt: []string{"seed", "nobody"}})
	for range int(doubtedFor/time.Second) + 1 {
		d.pass(time.Second)
		d.says("a", part{})
	}
	if ans := d.says("a", part{}); ans.Complete != 1 {
		t.Fatalf("%+v", ans)
	}
}

// Whoever delivers too slowly is helped out by the registry, once for each segment
// and only while that has nothing better to do.
func TestHungry(t *testing.T) {
	d := newDesk(t, 8)
	d.book.Hold(d.now, d.member("seed", ""), []Hold{{d.dg, d.size}})
	var claimed []int
	for range 10 {
		ans := d.says("a", part{want: 3, hungry: true, claimed: claimed})
		if len(ans.Granted) > 0 && !ans.Anyway {
			t.Fatal("lent what peers have, and does not say so")
		}
		claimed = append(claimed, ans.Granted...)
	}
	if len(claimed) != maxFeeding {
		t.Fatalf("%d leases of what peers have are out, want %d", len(claimed), maxFeeding)
	}
	held := claimed
	for range 10 {
		d.pass(100 * time.Millisecond)
		ans := d.says("a", part{want: 3, hungry: true, held: held})
		held = append(held, ans.Granted...)
	}
	for range 10 {
		d.says("b", part{want: 3, hungry: true})
	}
	if len(d.lent) != 8 {
		t.Errorf("%d of 8 segments were lent", len(d.lent))
	}
	for s, to := range d.lent {
		if len(to) != 1 {
			t.Errorf("segment %d was lent to %v", s, to)
		}
	}
}

// Any number of liars that claim to hold everything keep nobody from the blob,
// without a word of doubt and without many copies.
func TestLiarsDoNotStopIt(t *testing.T) {
	d := newDesk(t, 8)
	for i := range 50 {
		d.book.Hold(d.now, d.member(fmt.Sprint("liar", i), ""), []Hold{{d.dg, d.size}})
	}
	claimed := map[string][]int{}
	for i := range 20 {
		for _, id := range []string{"a", "b"} {
			ans := d.says(id, part{want: 3, claimed: claimed[id]})
			if len(ans.Granted) > 0 && (i < 3 || !ans.Anyway) {
				t.Fatalf("after %d s %s was lent %v, anyway %v", i, id, ans.Granted, ans.Anyway)
			}
			claimed[id] = append(claimed[id], ans.Granted...)
		}
		d.pass(time.Second)
	}
	if len(d.lent) != 8 {
		t.Errorf("%d of 8 segments were lent", len(d.lent))
	}
	for id := range claimed {
		if d.page().entries[id] == nil {
			t.Errorf("%s is not on the list", id)
		}
	}
}

// While a swarm grows nothing is lent that somebody holds.
func TestGrowingSwarmIsLeftAlone(t *testing.T) {
	d := newDesk(t, 8)
	d.book.Hold(d.now, d.member("seed", ""), []Hold{{d.dg, d.size}})
	for i := range 20 {
		d.says("a", part{want: 3, have: int64(i + 1)})
		d.says("b", part{want: 3})
		d.pass(time.Second)
	}
	if len(d.lent) != 0 {
		t.Errorf("lent: %v", d.lent)
	}
}

// Who was lent something speaks every second, also in a crowd.
func TestLeaseholdersSpeakOften(t *testing.T) {
	d := newDesk(t, 4)
	for i := range 1000 {
		d.book.Announce(d.now, d.member(fmt.Sprint("n", i), ""), d.announcement(part{}), false)
	}
	ans := d.says("n1", part{want: 1})
	if len(ans.Granted) != 1 || ans.Next != announceEvery {
		t.Errorf("lent %v, next in %v", ans.Granted, ans.Next)
	}
	if ans = d.says("n1", part{held: ans.Granted}); ans.Next != 1000*time.Second/announceRate {
		t.Errorf("with nothing on loan: next in %v", ans.Next)
	}
}

func TestWhoIsLentNothing(t *testing.T) {
	for name, p := range map[string]part{
		"no registry":     {want: 2, away: true},
		"does not fetch":  {want: 2, idle: true},
		"wants none":      {},
		"has all of them": {want: 2, held: []int{0, 1, 2, 3}, have: 1},
	} {
		d := newDesk(t, 4)
		if got := d.says("a", p).Granted; len(got) != 0 {
			t.Errorf("%s: lent %v", name, got)
		}
	}
}
