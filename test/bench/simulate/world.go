package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

const (
	// step is the virtual time between two looks at everything, as often as a fetch looks for what it could ask for.
	step = 50 * time.Millisecond
	// noticed is when the members know that one is dead: a probe, and the time it has to deny it.
	noticed = 5 * time.Second
	// tooLong ends a simulation that goes nowhere.
	tooLong = 5 * time.Minute
)

// scenario is one simulation.
type scenario struct {
	name   string
	nodes  int
	bytes  int64
	piece  int64
	link   float64       // of every node, in bytes a second in each direction
	origin float64       // of the registry
	over   time.Duration // in which the nodes start, evenly at random
	dies   float64       // share of the nodes that dies at half of the ideal time, the keeper among them
	liars  float64       // share of the nodes that claims to hold everything and sends nothing
	seed   uint64
}

// ideal is what no distribution can beat, in seconds.
func (s *scenario) ideal() float64 {
	f, n := float64(s.bytes), float64(s.nodes)
	return max(f/s.origin, f/s.link, n*f/(s.origin+n*s.link))
}

// world is the state of a simulation.
type world struct {
	scenario
	digest  digest.Digest
	pieces  int
	segs    int
	rng     *rand.Rand
	now     time.Time
	begun   time.Time
	nodes   []*node
	byID    map[string]*node
	live    []cluster.Member // as everybody knows them
	changed time.Time        // when that last changed
	keepers map[string]*keeper
	ranking []cluster.Member

	fromOrigin float64 // bytes
	arrivals   []arrival
	up, down   []float64 // what is left of this step, by node
	upPart     []float64 // what each transfer gets of it
	downPart   []float64
	outs, ins  []int32
	upOrigin   float64
	originOuts int
	sizes      sizes
	died       bool
	deadSince  time.Time
	mostConns  int
	mostCalls  int
	curve      []float64 // share of the nodes that are done, by step
	can        []int32   // scratch of fillWindow
}

// arrival is a piece that came in this step: others can have it in the next.
type arrival struct {
	n     *node
	piece int
	peer  bool
}

func newWorld(s scenario) *world {
	w := &world{
		scenario: s, digest: digest.FromString(s.name), rng: rand.New(rand.NewPCG(s.seed, uint64(s.nodes))),
		pieces: int((s.bytes + s.piece - 1) / s.piece), segs: cluster.Segments(s.bytes),
		begun: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
		byID:  map[string]*node{}, keepers: map[string]*keeper{},
		up: make([]float64, s.nodes), down: make([]float64, s.nodes), upPart: make([]float64, s.nodes), downPart: make([]float64, s.nodes),
		outs: make([]int32, s.nodes), ins: make([]int32, s.nodes),
	}
	w.now = w.begun
	for i := range s.nodes {
		m := cluster.Member{
			ID:     fmt.Sprintf("%016x%016x", w.rng.Uint64(), w.rng.Uint64()),
			Addr:   netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 6881),
			Origin: true,
		}
		n := &node{
			w: w, index: int32(i), Member: m,
			have: newSet(w.pieces), wanted: newSet(w.pieces), free: newSet(w.pieces), avail: make([]uint8, w.pieces),
			at:     w.begun.Add(time.Duration(w.rng.Float64() * float64(s.over))),
			leases: map[int]bool{}, parts: map[string]cluster.Said{}, doubts: map[string]time.Time{}, suspects: map[string]time.Time{},
		}
		w.nodes, w.byID[m.ID] = append(w.nodes, n), n
		w.live = append(w.live, m)
	}
	w.rank()
	liars := int(math.Round(s.liars * float64(s.nodes)))
	for _, i := range w.rng.Perm(s.nodes)[:liars] {
		if n := w.nodes[i]; n.ID != w.ranking[0].ID {
			n.liar, n.at = true, w.begun
			for p := range w.pieces {
				n.have.add(p)
			}
		}
	}
	return w
}

// rank finds who keeps the blob's list, from the members that are known to live.
func (w *world) rank() { w.ranking = cluster.Keepers(w.digest, slices.Values(w.live)) }

// run lets time pass until every node that lives has the blob.
func (w *world) run() error {
	half := w.begun.Add(time.Duration(w.ideal() / 2 * float64(time.Second)))
	for {
		if w.dies > 0 && !w.died && !w.now.Before(half) {
			w.kill()
		}
		if w.died && !w.deadSince.IsZero() && w.now.Sub(w.deadSince) >= noticed {
			w.notice()
		}
		w.serve()
		missing := 0
		for _, n := range w.nodes {
			n.act()
			if !n.liar && !n.dead && !n.complete {
				missing++
			}
		}
		w.flow()
		w.arrive()
		w.curve = append(w.curve, 1-float64(missing)/float64(len(w.nodes)))
		if missing == 0 {
			return nil
		}
		if w.now = w.now.Add(step); w.now.Sub(w.begun) > tooLong {
			return fmt.Errorf("%s: %d of %d nodes do not have the blob after %v", w.name, missing, w.scenario.nodes, tooLong)
		}
	}
}

// kill ends some nodes at once, without a word.
func (w *world) kill() {
	w.died, w.deadSince = true, w.now
	first := w.byID[w.ranking[0].ID]
	victims := []*node{first}
	for _, i := range w.rng.Perm(len(w.nodes)) {
		if n := w.nodes[i]; float64(len(victims)) < w.dies*float64(len(w.nodes)) && n != first && !n.liar {
			victims = append(victims, n)
		}
	}
	for _, n := range victims {
		n.dead = true
		for len(n.links) > 0 {
			disconnect(n, n.links[len(n.links)-1].from)
		}
		n.streams = nil
	}
}

// notice lets the members know who is dead.
func (w *world) notice() {
	w.deadSince = time.Time{}
	w.changed = w.now
	w.live = slices.DeleteFunc(w.live, func(m cluster.Member) bool { return w.byID[m.ID].dead })
	for id, k := range w.keepers {
		if w.byID[id].dead {
			delete(w.keepers, id)
			continue
		}
		k.book.Retain(func(id string) bool { return !w.byID[id].dead })
	}
	w.rank()
}

// result sums a simulation up.
type result struct {
	copies     float64
	rounds     int
	slowest    float64 // seconds, the slowest node's time from its own start
	ratio      float64
	control    float64 // bytes a second, sent and received, of the mean node
	keeperPeak float64 // bytes a second of the first keeper
	conns      int
	calls      int
	curve      []float64
}

func (w *world) result() result {
	r := result{copies: w.fromOrigin / float64(w.bytes), rounds: len(w.curve), conns: w.mostConns, calls: w.mostCalls, curve: w.curve}
	var sum float64
	count := 0
	for _, n := range w.nodes {
		if n.dead || n.liar {
			continue
		}
		took := n.done.Sub(n.at).Seconds()
		r.slowest = max(r.slowest, took)
		sum += float64(n.traffic) / max(took, 1)
		count++
	}
	r.control = sum / float64(count)
	r.ratio = r.slowest / w.ideal()
	for _, k := range w.keepers {
		r.keeperPeak = max(r.keeperPeak, k.peak())
	}
	return r
}
