package cluster

import (
	"slices"
	"time"
)

// update takes in an announcement.
func (e *entry) update(now time.Time, p *page, m Member, a Announcement) {
	if a.Have > e.Have || !e.Active && a.Active {
		e.grew = now
	}
	if a.Active {
		if now.Sub(p.fetched) > max(stalledAfter, silentAfter*p.interval()) {
			p.begun, p.grew = now, now
		} else if e.Active && a.Have > e.Have {
			p.grew = now
		}
		p.fetched = now
	}
	e.Member, e.Announcement, e.heard = m, a, now
	e.interval = p.interval()
	if !a.Active {
		e.interval = HoldEvery
	}
	e.count(now, p)
	p.own(e)
}

// interval is the time between two announcements of one node.
func (p *page) interval() time.Duration {
	n := len(p.order) - p.complete
	return min(max(announceEvery, time.Duration(n)*time.Second/announceRate), maxInterval)
}

// count brings the page's sums up to date with what an entry says and whether it
// can be counted on.
func (e *entry) count(now time.Time, p *page) {
	silent := now.Sub(e.heard) > silentAfter*e.interval
	stalled := e.Active && !e.Complete() && now.Sub(e.grew) > max(stalledAfter, silentAfter*e.interval)
	e.lost = silent || stalled
	e.counted = !e.lost && !now.Before(e.doubted)
	var credit Bitmap
	whole := false
	if e.counted && !e.Leech {
		if whole = e.Complete(); !whole {
			credit = e.Held
		}
	}
	for s := range p.segs {
		switch was, is := e.credited.Has(s), credit.Has(s); {
		case is && !was:
			p.holders[s]++
		case was && !is:
			p.holders[s]--
		}
	}
	switch {
	case whole && !e.whole:
		p.complete++
	case e.whole && !whole:
		p.complete--
	}
	e.credited, e.whole = slices.Clone(credit), whole
}

// sweep looks after entries that have gone quiet, at most once a second.
func (p *page) sweep(now time.Time, b *Book) {
	if now.Sub(p.swept) < announceEvery {
		return
	}
	p.swept = now
	for _, e := range slices.Clone(p.order) {
		if now.Sub(e.heard) > forgottenAfter*e.interval {
			b.remove(p, e)
			continue
		}
		if e.count(now, p); e.lost {
			p.release(e)
		}
	}
	p.trim(b)
}

// trim keeps the number of mere holders within its bound.
func (p *page) trim(b *Book) {
	extra := p.complete - maxHolders
	for i := len(p.order) - 1; i >= 0 && extra > 0; i-- {
		if e := p.order[i]; e.whole && !e.Active && e.degree == 0 {
			b.remove(p, e)
			extra--
		}
	}
}

// remove ends a node's part in the sums, leases and neighbourhoods of a page.
func (p *page) remove(e *entry) {
	e.Held, e.Have, e.Active, e.Absent = nil, 0, false, true
	e.count(e.heard, p)
	p.release(e)
	for _, n := range e.near {
		n.degree--
	}
	last := len(p.order) - 1
	p.order[e.index] = p.order[last]
	p.order[e.index].index = e.index
	p.order = p.order[:last]
	delete(p.entries, e.ID)
	p.owners = slices.DeleteFunc(p.owners, func(o *entry) bool { return o == e })
}

// doubt notes that one node got nothing of what another claims to hold. One word
// is enough: it costs a segment that is fetched twice, and no more.
func (p *page) doubt(now time.Time, id, by string) {
	e := p.entries[id]
	if e == nil || id == by {
		return
	}
	e.doubted = now.Add(doubtedFor)
	e.count(now, p)
}

// own keeps the list of those who read through for others: of the nodes that
// fetch and can ask the registry the ones that rendezvous hashing names.
func (p *page) own(e *entry) {
	able := e.Active && e.Registry && !e.Leech && e.counted
	at := slices.Index(p.owners, e)
	switch {
	case at >= 0 && !able:
		p.owners = slices.Delete(p.owners, at, at+1)
	case at < 0 && able:
		p.owners = append(p.owners, e)
		slices.SortFunc(p.owners, func(a, b *entry) int {
			wa, wb := weight(a.Digest, -1, a.ID), weight(b.Digest, -1, b.ID)
			if wa > wb || wa == wb && a.ID > b.ID {
				return -1
			}
			return 1
		})
		if len(p.owners) > maxOwners {
			p.owners = p.owners[:maxOwners]
		}
	}
}
