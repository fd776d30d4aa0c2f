package main

import (
	"maps"
	"math/bits"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

// What a fetch does by, see package fetcher.
const (
	streamsPerBlob = 2
	runAlone       = 8
	wantShared     = streamsPerBlob + 1
	wantAlone      = 2 * runAlone
	stalledAfter   = 3 * time.Second
	distrustPeers  = 10 * time.Second
	keeperSilent   = 2 * time.Second
	hungryBelow    = 4 << 20
	hungryOver     = 3 * time.Second
	window         = 16 << 20
	maxDoubts      = 8
)

// node is a member that fetches the blob.
type node struct {
	cluster.Member
	w        *world
	index    int32
	at       time.Time // when it starts
	joined   bool
	complete bool
	done     time.Time
	dead     bool
	liar     bool
	traffic  int64 // control bytes, both ways

	have    set
	held    int
	wanted  set // asked of the swarm
	asked   int // how many those are
	free    set // those of them that no peer is sending
	avail   []uint8
	links   []link
	streams []*stream

	pace     cluster.Pace
	call     *call
	again    bool // announce once more when the call is over
	answered time.Time
	known    int // nodes at the blob, by the keeper
	owners   []cluster.Member
	leases   map[int]bool // with what Reply.Anyway said
	parts    map[string]cluster.Said
	doubts   map[string]time.Time
	suspects map[string]time.Time
	last     time.Time // a piece came
	lastPeer time.Time // from a peer
	eatenAt  time.Time
	eaten    int
	slow     bool
}

// stream is a request to the registry under way.
type stream struct {
	segs  []int
	piece int // the next one
	end   int
	got   float64 // bytes of it
}

const perSegment = cluster.SegmentSize / pieceSize

func (n *node) segmentHeld(s int) bool {
	for i := s * perSegment; i < min((s+1)*perSegment, n.w.pieces); i++ {
		if !n.have.has(i) {
			return false
		}
	}
	return true
}

func (n *node) claims(s int) bool {
	for _, st := range n.streams {
		if slices.Contains(st.segs, s) {
			return true
		}
	}
	return false
}

// act is one look of the scheduler, see download.step.
func (n *node) act() {
	w := n.w
	if n.dead || w.now.Before(n.at) {
		return
	}
	if !n.joined {
		n.joined, n.last, n.lastPeer = true, w.now, w.now
		n.announce()
	}
	n.expect()
	if n.call == nil && n.again {
		n.again = false
		n.announce()
	}
	if n.complete || n.liar || n.answered.IsZero() && n.call != nil {
		return // a fetch begins with the keeper's answer, or without one
	}
	now := w.now
	for len(n.streams) < streamsPerBlob {
		run := n.nextRun(now)
		if len(run) == 0 || !n.open(run, now) {
			break
		}
		n.announceSoon()
	}
	if n.call == nil && n.pace.Due(now, n.wants(now)) {
		n.announceSoon()
	}
	n.fillWindow()
}

func (n *node) announceSoon() {
	n.pace.Asked = n.w.now
	if n.call != nil {
		n.again = true
		return
	}
	n.announce()
}

func (n *node) alone() bool { return len(n.w.live) == 1 && n.known <= 1 }

func (n *node) wants(now time.Time) int {
	if n.complete || n.liar {
		return 0
	}
	most := wantShared
	if n.known <= 1 {
		most = wantAlone
	}
	stalled := n.swarmStalled(now)
	for s, anyway := range n.leases {
		if n.segmentHeld(s) {
			delete(n.leases, s)
		} else if n.claims(s) || n.anyToAsk(s, anyway || stalled) {
			most--
		}
	}
	return max(most, 0)
}

func (n *node) toAsk(i int, anyway bool) bool {
	return !n.have.has(i) && (anyway || n.avail[i] == 0)
}

func (n *node) anyToAsk(s int, anyway bool) bool {
	for i := s * perSegment; i < min((s+1)*perSegment, n.w.pieces); i++ {
		if n.toAsk(i, anyway) {
			return true
		}
	}
	return false
}

// nextRun returns the next segments to ask the registry for.
func (n *node) nextRun(now time.Time) (run []int) {
	alone := n.alone()
	distrust := n.swarmStalled(now)
	idle := now.Sub(n.last)
	if n.answered.IsZero() {
		idle = max(idle, now.Sub(n.at)-keeperSilent+stalledAfter)
	}
	if len(n.leases) == 0 && !alone && idle < stalledAfter {
		return nil
	}
	most := 1
	if alone || n.known <= 1 {
		most = min(max(len(n.leases)/streamsPerBlob, 1), runAlone)
	}
	for s := range n.w.segs {
		anyway, lent := n.leases[s]
		mine := lent || alone || idle >= stalledAfter && cluster.InTurn(n.w.digest, s, n.ID, n.owners, len(n.w.live), idle)
		if mine && !n.claims(s) && !n.segmentHeld(s) && n.anyToAsk(s, anyway || alone || distrust) {
			run = append(run, s)
		}
		if len(run) == most || len(run) > 0 && run[len(run)-1] != s {
			break
		}
	}
	return run
}

// open begins a request for the first row of pieces that nobody near has.
func (n *node) open(run []int, now time.Time) bool {
	alone := n.alone()
	first, end := run[0]*perSegment, min((run[len(run)-1]+1)*perSegment, n.w.pieces)
	distrust := n.swarmStalled(now) || n.leases[run[0]]
	for first < end && !n.toAsk(first, alone || distrust) {
		first++
	}
	last := first
	for last < end && n.toAsk(last, alone || distrust) {
		last++
	}
	if first == last {
		return false
	}
	for i := run[0] * perSegment; i < end; i++ { // not asked of the swarm any more
		if n.wanted.has(i) && n.free.has(i) {
			n.unwant(i)
		}
	}
	n.streams = append(n.streams, &stream{segs: run, piece: first, end: last})
	return true
}

func (n *node) unwant(i int) {
	n.wanted.drop(i)
	n.free.drop(i)
	n.asked--
}

func (n *node) swarmStalled(now time.Time) bool {
	if n.asked == 0 {
		return false
	}
	quiet := now.Sub(n.lastPeer)
	if quiet > stalledAfter+distrustPeers {
		n.lastPeer = now
		return false
	}
	return quiet > stalledAfter
}

func (n *node) hungry(now time.Time) bool {
	if passed := now.Sub(n.eatenAt); passed >= hungryOver {
		n.slow = n.asked > 0 && !n.eatenAt.IsZero() && passed < 2*hungryOver &&
			float64(n.held-n.eaten)*float64(n.w.piece) < hungryBelow*passed.Seconds()
		n.eatenAt, n.eaten = now, n.held
	}
	return n.slow
}

func (n *node) announcement() cluster.Announcement {
	w := n.w
	a := cluster.Announcement{Digest: w.digest, Size: w.bytes, Have: min(int64(n.held)*w.piece, w.bytes), Registry: true}
	if n.liar || n.complete {
		a.Have = w.bytes
		return a
	}
	a.Have = min(a.Have, w.bytes-1)
	a.Active = true
	if n.swarmStalled(w.now) {
		n.doubt()
	}
	a.Want = n.wants(w.now)
	a.Hungry = a.Want > 0 && n.hungry(w.now)
	a.Held, a.Claimed = cluster.NewBitmap(w.segs), cluster.NewBitmap(w.segs)
	for s := range w.segs {
		_, lent := n.leases[s]
		if n.segmentHeld(s) {
			a.Held.Set(s)
		} else if lent || n.claims(s) {
			a.Claimed.Set(s)
		}
	}
	for id, since := range n.doubts {
		if w.now.Sub(since) > distrustPeers {
			delete(n.doubts, id)
		} else if len(a.Doubt) < maxDoubts {
			a.Doubt = append(a.Doubt, id)
		}
	}
	return a
}

func (n *node) doubt() {
	for _, id := range slices.Sorted(maps.Keys(n.parts)) {
		p := n.parts[id]
		missing := p.Complete()
		if !missing {
			n.wanted.each(func(i int) { missing = missing || p.Held.Has(i/perSegment) })
		}
		if missing && len(n.doubts) < maxDoubts {
			n.doubts[id] = n.w.now
		}
	}
}

// heard takes in a keeper's answer.
func (n *node) heard(ans cluster.Reply, wanted int) {
	n.answered, n.known, n.owners = n.w.now, ans.Nodes, ans.Owners
	n.pace.Heard(ans, wanted)
	if n.complete {
		return
	}
	clear(n.parts)
	for _, p := range ans.Peers {
		n.parts[p.ID] = p
		connect(n, n.w.byID[p.ID])
	}
	if n.liar {
		return
	}
	for _, s := range ans.Granted {
		if !n.segmentHeld(s) {
			n.leases[s] = ans.Anyway
		}
	}
}

// fillWindow asks the swarm for the rarest pieces that it has.
func (n *node) fillWindow() {
	w := n.w
	room := max(int(window/w.piece), 4) - n.asked
	if room <= 0 || len(n.links) == 0 {
		return
	}
	var claimed [4]int
	busy := claimed[:0]
	for _, st := range n.streams {
		busy = append(busy, st.segs...)
	}
	var count [256]int
	can := w.can[:0]
	for k := range n.have {
		for v := ^(n.have[k] | n.wanted[k]); v != 0; v &= v - 1 {
			i := k<<6 + bits.TrailingZeros64(v)
			if i >= w.pieces {
				break
			}
			if a := n.avail[i]; a > 0 && (len(busy) == 0 || !slices.Contains(busy, i/perSegment)) {
				count[a]++
				can = append(can, int32(i))
			}
		}
	}
	w.can = can
	if len(can) == 0 {
		return
	}
	if n.asked == 0 {
		n.lastPeer = w.now
	}
	most, below := 0, 0 // all pieces of fewer than most peers, and some of those that most have
	for most = 1; most < 255 && below+count[most] <= room; most++ {
		below += count[most]
	}
	some := room - below
	of := count[most]
	for _, i := range can {
		a := int(n.avail[i])
		if a > most {
			continue
		}
		if a == most {
			if w.rng.IntN(of) >= some {
				of--
				continue
			}
			of--
			some--
		}
		n.wanted.add(int(i))
		n.free.add(int(i))
		n.asked++
	}
}
