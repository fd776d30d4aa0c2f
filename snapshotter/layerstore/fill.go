package layerstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// prefetchers is how many ranges of an order are under way at once: enough that
	// the round trips of small ranges overlap, few enough that the first come first.
	prefetchers = 4
	// fillers is how many parts of a layer are decoded side by side in the
	// background: with two, one decodes while the other waits for the network.
	fillers = 2
	// fillBytes is the length of such a part, at least. Parts end where decoding can
	// begin anew, so nothing is decoded twice; between two of them readers' chunks
	// that came meanwhile are left out.
	fillBytes = 8 << 20
	// spaceWait is how long Complete waits for room before it looks again.
	spaceWait = 2 * time.Second
)

// Prefetch decodes ranges of the data file that will be wanted soon, the first ones
// first. It returns when they are present, or with the first error.
func (h *Layer) Prefetch(ctx context.Context, order []Range) error {
	l := h.l
	if err := l.checkOrder(order); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(prefetchers)
	for _, r := range order {
		if l.full.Load() || gctx.Err() != nil {
			break
		}
		first, last := l.chunks.at(r.Off), l.chunks.at(r.Off+r.Len-1)
		if l.has.all(first, last) {
			continue
		}
		g.Go(func() error { return l.fetch(gctx, first, last, Prefetch, nil) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return context.Cause(ctx)
}

// Complete decodes everything that is missing, in order, while no demand read waits,
// and returns when the layer is complete. When there is no room it waits for some
// until ctx ends; it gives up when the source does.
func (h *Layer) Complete(ctx context.Context) error {
	l := h.l
	told := false
	for !l.complete.Load() {
		err := l.fill(ctx)
		if err == nil {
			err = l.awaitComplete(ctx)
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, ErrNoSpace) || ctx.Err() != nil {
			return err
		}
		if !told {
			told = true
			l.s.log.Warn("A layer is not completed until there is room for it.", "layer", l.info.Blob, "error", err)
		}
		timer := time.NewTimer(spaceWait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("complete layer %s: %w", l.info.Blob, errors.Join(context.Cause(ctx), err))
		}
	}
	return nil
}

// fill has all chunks decoded once.
func (l *layer) fill(ctx context.Context) error {
	if l.full.Load() {
		return nil
	}
	var mu sync.Mutex
	at := 0
	next := func() (first, last int, err error) {
		mu.Lock()
		defer mu.Unlock()
		if at >= l.chunks.len() {
			return -1, -1, nil
		}
		if first = l.has.missing(at, l.chunks.len()-1); first < 0 {
			return -1, -1, nil
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		if err := l.usableLocked(Background); err != nil {
			return 0, 0, err
		}
		ld, err := l.indexLocked()
		if err != nil {
			return 0, 0, err
		}
		last = l.chunks.at(l.chunks.start(first) + fillBytes)
		for last+1 < l.chunks.len() && int(ld.from[last+1]) <= last {
			last++
		}
		at = last + 1
		return first, last, nil
	}
	g, ctx := errgroup.WithContext(ctx)
	for range fillers {
		g.Go(func() error {
			for {
				first, last, err := next()
				if err != nil || first < 0 {
					return err
				}
				if err := l.fetch(ctx, first, last, Background, nil); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// awaitComplete waits until all that is present was synced, or is found missing again.
func (l *layer) awaitComplete(ctx context.Context) error {
	l.mu.Lock()
	done := l.done
	l.mu.Unlock()
	for !l.complete.Load() && l.full.Load() {
		l.s.flushSoon(l)
		timer := time.NewTimer(flushEvery)
		select {
		case <-done:
		case <-timer.C:
		case <-l.s.ctx.Done():
			timer.Stop()
			return fmt.Errorf("complete layer %s: %w", l.info.Blob, ErrClosed)
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("complete layer %s: %w", l.info.Blob, context.Cause(ctx))
		}
		timer.Stop()
	}
	return nil
}
