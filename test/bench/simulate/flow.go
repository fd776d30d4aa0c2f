package main

import (
	"time"
)

const (
	// maxConns is how many connections the torrent library keeps for a torrent.
	maxConns = 50
	// fairness is how often what a step left unused is shared out again.
	fairness = 3
	// snubbed is how long a peer may send nothing of what it was asked for.
	snubbed = 3 * time.Second
	// have, request and chunk are the bytes of these messages of BEP 3, and what a request asks for.
	haveBytes, requestBytes, chunk = 9, 17, 128 << 10
)

// link is the receiving half of a connection.
type link struct {
	from  *node
	piece int32 // that is on its way; -1: none
	got   float64
	since time.Time // when it was asked for
	snub  bool
}

func connected(a, b *node) bool {
	for i := range a.links {
		if a.links[i].from == b {
			return true
		}
	}
	return false
}

// connect makes a connection unless one of both has enough of them.
func connect(a, b *node) {
	if a == b || b.dead || !b.joined || len(a.links) >= maxConns || len(b.links) >= maxConns || connected(a, b) {
		return
	}
	if (a.complete || a.liar) && (b.complete || b.liar) {
		return
	}
	for _, x := range [2][2]*node{{a, b}, {b, a}} {
		to, from := x[0], x[1]
		to.links = append(to.links, link{from: from, piece: -1})
		from.have.each(func(i int) { to.avail[i]++ })
		to.traffic += int64(2 * (len(from.have)*8 + handshaking))
	}
	a.w.mostConns = max(a.w.mostConns, len(a.links), len(b.links))
}

func disconnect(a, b *node) {
	for _, x := range [2][2]*node{{a, b}, {b, a}} {
		to, from := x[0], x[1]
		for i := range to.links {
			if to.links[i].from != from {
				continue
			}
			if p := to.links[i].piece; p >= 0 && !to.complete {
				to.free.add(int(p))
			}
			to.links[i] = to.links[len(to.links)-1]
			to.links = to.links[:len(to.links)-1]
			break
		}
		from.have.each(func(i int) {
			if to.avail[i]--; to.avail[i] == 0 && to.wanted.has(i) && to.free.has(i) {
				to.unwant(i)
			}
		})
	}
}

// pull lets an idle link take the next piece. See the window in node.fillWindow: it holds the rarest ones.
func (l *link) pull(to *node) bool {
	if l.snub {
		return false
	}
	i := common(to.free, l.from.have, to.w.rng.Uint32())
	if i < 0 {
		return false
	}
	to.free.drop(i)
	l.piece, l.got, l.since = int32(i), 0, to.w.now
	to.traffic += 2 * requestBytes * (to.w.piece / chunk) // asked here and heard there: the mean of both
	return true
}

// flow moves what goes over the links in one step: each sender's link is shared evenly by who asks it, each receiver's by
// those that send, and what some could not use is shared out again.
func (w *world) flow() {
	for i := range w.nodes {
		w.up[i], w.down[i] = w.link*step.Seconds(), w.link*step.Seconds()
	}
	w.upOrigin = w.origin * step.Seconds()
	for range fairness {
		w.count()
		origin := w.upOrigin / float64(max(w.originOuts, 1))
		for i := range w.nodes {
			w.upPart[i] = w.up[i] / float64(max(w.outs[i], 1))
			w.downPart[i] = w.down[i] / float64(max(w.ins[i], 1))
		}
		for _, n := range w.nodes {
			if w.ins[n.index] == 0 {
				continue
			}
			for i := range n.links {
				l := &n.links[i]
				if l.piece < 0 || l.from.liar {
					continue
				}
				moved := n.receive(l, min(w.upPart[l.from.index], w.downPart[n.index]))
				w.up[l.from.index] -= moved
				w.down[n.index] -= moved
			}
			for _, st := range n.streams {
				moved := n.stream(st, min(origin, w.downPart[n.index]))
				w.upOrigin -= moved
				w.fromOrigin += moved
				w.down[n.index] -= moved
			}
		}
	}
	for _, n := range w.nodes {
		n.closeStreams()
	}
}

// count lets idle links take up work and counts who sends and who receives.
func (w *world) count() {
	clear(w.outs)
	clear(w.ins)
	w.originOuts = 0
	for _, n := range w.nodes {
		if n.dead || n.complete || n.liar || !n.joined {
			continue
		}
		for i := range n.links {
			l := &n.links[i]
			if l.piece >= 0 && l.got == 0 && w.now.Sub(l.since) > snubbed {
				n.free.add(int(l.piece))
				l.piece, l.snub = -1, true
			}
			if (l.piece >= 0 || l.pull(n)) && !l.from.liar {
				w.outs[l.from.index]++
				w.ins[n.index]++
			}
		}
		for _, st := range n.streams {
			if st.piece < st.end {
				w.ins[n.index]++
				w.originOuts++
			}
		}
	}
}

// receive moves up to b bytes over a link.
func (n *node) receive(l *link, b float64) (moved float64) {
	for b > 0 && l.piece >= 0 {
		need := float64(n.w.piece) - l.got
		if b < need {
			l.got += b
			return moved + b
		}
		moved, b = moved+need, b-need
		n.w.arrivals = append(n.w.arrivals, arrival{n, int(l.piece), true})
		l.piece = -1
		l.pull(n)
	}
	return moved
}

// stream moves up to b bytes of a request to the registry.
func (n *node) stream(st *stream, b float64) (moved float64) {
	for b > 0 && st.piece < st.end {
		need := float64(n.w.piece) - st.got
		if b < need {
			st.got += b
			return moved + b
		}
		moved, b = moved+need, b-need
		n.w.arrivals = append(n.w.arrivals, arrival{n, st.piece, false})
		st.piece++
		st.got = 0
	}
	return moved
}

func (n *node) closeStreams() {
	kept := n.streams[:0]
	for _, st := range n.streams {
		if st.piece < st.end {
			kept = append(kept, st)
		}
	}
	n.streams = kept
}

// arrive makes what came in this step known to the neighbours.
func (w *world) arrive() {
	end := w.now.Add(step)
	for _, a := range w.arrivals {
		n := a.n
		if n.wanted.has(a.piece) {
			n.wanted.drop(a.piece)
			n.free.drop(a.piece)
			n.asked--
		}
		if n.dead || n.have.has(a.piece) {
			continue
		}
		n.have.add(a.piece)
		n.held++
		n.last = end
		if a.peer {
			n.lastPeer = end
		}
		n.traffic += int64(2 * haveBytes * len(n.links)) // told all, and was told as often
		for i := range n.links {
			n.links[i].from.avail[a.piece]++
		}
		if n.held == w.pieces {
			n.finish(end)
		}
	}
	w.arrivals = w.arrivals[:0]
}

// finish ends a node's fetch: it tells its keeper, and drops those that need nothing either.
func (n *node) finish(now time.Time) {
	n.complete, n.done = true, now
	clear(n.leases)
	n.streams = nil
	for i := len(n.links) - 1; i >= 0; i-- {
		n.links[i].piece = -1
		if from := n.links[i].from; from.complete || from.liar {
			disconnect(n, from)
		}
	}
	n.announceSoon()
}
