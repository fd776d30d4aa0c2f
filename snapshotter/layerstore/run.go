package layerstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

const (
	// joinBytes is how much of the data a reader lets a decoder pass on its way to
	// him rather than start another: what arrives in the 40 ms that a new one costs
	// in round trips, at 200 Mbit/s.
	joinBytes = 1 << 20
	// parkFor is how long a decoder waits at its limit for its reader to come back.
	parkFor = 3 * time.Second
	// maxParked bounds the decoders that wait so in a store; a zstd decoder holds up
	// to 8 MiB for its window.
	maxParked = 12
	// pauseFor bounds how long a background run stands still for demand reads per
	// chunk, so that it gets on even where somebody always waits.
	pauseFor = time.Second
)

// run is one decoder on its way forward through a layer.
type run struct {
	l      *layer
	x      *index.Index
	need   []int64  // see loaded
	first  int      // the chunk it was started for
	base   Priority // of what nobody waits for with Demand; at most Prefetch
	ctx    context.Context
	cancel context.CancelFunc
	ticket ticket
	done   chan struct{} // closed at its end, after err was set
	wake   chan struct{} // of length 1: limit has moved

	// Of the goroutine that decodes.
	inside bool // it has a place in the gate
	ended  bool // put ended it because it was far enough

	// Guarded by l.mu.
	next    int           // the chunk that it hands out next
	limit   int           // it does not go on beyond the chunk before this one
	wanted  int           // somebody waits for chunks before this one
	demand  int           // somebody waits with Demand for chunks before this one
	readers int           // who would miss it
	dying   bool          // it was cancelled or is past its end
	raised  chan struct{} // closed, and replaced, when demand has moved
	err     error
}

// coverLocked sees to it that each chunk from first to last that is missing is on some
// run's way, and returns these runs. The caller is one of their readers when he holds.
func (l *layer) coverLocked(ld *loaded, first, last int, prio Priority, hold bool) (runs []*run) {
	var before *run
	for c := l.has.missing(first, last); c >= 0; c = l.has.missing(c+1, last) {
		r := l.pickLocked(ld, c, prio)
		if r == nil && before != nil && c <= before.limit {
			r = before
		}
		if r == nil {
			r = l.startLocked(ld, c, prio)
		}
		before = r
		if c >= r.limit {
			r.limit = c + 1
			select {
			case r.wake <- struct{}{}:
			default:
			}
		}
		if !hold {
			continue
		}
		r.wanted = max(r.wanted, c+1)
		if prio == Demand && c >= r.demand {
			r.demand = c + 1
			close(r.raised)
			r.raised = make(chan struct{})
			l.s.gate.raise(&r.ticket, Demand)
		}
		if !slices.Contains(runs, r) {
			r.readers++
			runs = append(runs, r)
		}
	}
	return runs
}

// pickLocked finds the run that is best for chunk c, or nil if a new one is better.
func (l *layer) pickLocked(ld *loaded, c int, prio Priority) *run {
	var best *run
	for _, r := range l.runs {
		if !r.dying && r.next <= c && (best == nil || r.next > best.next) {
			best = r
		}
	}
	if best == nil {
		return nil
	}
	begin := int(ld.from[c])
	detour := l.chunks.start(c) - l.chunks.start(best.next)
	anew := l.chunks.start(c) - l.chunks.start(begin)
	switch {
	case begin <= best.next, detour <= anew+joinBytes:
		return best
	case prio == Prefetch && c <= best.limit, prio == Background && c < best.limit:
		// Nobody waits for it. What is read ahead is one run's; the parts of a layer
		// that are filled side by side are not.
		return best
	}
	if best.limit > begin && best.wanted <= begin {
		// The new run does this part.
		best.limit = begin
	}
	return nil
}

func (l *layer) startLocked(ld *loaded, c int, prio Priority) *run {
	ctx, cancel := context.WithCancel(l.s.ctx)
	r := &run{
		l: l, x: ld.x, need: ld.need, first: c, base: min(prio, Prefetch), ctx: ctx, cancel: cancel,
		ticket: ticket{l: l, prio: prio},
		done:   make(chan struct{}), wake: make(chan struct{}, 1), raised: make(chan struct{}),
		next: int(ld.from[c]), limit: c + 1,
	}
	l.runs = append(l.runs, r)
	l.wg.Go(r.run)
	return r
}

func (r *run) run() {
	defer r.cancel()
	l := r.l
	err := l.s.gate.enter(r.ctx, &r.ticket)
	if err == nil {
		r.inside = true
		err = r.x.Fill(r.ctx, r.first, l.chunks.len()-1, r.openBlob, r.put)
	}
	if r.inside {
		l.s.gate.leave(l)
	}
	if r.ended {
		err = nil
	}
	if c := wrongChunk(err); c >= 0 {
		l.doubt(r.x, c)
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil && r.ctx.Err() == nil {
		l.stats.failures.Add(1)
		why := err.Error()
		l.stats.lastErr.Store(&why)
	}
	r.err = err
	r.dying = true
	l.runs = slices.DeleteFunc(l.runs, func(o *run) bool { return o == r })
	if l.idx != nil {
		l.idx.last = time.Now()
	}
	close(r.done)
}

// put takes a chunk from the decoder, and holds it back where the run has gone far
// enough for now.
func (r *run) put(c int, p []byte) error {
	if err := r.ctx.Err(); err != nil {
		return err
	}
	l := r.l
	prio := r.base
	if _, waited := r.hurried(); waited {
		prio = Demand
	}
	if err := l.keep(c, p, prio); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	// Whoever waits for a chunk that this run has now passed without it looks again.
	for w, ch := range l.waits {
		if w >= r.next && w <= c {
			close(ch)
			delete(l.waits, w)
		}
	}
	if r.next = max(r.next, c+1); r.next >= l.chunks.len() {
		return nil
	}
	m := -1 // the next chunk that is missing
	for {
		if r.next < r.limit {
			if m = l.has.missing(r.next, r.limit-1); m >= 0 {
				break
			}
		}
		if !r.parkLocked() {
			r.dying = true
			r.ended = true
			return errEnough
		}
	}
	// The way to it may be shorter from elsewhere.
	if ld := l.idx; ld != nil {
		if begin := int(ld.from[m]); begin > r.next && l.chunks.start(begin)-l.chunks.start(r.next) > joinBytes {
			r.dying = true
			r.ended = true
			if r.readers == 0 && !l.closing {
				l.coverLocked(ld, m, r.limit-1, r.base, false)
			}
			return errEnough
		}
	}
	if r.base == Background {
		l.mu.Unlock()
		r.pause()
		l.mu.Lock()
	}
	return nil
}

// parkLocked waits until the limit moves, and reports whether the run shall look at it
// again. It has no place in the gate meanwhile.
func (r *run) parkLocked() bool {
	l := r.l
	if l.s.parked.Add(1) > maxParked {
		l.s.parked.Add(-1)
		return false
	}
	l.mu.Unlock()
	l.s.gate.leave(l)
	r.inside = false
	timer := time.NewTimer(parkFor)
	over := false
	select {
	case <-r.wake:
	case <-r.ctx.Done():
	case <-timer.C:
		over = true
	}
	timer.Stop()
	l.s.parked.Add(-1)
	if over {
		// The limit may have moved just now: then it stays.
		l.mu.Lock()
		if r.next >= r.limit || l.has.missing(r.next, r.limit-1) < 0 {
			return false
		}
		l.mu.Unlock()
	}
	err := l.s.gate.enter(r.ctx, &r.ticket)
	l.mu.Lock()
	r.inside = err == nil
	return err == nil
}

func (r *run) pause() {
	calm := r.l.s.hurry.wait()
	if calm == nil {
		return
	}
	raised, demand := r.hurried()
	if demand {
		return
	}
	timer := time.NewTimer(pauseFor)
	defer timer.Stop()
	select {
	case <-calm:
	case <-raised:
	case <-timer.C:
	case <-r.ctx.Done():
	}
}

// hurried tells whether somebody waits for this run with Demand, and gives the channel
// that is closed when that may have changed.
func (r *run) hurried() (<-chan struct{}, bool) {
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	return r.raised, r.demand > r.next
}

// bounds are the offsets in the blob up to which it is needed for what the run will
// decode for now, and for what somebody waits for with Demand.
func (r *run) bounds() (bound, hurried int64) {
	r.l.mu.Lock()
	defer r.l.mu.Unlock()
	bound = r.need[r.limit-1]
	if r.demand > r.next {
		hurried = r.need[r.demand-1]
	}
	return bound, hurried
}

// wrongChunk is the chunk that a decoder found wrong, or -1 when it failed otherwise.
func wrongChunk(err error) int {
	var wrong index.ErrChunk
	if errors.As(err, &wrong) {
		return wrong.Chunk
	}
	return -1
}

// doubt tells the source that what chunk c was decoded from is wrong.
func (l *layer) doubt(x *index.Index, c int) {
	l.src.mu.Lock()
	d, ok := l.src.blob.(doubter)
	l.src.mu.Unlock()
	if ok && c < l.chunks.len() {
		d.Doubt(x.Span(c, c))
	}
}
