package cluster

import (
	"math/rand/v2"
	"slices"
	"time"
)

// answer tells a node what it needs to know.
func (p *page) answer(now time.Time, e *entry, granted []int, rng *rand.Rand) Reply {
	p.neighbours(now, e, rng)
	a := Reply{Digest: e.Digest, Granted: granted, Next: e.interval, Nodes: len(p.order), Complete: p.complete, Lent: p.lent}
	for _, n := range e.near {
		a.Peers = append(a.Peers, n.said())
	}
	slices.SortFunc(a.Peers, func(x, y Said) int { return compareIDs(x.ID, y.ID) })
	for _, o := range p.owners {
		a.Owners = append(a.Owners, o.Member)
	}
	return a
}

func (e *entry) said() Said {
	s := Said{Member: e.Member, Announcement: e.Announcement}
	s.Want, s.Doubt, s.Claimed = 0, nil, nil // of use to the keeper only
	return s
}

// neighbours brings a node's neighbours up to date. They stay the same as long as
// they are of use, since a connection hangs on each.
func (p *page) neighbours(now time.Time, e *entry, rng *rand.Rand) {
	seeds, away := 0, 0
	for id, n := range e.near {
		if p.entries[id] != n || !n.counted || n.Leech {
			delete(e.near, id)
			n.degree--
			continue
		}
		if n.whole {
			seeds++
		}
		if n.Zone != e.Zone {
			away++
		}
	}
	most := maxNeighbours
	if len(p.order) > crowd {
		most = crowdNeighbours
	}
	if len(e.near) >= most {
		return
	}
	var home, others []*entry
	consider := func(n *entry) {
		if n == e || !n.counted || n.Leech || e.near[n.ID] != nil || n.Have == 0 && !n.Active {
			return
		}
		if n.Zone == e.Zone {
			home = append(home, n)
		} else {
			others = append(others, n)
		}
	}
	if len(p.order) <= sample {
		for _, n := range p.order {
			consider(n)
		}
		rng.Shuffle(len(home), func(i, j int) { home[i], home[j] = home[j], home[i] })
		rng.Shuffle(len(others), func(i, j int) { others[i], others[j] = others[j], others[i] })
	} else {
		seen := map[*entry]bool{}
		for range sample {
			if n := p.order[rng.IntN(len(p.order))]; !seen[n] {
				seen[n] = true
				consider(n)
			}
		}
	}
	take := func(from []*entry, some int, useful func(*entry) bool) {
		for _, n := range from {
			if len(e.near) >= most || some <= 0 {
				return
			}
			if e.near[n.ID] == nil && n.degree < maxDegree && useful(n) {
				e.near[n.ID] = n
				n.degree++
				some--
			}
		}
	}
	whole := func(n *entry) bool { return n.whole }
	any := func(*entry) bool { return true }
	take(home, seedNeighbours-seeds, whole)
	if seeds == 0 && len(home) == 0 {
		take(others, seedNeighbours, whole)
	}
	take(others, awayNeighbours-away, any)
	take(home, maxNeighbours, any)
	if len(e.near) < awayNeighbours {
		take(others, awayNeighbours, any)
	}
}
