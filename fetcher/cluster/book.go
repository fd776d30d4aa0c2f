package cluster

import (
	"math/rand/v2"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// announceEvery is how often a node that fetches a blob tells its keeper how
	// far it is, when no more than announceRate a second result from that.
	announceEvery = time.Second
	// announceRate bounds the announcements of one blob that a keeper gets a
	// second: with more nodes at it, each speaks less often. At 200 a keeper
	// spends about a twentieth of a core on them.
	announceRate = 200
	// maxInterval bounds the time between two announcements of a fetch.
	maxInterval = time.Minute
	// HoldEvery is how often a node tells again which complete blobs it holds:
	// rare, since a keeper that is new is told at once, and a holder that is gone
	// is found out by whoever asks it.
	HoldEvery = 10 * time.Minute
	// silentAfter is how many announcements may be missing before a node is not
	// counted on any more.
	silentAfter = 3
	// forgottenAfter is the same for being forgotten.
	forgottenAfter = 6
	// stalledAfter is when a node whose fetch does not grow is not counted on.
	stalledAfter = 3 * time.Second
	// doubtedFor is how long a node that was found not to deliver what it claims
	// to hold is left out of account.
	doubtedFor = time.Minute

	// maxCost bounds what a keeper keeps, in pages of blobs of up to 256 MiB (1 KiB
	// each with two holders); larger ones cost more, see cost.
	maxCost = 1 << 16
	// maxCostPerMember bounds what one member can make it keep: a flood fills the
	// flooder's share only.
	maxCostPerMember = 1 << 14
	// maxEntries bounds the nodes of one blob that fetch it or hold part of it.
	maxEntries = 1 << 14
	// maxHolders bounds those that hold all of it; one more replaces another.
	maxHolders = 64
	// maxNeighbours is how many nodes are named to one that fetches: enough that
	// a swarm of ten thousand is well connected (its diameter is about 4), and
	// few enough for one message. As each is named to about as many, a node has
	// twice the connections, and BitTorrent libraries keep about 50.
	maxNeighbours = 24
	// crowdNeighbours is the same once there are crowd nodes: a keeper with a link
	// of 200 Mbit/s can then answer ten thousand that start at the same moment
	// before they give it up.
	crowdNeighbours, crowd = 16, 256
	// maxDegree bounds to how many a node is named: more than it is told of, so
	// that the last to come find some.
	maxDegree = 4 * maxNeighbours / 3
	// seedNeighbours of the neighbours hold everything, when there are any.
	seedNeighbours = 4
	// awayNeighbours of the neighbours are of other zones, when there are any: a
	// zone gets a blob by these, and passes it on within.
	awayNeighbours = 4
	// maxOwners is how many nodes share the demand reads that go through to the
	// registry: all nodes know the same ones, so that each piece is asked for once.
	maxOwners = 8
	// sample is how many entries are looked at to choose neighbours among.
	sample = 4 * maxNeighbours
)

// Book is what a keeper keeps: for each blob who fetches or holds it, and who
// was lent which of its segments to get from the registry. It does no input and
// output and knows no clock but the times it is given, which must not go back.
// It is not safe for concurrent use.
type Book struct {
	pages map[digest.Digest]*page
	cost  int            // of the pages
	spent map[string]int // cost of the entries, by member
	rng   *rand.Rand
}

// NewBook returns an empty book. The seed makes its choices repeatable.
func NewBook(seed uint64) *Book {
	return &Book{
		pages: map[digest.Digest]*page{},
		spent: map[string]int{},
		rng:   rand.New(rand.NewPCG(seed, 0)),
	}
}

// page is one blob of a book.
type page struct {
	size    int64
	segs    int
	entries map[string]*entry
	order   []*entry // the same, for picking at random
	touched time.Time
	swept   time.Time
	settle  time.Time // nothing is lent before

	holders  []uint16 // by segment: counted nodes that hold it, of those that do not hold all
	complete int      // counted nodes that hold everything
	leases   map[int][]*lease
	out      int // leases
	lent     int // segments lent so far, those lent again included
	took     []time.Duration
	owners   []*entry
	twice    Bitmap    // segments lent although somebody holds them; nil: none
	begun    time.Time // when the first of the nodes that fetch now came
	fetched  time.Time // when a node last said that it fetches
	grew     time.Time // when one last had more than before
}

// entry is one node's part in a blob.
type entry struct {
	Member
	Announcement
	index    int // in order
	heard    time.Time
	interval time.Duration
	grew     time.Time
	fetched  int // segments it was lent and has now
	doubted  time.Time
	counted  bool
	lost     bool   // silent or stalled: what it was lent is lent to others
	credited Bitmap // what it adds to holders; nil with whole set
	whole    bool   // it adds to complete
	near     map[string]*entry
	degree   int // of how many it is a neighbour
}

// Announce takes in what a node says of its part in a blob and answers with what
// it needs to know: who else is at it, and what it is to get from the registry.
// fresh tells that the keeper may not be the blob's first: nothing is lent until
// the others had a moment to say what they are fetching already.
func (b *Book) Announce(now time.Time, from Member, a Announcement, fresh bool) Reply {
	p := b.page(now, from.ID, a)
	if p == nil {
		return Reply{Digest: a.Digest, Next: maxInterval}
	}
	p.touched = now
	if fresh && len(p.order) == 0 {
		p.settle = now.Add(settleFor)
	}
	p.sweep(now, b)
	e := p.entries[from.ID]
	switch {
	case a.Absent:
		if e != nil {
			b.remove(p, e)
		}
		return Reply{Digest: a.Digest, Absent: true}
	case e == nil:
		if e = b.enter(now, p, from); e == nil {
			return Reply{Digest: a.Digest, Next: maxInterval}
		}
	}
	e.update(now, p, from, a)
	for _, id := range a.Doubt {
		p.doubt(now, id, from.ID)
	}
	p.reconcile(now, e)
	granted, anyway := p.grant(now, e), false
	if stuck := p.stuck(now); len(granted) == 0 && (a.Hungry || stuck) {
		granted, anyway = p.feed(now, e, stuck), true
	}
	if e.Active && p.lentTo(e) > 0 {
		// The few that fetch for all speak often, also in a crowd: their death
		// is noticed soon, and a new keeper hears at once what is out. (In the
		// simulation of ten thousand nodes of which a tenth dies, and the keeper,
		// there were 1.35 copies when they did not.)
		e.interval = announceEvery
	}
	ans := p.answer(now, e, granted, b.rng)
	ans.Anyway = anyway && len(granted) > 0
	return ans
}

// Hold notes blobs of which a member holds everything.
func (b *Book) Hold(now time.Time, from Member, holds []Hold) {
	for _, h := range holds {
		a := Announcement{Digest: h.Digest, Size: h.Size, Have: h.Size}
		p := b.page(now, from.ID, a)
		if p == nil {
			continue
		}
		e := p.entries[from.ID]
		if e == nil {
			if e = b.enter(now, p, from); e == nil {
				continue
			}
		}
		if e.Active {
			continue // what it says of its fetch is newer
		}
		e.update(now, p, from, a)
		e.interval = HoldEvery
	}
}

// Retain forgets every member that is not live.
func (b *Book) Retain(live func(id string) bool) {
	for d, p := range b.pages {
		for _, e := range slices.Clone(p.order) {
			if !live(e.ID) {
				b.remove(p, e)
			}
		}
		if len(p.order) == 0 {
			b.tear(d, p)
		}
	}
}

// Len returns the number of blobs in the book.
func (b *Book) Len() int { return len(b.pages) }

// Busy returns how long, by this book, nodes have been at a blob without a pause.
func (b *Book) Busy(now time.Time, d digest.Digest) time.Duration {
	p := b.pages[d]
	if p == nil || p.begun.IsZero() || now.Sub(p.fetched) > max(stalledAfter, silentAfter*p.interval()) {
		return 0
	}
	return now.Sub(p.begun)
}

// page returns a blob's page, new if need be; nil when it may have none, or the
// sizes disagree.
func (b *Book) page(now time.Time, member string, a Announcement) *page {
	p := b.pages[a.Digest]
	switch {
	case p != nil && p.size == a.Size:
		return p
	case p != nil && !a.Complete():
		return nil // whoever is wrong, its fetch ends with a wrong digest
	case p != nil && p.complete > 0:
		return nil
	case a.Absent:
		return nil
	}
	if p != nil { // somebody lied about the size first: who has it all knows
		b.tear(a.Digest, p)
	}
	n := Segments(a.Size)
	if b.spent[member]+cost(n) > maxCostPerMember {
		return nil
	}
	for b.cost+cost(n) > maxCost {
		if !b.evict(now) {
			return nil
		}
	}
	b.cost += cost(n)
	p = &page{
		size: a.Size, segs: n, entries: map[string]*entry{}, touched: now, swept: now,
		holders: make([]uint16, n), leases: map[int][]*lease{},
	}
	b.pages[a.Digest] = p
	return p
}

// evict makes room for a page: of some at random, the one not heard of for
// longest goes; none of them when all are in use.
func (b *Book) evict(now time.Time) bool {
	var oldest digest.Digest
	looked := 0
	for d, p := range b.pages { // in Go's random order
		if oldest == "" || p.touched.Before(b.pages[oldest].touched) {
			oldest = d
		}
		if looked++; looked >= 32 {
			break
		}
	}
	p := b.pages[oldest]
	if p == nil || now.Sub(p.touched) < announceEvery*silentAfter {
		return false
	}
	b.tear(oldest, p)
	return true
}

// tear takes a page out of the book.
func (b *Book) tear(d digest.Digest, p *page) {
	for _, e := range p.order {
		b.refund(p, e)
	}
	delete(b.pages, d)
	b.cost -= cost(p.segs)
}

// cost is what a blob of n segments counts: the page, and a few bytes for each
// segment and node.
func cost(n int) int { return 1 + n/64 }

// enter adds a node to a page; nil when the page or the node's share is full.
func (b *Book) enter(now time.Time, p *page, m Member) *entry {
	if len(p.order) >= maxEntries || b.spent[m.ID]+cost(p.segs) > maxCostPerMember {
		return nil
	}
	e := &entry{Member: m, index: len(p.order), heard: now, grew: now, near: map[string]*entry{}}
	p.entries[m.ID] = e
	p.order = append(p.order, e)
	b.spent[m.ID] += cost(p.segs)
	return e
}

// remove takes a node off a page.
func (b *Book) remove(p *page, e *entry) {
	p.remove(e)
	b.refund(p, e)
}

func (b *Book) refund(p *page, e *entry) {
	if b.spent[e.ID] -= cost(p.segs); b.spent[e.ID] <= 0 {
		delete(b.spent, e.ID)
	}
}
