package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/store"
)

const (
	// yieldWaited is the longest that a transfer somebody waits for (an unpack,
	// a pull) holds back for demand reads, for each piece: under constant demand
	// it still moves 20 pieces a second.
	yieldWaited = 50 * time.Millisecond
	// startQuiet is how long after a demand read the next one of a starting
	// program is expected, and a background fetch that nobody waits for stays
	// off the link. Python with NumPy, started on two busy cores, computes for up
	// to two seconds between reads.
	startQuiet = 3 * time.Second
	// holdBack bounds how long one blob's background fetch stays off in all: a
	// program that reads on and on does not keep its image from being complete.
	// Three containers that started on a shared 200 Mbit/s link with the
	// background fetches at full speed printed their first line only when
	// everything was there.
	holdBack = 20 * time.Second
)

// pieceBufs hold one piece each, of the largest size.
var pieceBufs = sync.Pool{New: func() any { b := make([]byte, 1<<20); return &b }}

// stream is one worker of the bulk fetch: it asks the registry for this node's
// share, run after run, until none is left.
func (d *download) stream(r *run) {
	defer func() {
		d.mu.Lock()
		d.workers--
		d.mu.Unlock()
		d.poke()
	}()
	for r.ctx.Err() == nil {
		d.mu.Lock()
		extra := d.workers > d.streams()
		d.mu.Unlock()
		if extra {
			return
		}
		d.yield(r.ctx)
		if !d.fetchNext(r) {
			return
		}
	}
}

// fetchNext gets the next run; false when there is none, or when the registry
// failed.
func (d *download) fetchNext(r *run) bool {
	select {
	case d.f.streams <- struct{}{}:
	case <-r.ctx.Done():
		return false
	}
	defer func() { <-d.f.streams }()
	d.mu.Lock()
	now := time.Now()
	var segs []int
	if d.originUsable(now) && d.state == Fetching {
		segs = d.nextRun(now, true)
	}
	d.mu.Unlock()
	if len(segs) == 0 {
		return false
	}
	d.announceSoon(r)
	err := d.fetchRun(r.ctx, segs)
	d.mu.Lock()
	for _, s := range segs {
		delete(d.claims, s)
	}
	d.mu.Unlock()
	switch {
	case err == nil:
		d.originWorked()
		return true
	case r.ctx.Err() != nil:
	case isLocal(err):
		d.fail(r, err)
	default:
		d.originFailed(err)
	}
	return false
}

// yield holds the bulk fetch of this blob back for demand reads.
func (d *download) yield(ctx context.Context) {
	if d.waiters.Load() > 0 || !d.holdsBack() {
		d.f.yield(ctx, 0, yieldWaited)
		return
	}
	begun := time.Now()
	d.f.yield(ctx, startQuiet, holdBack)
	d.heldBack.Add(int64(time.Since(begun)))
}

// holdsBack reports whether the blob's fetch is in the background and may still
// be put off.
func (d *download) holdsBack() bool {
	return d.waiters.Load() == 0 && d.heldBack.Load() < int64(holdBack)
}

// isLocal reports whether an error is this node's (its disk), not the source's.
func isLocal(err error) bool {
	return errors.Is(err, store.ErrNoSpace) || errors.Is(err, store.ErrQuota) || errors.Is(err, errLocal)
}

var errLocal = errors.New("writing to the store")

// fetchRun gets the first row of pieces in some segments that nobody near has
// from the registry. What comes after a gap is for the next run.
func (d *download) fetchRun(ctx context.Context, segs []int) error {
	first, _ := d.segmentPieces(segs[0])
	_, end := d.segmentPieces(segs[len(segs)-1])
	d.mu.Lock()
	source := d.origin
	// The same pieces for which nextRun chose the segments, those that peers have
	// and do not send among them: else it would choose them for ever.
	own := d.shareOf(time.Now())
	ask := func(i int) bool { return d.toAsk(i, d.noRange || own.anyway(d.segmentOf(i))) }
	for first < end && !ask(first) {
		first++
	}
	last := first
	for last < end && ask(last) {
		last++
	}
	d.mu.Unlock()
	if first == last {
		return nil
	}
	off, _ := d.st.PieceRange(first)
	lastOff, lastLen := d.st.PieceRange(last - 1)
	s, err := source.Open(ctx, d.desc, off, lastOff+lastLen-off)
	if err != nil {
		return err
	}
	defer s.Close()
	if s.Whole() {
		// One stream has it all: let no other start, and keep every piece.
		d.mu.Lock()
		other := d.noRange && len(d.claims) > len(segs)
		d.noRange = true
		if !other {
			for seg := range d.segs {
				d.claims[seg] = true
			}
		}
		d.mu.Unlock()
		if other {
			return nil
		}
		defer func() {
			d.mu.Lock()
			d.claims = map[int]bool{}
			d.mu.Unlock()
		}()
		first, last = 0, d.pieces
	}
	whole := s.Whole()
	return d.take(ctx, s, first, last, func(int) bool {
		if !whole && d.holdsBack() && d.f.hot(startQuiet) {
			// Its place among the streams, and its claims, are for those that
			// somebody waits for; what is left is asked anew later.
			return false
		}
		d.f.yield(ctx, 0, yieldWaited)
		return true
	})
}

// take reads pieces [first, last) from a stream that starts at the first. Before
// each piece it asks on, unless nil, whether to go on.
func (d *download) take(ctx context.Context, s io.Reader, first, last int, on func(i int) bool) error {
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	src := d.limited(ctx, s)
	for i := first; i < last; i++ {
		if on != nil && !on(i) {
			return nil
		}
		_, n := d.st.PieceRange(i)
		p := (*bp)[:n]
		if _, err := io.ReadFull(src, p); err != nil {
			return fmt.Errorf("reading bytes from %d on: %w", int64(i)*d.st.PieceSize(), err)
		}
		if err := d.put(i, p, store.Origin, ""); err != nil {
			return fmt.Errorf("%w: %w", errLocal, err)
		}
	}
	return nil
}
