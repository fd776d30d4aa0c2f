package layerstore

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	// flushEvery is how often what was written is synced, and thereby what a power
	// failure costs at most, in time.
	flushEvery = 2 * time.Second
	// flushBytes is how much is written to a layer before it is synced sooner: 20 ms of
	// a disk that writes 1.5 GB/s, here, and little enough that no sync takes long.
	flushBytes = 32 << 20
	// indexIdle is how long an index stays in memory after its last use.
	indexIdle = 30 * time.Second
	// flushers is how many layers are synced side by side.
	flushers = 4
)

// sync makes what was written to the data file last, and the layer complete if that
// was the last of it.
func (l *layer) sync() error {
	l.flush.Lock()
	defer l.flush.Unlock()
	if l.complete.Load() || l.present == nil {
		return nil
	}
	l.dirty.Store(0)
	whole := l.present.full()
	err := l.present.sync(func() error { return unix.Fdatasync(int(l.f.Fd())) })
	if err != nil {
		l.noteFull()
		return fmt.Errorf("sync layer %s: %w", l.info.Blob, full(err))
	}
	if !whole {
		return nil
	}
	f, err := os.OpenFile(l.path(fileComplete), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("mark layer %s as complete: %w", l.info.Blob, err)
	}
	f.Close()
	l.complete.Store(true)
	l.mu.Lock()
	l.idx = nil
	select {
	case <-l.done:
	default:
		close(l.done)
	}
	l.mu.Unlock()
	l.dropSource()
	return nil
}

// noteFull sets full to what is true, and returns it.
func (l *layer) noteFull() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	full := l.present.full()
	l.full.Store(full)
	return full
}

// flushSoon has a layer synced without waiting for it.
func (s *Store) flushSoon(l *layer) {
	s.soonMu.Lock()
	s.soon[l] = true
	s.soonMu.Unlock()
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// flusher syncs layers until the store is closed, and drops what is idle.
func (s *Store) flusher(ctx context.Context) {
	tick := time.NewTicker(flushEvery)
	defer tick.Stop()
	for {
		var due []*layer
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
			s.soonMu.Lock()
			for l := range s.soon {
				due = append(due, l)
			}
			clear(s.soon)
			s.soonMu.Unlock()
		case <-tick.C:
			for _, l := range s.openLayers() {
				l.idle()
				if l.dirty.Load() > 0 {
					due = append(due, l)
				}
			}
		}
		var g errgroup.Group
		g.SetLimit(flushers)
		for _, l := range due {
			g.Go(func() error {
				if err := l.sync(); err != nil {
					s.log.Error("What was decoded of a layer could not be made to last. It will be decoded again.",
						"layer", l.info.Blob, "error", err)
				}
				return nil
			})
		}
		_ = g.Wait() // each has logged its own
	}
}

// idle drops what an open layer holds in memory and has not used for long.
func (l *layer) idle() {
	if l.rec.over() {
		if err := l.rec.end(l); err != nil {
			l.s.log.Warn("Could not store the read order of a layer.", "layer", l.info.Blob, "error", err)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.idx != nil && len(l.runs) == 0 && time.Since(l.idx.last) > indexIdle {
		l.idx = nil
	}
}
