package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// yieldFor is the longest that a bulk stream waits, a piece, for demand reads:
// a stream under constant demand still moves 20 pieces a second.
const yieldFor = 50 * time.Millisecond

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
	select {
	case d.f.streams <- struct{}{}:
	case <-r.ctx.Done():
		return
	}
	defer func() { <-d.f.streams }()
	for r.ctx.Err() == nil {
		d.mu.Lock()
		now := time.Now()
		var segs []int
		if d.originUsable(now) && d.state == Fetching {
			segs = d.nextRun(now, true)
		}
		d.mu.Unlock()
		if len(segs) == 0 {
			return
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
		case r.ctx.Err() != nil:
			return
		case isLocal(err):
			d.fail(r, err)
			return
		default:
			d.originFailed(err)
			return
		}
	}
}

// isLocal reports whether an error is this node's (its disk), not the source's.
func isLocal(err error) bool {
	return errors.Is(err, store.ErrNoSpace) || errors.Is(err, store.ErrQuota) || errors.Is(err, errLocal)
}

var errLocal = errors.New("writing to the store")

// fetchRun gets a row of segments from the registry, piece by piece.
func (d *download) fetchRun(ctx context.Context, segs []int) error {
	d.mu.Lock()
	source := d.origin
	d.mu.Unlock()
	first, _ := d.segmentPieces(segs[0])
	_, last := d.segmentPieces(segs[len(segs)-1])
	for first < last && d.st.Has(first) {
		first++
	}
	for last > first && d.st.Has(last-1) {
		last--
	}
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
	return d.take(ctx, s, first, last, s.Whole())
}

// take reads pieces [first, last) from a stream that starts at the first.
func (d *download) take(ctx context.Context, s io.Reader, first, last int, whole bool) error {
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	src := d.f.limited(ctx, s)
	per := int(cluster.SegmentSize / d.st.PieceSize())
	for i := first; i < last; i++ {
		if !whole && i%per == 0 && i > first && d.segmentHeld(i/per) {
			return nil // others brought it meanwhile; what follows is asked anew
		}
		_, n := d.st.PieceRange(i)
		p := (*bp)[:n]
		if _, err := io.ReadFull(src, p); err != nil {
			return fmt.Errorf("reading bytes from %d on: %w", int64(i)*d.st.PieceSize(), err)
		}
		if err := d.put(i, p, store.Origin, ""); err != nil {
			return fmt.Errorf("%w: %w", errLocal, err)
		}
		d.f.yield(ctx, yieldFor)
	}
	return nil
}
