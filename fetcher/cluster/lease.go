package cluster

import (
	"slices"
	"time"
)

const (
	// grantShared and grantAlone are how many segments are lent at a time: few
	// while others are at the blob, so that one that starts a moment later finds
	// work left; to a node that is alone twice that, and as many more with each segment it
	// has fetched, so that its requests grow to 32 MiB. (When they grew with each
	// announcement, the first of a crowd of 100 was lent 14 of 64 segments before
	// the second came, and all waited for it: 20.6 s instead of 15.9 in the simulation.)
	grantShared, grantAlone = 2, 8
	// maxLeases bounds what one node has out: two streams, the next for each,
	// and those of which the swarm brings the rest.
	maxLeases = 6
	// maxOut bounds what is out of one blob: with more nodes the registry would
	// serve hundreds of streams that are no faster together.
	maxOut = 64
	// maxFeeding is how many leases may be out when segments are lent that peers
	// have: while more are, the registry is busy and is not what is missing.
	maxFeeding = 4
	// settleFor is how long a keeper that took over listens before it lends.
	settleFor = 500 * time.Millisecond
	// standInEach and standInMost: see StandIn.
	standInEach, standInMost = 5 * time.Millisecond, 5 * time.Second
	// slowFactor and slowAfter say when a segment is lent once more to a node
	// that has nothing to do: at this many times what others took, and not before
	// that much time. A link of a tenth of the others' speed is found out by it.
	slowFactor = 3
	slowAfter  = 4 * time.Second
	// maxTook is how many of the last leases the usual time is taken from.
	maxTook = 32
)

// StandIn is how long nodes come to a keeper that is not the blob's first, while
// membership says that the first one lives, before it lends in its place. With few
// members that one is dead and it is not known yet. With thousands a crowd may be
// too much for it for some seconds, and two that lend are two copies; by the most
// of this time membership knows better.
func StandIn(members int) time.Duration {
	return min(time.Duration(members)*standInEach, standInMost)
}

// lease is a segment that a node was lent, to get it from the registry.
type lease struct {
	to    *entry
	since time.Time
}

// reconcile brings the leases of a node in line with what it says it fetches:
// those it has done or given up end, and what it fetches without a lease (it was
// lent by a keeper before this one) becomes one.
func (p *page) reconcile(now time.Time, e *entry) {
	if e.lost {
		p.release(e)
		return
	}
	for s, ls := range p.leases {
		for _, l := range ls {
			if l.to != e || e.Claimed.Has(s) {
				continue
			}
			if e.Held.Has(s) || e.Complete() {
				e.fetched++
				p.took = append(p.took, now.Sub(l.since))
				if len(p.took) > maxTook {
					p.took = p.took[1:]
				}
			}
			p.end(s, l)
		}
	}
	if !e.Active {
		return
	}
	for s := range p.segs {
		if e.Claimed.Has(s) && !e.Held.Has(s) && !slices.ContainsFunc(p.leases[s], func(l *lease) bool { return l.to == e }) {
			p.begin(now, s, e)
		}
	}
}

func (p *page) begin(now time.Time, s int, e *entry) {
	p.leases[s] = append(p.leases[s], &lease{to: e, since: now})
	p.out++
}

func (p *page) end(s int, l *lease) {
	ls := slices.DeleteFunc(slices.Clone(p.leases[s]), func(x *lease) bool { return x == l })
	if p.out--; len(ls) == 0 {
		delete(p.leases, s)
	} else {
		p.leases[s] = ls
	}
}

// release ends all leases of a node.
func (p *page) release(e *entry) {
	for s, ls := range p.leases {
		for _, l := range ls {
			if l.to == e {
				p.end(s, l)
				if p.twice.Has(s) && !e.Held.Has(s) {
					p.twice[s>>3] &^= 1 << (s & 7)
				}
			}
		}
	}
}

// grant lends segments to a node that asks for some, lowest first: a blob that
// comes in order can be unpacked while it comes.
func (p *page) grant(now time.Time, e *entry) []int {
	if e.Want <= 0 || !e.Active || !e.Registry || e.Complete() || now.Before(p.settle) || p.complete > 0 {
		return nil
	}
	have, others := p.lentTo(e), 0
	for _, n := range p.order {
		if n != e && n.Active && n.counted {
			if others++; others > 0 {
				break
			}
		}
	}
	most := min(grantShared, maxLeases-have, maxOut-p.out)
	if others == 0 {
		most = min(grantShared*(2+e.fetched), maxLeases+grantAlone) - have
		most = min(most, grantAlone, grantShared*(1+e.fetched))
	}
	most = min(most, e.Want)
	var got []int
	for s := 0; s < p.segs && len(got) < most; s++ {
		if p.holders[s] == 0 && p.leases[s] == nil && !e.Held.Has(s) {
			got = append(got, s)
		}
	}
	if len(got) == 0 && have == 0 && most > 0 {
		if s, ok := p.slowest(now, e); ok {
			got = append(got, s)
		}
	}
	for _, s := range got {
		p.begin(now, s, e)
	}
	if len(got) > 0 {
		e.grew = now // it has had nothing to grow by, maybe
		p.lent += len(got)
	}
	return got
}

// stuck reports whether nodes fetch and none of them has got anything for some
// time: then what others claim to hold is not worth much, whoever they are.
func (p *page) stuck(now time.Time) bool {
	return !p.grew.IsZero() && now.Sub(p.grew) > stalledAfter
}

// feed lends segments that others hold, but deliver too slowly, or not at all
// (stuck). Each is lent so only once, unless who was lent it goes away: a swarm on
// slow links, or any number of liars, costs one more copy and not many.
func (p *page) feed(now time.Time, e *entry, stuck bool) []int {
	if e.Want <= 0 || !e.Active || !e.Registry || now.Before(p.settle) {
		return nil
	}
	most := min(grantShared, e.Want, maxFeeding-p.out)
	if stuck {
		most = min(grantShared, e.Want, maxLeases-p.lentTo(e), maxOut-p.out)
	}
	if p.twice == nil {
		p.twice = NewBitmap(p.segs)
	}
	var got []int
	for s := 0; s < p.segs && len(got) < most; s++ {
		if !p.twice.Has(s) && !e.Held.Has(s) && p.leases[s] == nil {
			p.twice.Set(s)
			p.begin(now, s, e)
			got = append(got, s)
		}
	}
	if len(got) > 0 {
		e.grew = now
		p.lent += len(got)
	}
	return got
}

// lentTo counts the segments that a node has on loan.
func (p *page) lentTo(e *entry) (n int) {
	for _, ls := range p.leases {
		for _, l := range ls {
			if l.to == e {
				n++
			}
		}
	}
	return n
}

// slowest returns the segment that has been lent for longest, when that is much
// longer than usual and nobody else was lent it since.
func (p *page) slowest(now time.Time, e *entry) (int, bool) {
	limit := slowAfter
	if n := len(p.took); n > 0 {
		sorted := slices.Sorted(slices.Values(p.took))
		limit = max(limit, slowFactor*sorted[n/2])
	} else {
		limit *= 2
	}
	best, found := 0, false
	var since time.Time
	for s, ls := range p.leases {
		if len(ls) != 1 || ls[0].to == e || e.Held.Has(s) || p.holders[s] > 0 || now.Sub(ls[0].since) < limit {
			continue
		}
		if !found || ls[0].since.Before(since) || ls[0].since.Equal(since) && s < best {
			best, since, found = s, ls[0].since, true
		}
	}
	return best, found
}
