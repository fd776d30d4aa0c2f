package main

import (
	"encoding/json"
	"net/netip"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

const (
	// roundTrip is between any two nodes.
	roundTrip = time.Millisecond
	// callTimeout is how long a node waits for its keeper.
	callTimeout = 2 * time.Second
	// suspectFor is how long it then asks another one.
	suspectFor = 10 * time.Second
	// youngFor is how long a change among the members makes a keeper careful.
	youngFor = 10 * time.Second
	// serving is what an announcement costs its keeper: a TLS handshake with two certificates and two messages of JSON are half a
	// millisecond of CPU; a node has four cores.
	serving = 125 * time.Microsecond
	// framing is what HTTP, TLS and TCP add to a message and its answer, handshaking what a new connection costs, in bytes.
	framing, handshaking = 700, 3500
	// idle is how long a connection between two announcements is kept.
	idle = time.Minute
)

// keeper is a member that was asked to keep the blob's list.
type keeper struct {
	n     *node
	book  *cluster.Book
	queue []*call
	free  time.Time // when it has answered everything so far
	bytes []float64 // by second
	open  map[*node]time.Time
}

// call is one announcement on its way.
type call struct {
	from    *node
	a       cluster.Announcement
	insist  bool
	came    time.Time // at the keeper
	ready   time.Time // when the answer is back; zero: not yet
	expires time.Time
	answer  cluster.Reply
	rest    []cluster.Member // whom to ask after this one
	tries   int
	target  string
}

func (w *world) keeper(id string) *keeper {
	k := w.keepers[id]
	if k == nil {
		k = &keeper{n: w.byID[id], book: cluster.NewBook(w.seed), open: map[*node]time.Time{}}
		w.keepers[id] = k
	}
	return k
}

// announce sends a call to the first of its candidates that is not suspect. See cluster.Cluster.Announce.
func (n *node) announce() {
	now := n.w.now
	n.pace.Asked = now
	a := n.announcement()
	n.send(&call{from: n, a: a, rest: n.w.ranking})
}

// triesMost bounds how many candidates one announcement tries.
const triesMost = 6

func (n *node) send(c *call) {
	w := n.w
	for n.call = nil; len(c.rest) > 0 && c.tries < triesMost; {
		target := c.rest[0].ID
		c.rest = c.rest[1:]
		c.tries++
		if target == n.ID {
			n.heard(w.keeper(target).keep(w, c), c.a.Want)
			return
		}
		if w.now.Sub(n.suspects[target]) < suspectFor && len(c.rest) > 0 {
			c.insist = true
			continue
		}
		c.target, c.expires, c.ready = target, w.now.Add(callTimeout), time.Time{}
		c.came = w.now.Add(roundTrip)
		n.call = c
		if !w.byID[target].dead {
			k := w.keeper(target)
			k.queue = append(k.queue, c)
		}
		return
	}
}

// expect takes in the answer to the call under way, or gives it up.
func (n *node) expect() {
	c := n.call
	switch {
	case c == nil:
	case !c.ready.IsZero() && !n.w.now.Before(c.ready) && c.ready.Before(c.expires):
		n.call = nil
		if k := c.answer.Elsewhere; k != nil && !c.insist {
			c.rest, c.insist = append([]cluster.Member{*k}, c.rest...), true
			n.send(c)
			return
		}
		n.heard(c.answer, c.a.Want)
	case !n.w.now.Before(c.expires):
		n.suspects[c.target] = n.w.now
		again := *c // the keeper may still answer the old one
		again.insist = true
		n.send(&again)
	}
}

// serve lets the keepers answer what they can in this step.
func (w *world) serve() {
	for _, k := range w.keepers {
		if k.n.dead {
			continue
		}
		end := w.now.Add(step)
		if k.free.Before(w.now) {
			k.free = w.now
		}
		served := 0
		for _, c := range k.queue {
			if !k.free.Before(end) {
				break
			}
			served++
			if k.free.Before(c.came) {
				k.free = c.came
			}
			k.answerTo(w, c)
		}
		waiting := 0
		for _, c := range k.queue {
			if _, kept := k.open[c.from]; !kept {
				waiting++
			}
		}
		w.mostCalls = max(w.mostCalls, waiting+len(k.open))
		k.queue = k.queue[served:]
	}
}

func (k *keeper) answerTo(w *world, c *call) {
	if best := w.ranking[0]; best.ID != k.n.ID && best.ID != c.from.ID && !c.insist && w.now.Sub(k.n.suspects[best.ID]) >= suspectFor {
		c.answer = cluster.Reply{Digest: c.a.Digest, Elsewhere: &best}
	} else {
		c.answer = k.keep(w, c)
	}
	sent, received := w.sizes.of(c)
	size := sent + received + framing
	if kept, ok := k.open[c.from]; !ok || k.free.Sub(kept) > idle {
		size += handshaking
	}
	k.open[c.from] = k.free
	if c.answer.Next > cluster.KeptOpen {
		delete(k.open, c.from)
	}
	c.from.traffic += int64(size)
	k.n.traffic += int64(size)
	for second := int(k.free.Sub(w.begun) / time.Second); second >= len(k.bytes); {
		k.bytes = append(k.bytes, 0)
	}
	k.bytes[int(k.free.Sub(w.begun)/time.Second)] += float64(size)
	took := max(serving, time.Duration(float64(received+framing/2)/w.link*float64(time.Second)))
	k.free = k.free.Add(took)
	c.ready = k.free.Add(roundTrip)
}

// keep is what cluster.Cluster does with an announcement to itself.
func (k *keeper) keep(w *world, c *call) cluster.Reply {
	fresh := c.a.Claimed.Count() > 0 || c.insist || !w.changed.IsZero() && w.now.Sub(w.changed) < youngFor && c.a.Have > 0
	a := c.a
	if w.ranking[0].ID != k.n.ID && k.book.Busy(w.now, w.digest) < cluster.StandIn(len(w.live)) {
		a.Want, a.Hungry = 0, false // the one that lends lives, as far as is known
	}
	return k.book.Announce(w.now, c.from.Member, a, fresh)
}

// peak is the most bytes of announcements in a second.
func (k *keeper) peak() (most float64) {
	for _, b := range k.bytes {
		most = max(most, b)
	}
	return most
}

// sizes are those of the messages: of some, and of the others by what they hold.
type sizes struct {
	seen     int
	replies  map[int]int
	requests int
}

// sampled is of how many messages one is written out.
const sampled = 16

func (s *sizes) of(c *call) (sent, received int) {
	if s.replies == nil {
		s.replies = map[int]int{}
	}
	form := len(c.answer.Peers)<<8 + len(c.answer.Owners)
	if s.seen++; s.requests == 0 || s.seen%sampled == 0 {
		b, _ := json.Marshal(struct {
			Port         uint16
			Addr         netip.AddrPort
			Reach        bool
			Announcement cluster.Announcement
		}{c.from.Addr.Port(), c.from.Addr, true, c.a})
		s.requests = len(b)
	}
	if s.replies[form] == 0 || s.seen%sampled == 0 {
		b, _ := json.Marshal(c.answer)
		s.replies[form] = len(b)
	}
	return s.requests, s.replies[form]
}
