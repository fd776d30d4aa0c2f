package layerstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

const (
	// retryLeast and retryMost bound the wait before a failed decode is tried again.
	retryLeast = 50 * time.Millisecond
	retryMost  = 3 * time.Second
	// corruptTries is how often the blob is fetched again when it decodes to what the
	// index does not say: once for a bad peer, once for another one.
	corruptTries = 3
	// lostTries bounds how often a run may end well without the chunk that was asked
	// for, which only a decoder that leaves chunks out does.
	lostTries = 16
	// mentionAfter is how long a container waits before the log says so: longer than any
	// round trip, and than what a busy link takes for a window. mentionEvery is how often it
	// says so of a layer.
	mentionAfter = 5 * time.Second
	mentionEvery = 30 * time.Second
)

// demand returns when the chunks from first to last are present, of which somebody reads some from off.
func (l *layer) demand(ctx context.Context, off int64, first, last int) error {
	l.s.hurry.begin()
	defer l.s.hurry.end()
	begun := time.Now()
	l.stats.waits.Add(1)
	defer func() { l.stats.waited.Add(int64(time.Since(begun))) }()
	defer time.AfterFunc(mentionAfter, func() { l.mention(errSlow) }).Stop()
	return l.fetch(ctx, first, last, Demand, func(ld *loaded) { l.aheadLocked(ld, off, first, last) })
}

// fetch returns when the chunks from first to last are present. When some are missing it calls also, once, with l.mu
// held, unless that is nil.
func (l *layer) fetch(ctx context.Context, first, last int, prio Priority, also func(*loaded)) error {
	var t tries
	for c := first; ; {
		l.mu.Lock()
		if c = l.has.missing(c, last); c < 0 {
			told := l.waiting
			l.mu.Unlock()
			if told && prio == Demand {
				l.unmention()
			}
			return nil
		}
		if err := l.usableLocked(prio); err != nil {
			l.mu.Unlock()
			return err
		}
		ld, err := l.indexLocked()
		if err != nil {
			l.mu.Unlock()
			return err
		}
		held := l.coverLocked(ld, c, last, prio, true)
		if len(held) == 0 {
			l.mu.Unlock()
			continue
		}
		r := held[0]
		ch, ok := l.waits[c]
		if !ok {
			ch = make(chan struct{})
			l.waits[c] = ch
		}
		if also != nil {
			also(ld)
			also = nil
		}
		if l.has.has(c) {
			// It came between the look and the wait; nobody would wake us.
			if l.waits[c] == ch {
				close(ch)
				delete(l.waits, c)
			}
		}
		l.mu.Unlock()

		select {
		case <-ch:
		case <-r.done:
		case <-ctx.Done():
		}

		l.mu.Lock()
		for _, h := range held {
			if h.readers--; h.readers == 0 && ctx.Err() != nil && !h.dying {
				h.dying = true
				h.cancel()
			}
		}
		l.mu.Unlock()
		if l.has.has(c) {
			t = tries{}
			continue
		}
		if err := ctx.Err(); err != nil {
			return l.failed(c, errors.Join(context.Cause(ctx), t.last))
		}
		select {
		case <-r.done:
			if err := t.again(ctx, r.err, l.s.patience); err != nil {
				return l.failed(c, err)
			}
			if prio == Demand && t.n > 1 { // once may be chance
				l.mention(t.last)
			}
		default: // the run has passed the chunk without it, or the chunk was dropped
			if t.lost++; t.lost > lostTries {
				return l.failed(c, errors.New("the decoder leaves it out"))
			}
		}
	}
}

// errSlow is why a read waits when nothing has failed.
var errSlow = errors.New("no answer yet")

// mention tells the log that a container waits, and why.
func (l *layer) mention(why error) {
	l.mu.Lock()
	least := mentionAfter
	if l.waiting {
		least = mentionEvery
	}
	first := l.mentioned.IsZero() || time.Since(l.mentioned) > least
	if first {
		l.waiting, l.mentioned = true, time.Now()
	}
	l.mu.Unlock()
	if first {
		l.s.log.Warn("A container waits for bytes of a layer. It gets an error when they cannot be had in time.",
			"layer", l.info.Blob, "within", l.s.patience.String(), "error", why)
	}
}

// unmention tells it that bytes come again, when it was told that they do not.
func (l *layer) unmention() {
	l.mu.Lock()
	was, since := l.waiting, l.mentioned
	l.waiting = false
	l.mu.Unlock()
	if was {
		l.s.log.Info("The bytes of a layer that a container waited for have come.",
			"layer", l.info.Blob, "after", time.Since(since).Round(time.Millisecond).String())
	}
}

func (l *layer) failed(c int, err error) error {
	return fmt.Errorf("bytes %d to %d of layer %s could not be had: %w", l.chunks.start(c), l.chunks.ends[c], l.info.Blob, err)
}

// usableLocked tells why no chunk can be added to the layer.
func (l *layer) usableLocked(prio Priority) error {
	switch {
	case !l.opened || l.closing || l.s.ctx.Err() != nil:
		return fmt.Errorf("layer %s: %w", l.info.Blob, ErrClosed)
	case l.removed && prio != Demand:
		return fmt.Errorf("layer %s: %w", l.info.Blob, ErrRemoved)
	}
	return nil
}

// tries counts what went wrong since the last chunk came.
type tries struct {
	n, corrupt, lost int
	since            time.Time
	last             error
}

// again waits before the next try after err, or returns why there is none.
func (t *tries) again(ctx context.Context, err error, patience time.Duration) error {
	if err == nil || errors.Is(err, context.Canceled) {
		// The run was stopped by others, for their reasons.
		if t.lost++; t.lost > lostTries {
			return errors.New("the decoder stops before it")
		}
		return nil
	}
	t.last = err
	if errors.Is(err, ErrNoSpace) || errors.Is(err, ErrNoSource) || errors.Is(err, ErrClosed) || errors.Is(err, ErrRemoved) {
		return err
	}
	if errors.Is(err, ErrCorrupt) {
		if t.corrupt++; t.corrupt >= corruptTries {
			return err
		}
	}
	if t.n == 0 {
		t.since = time.Now()
	}
	t.n++
	wait := min(retryLeast<<min(t.n-1, 10), retryMost)
	wait = wait/2 + rand.N(wait)
	if time.Since(t.since)+wait > patience {
		return fmt.Errorf("after %d tries: %w", t.n, err)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return errors.Join(context.Cause(ctx), err)
	}
}

// keep writes a chunk that was found right.
func (l *layer) keep(c int, p []byte, prio Priority) error {
	if int64(len(p)) != l.chunks.size(c) {
		return fmt.Errorf("the decoder made %d bytes of chunk %d, which has %d", len(p), c, l.chunks.size(c))
	}
	l.stats.decoded.Add(int64(len(p)))
	if l.has.has(c) {
		l.stats.twice.Add(1)
		return nil
	}
	// Where a chunk is missing the file has zeros, or parts of that very chunk.
	if !isZero(p) {
		if err := l.s.charge(l, int64(len(p)), prio); err != nil {
			return err
		}
		_, err := l.f.WriteAt(p, l.chunks.start(c))
		if isFull(err) && l.s.evict(int64(len(p))) {
			_, err = l.f.WriteAt(p, l.chunks.start(c))
		}
		if err != nil {
			l.s.refund(l, int64(len(p)))
			return full(fmt.Errorf("write %s: %w", l.f.Name(), err))
		}
	}
	fresh, err := l.present.add(c)
	if err != nil {
		// The chunk is there; only a crash would forget it.
		l.s.log.Warn("Could not record a chunk as present.", "layer", l.info.Blob, "error", err)
	}
	if !fresh {
		l.stats.twice.Add(1)
		return nil
	}
	l.mu.Lock()
	if ch, ok := l.waits[c]; ok {
		close(ch)
		delete(l.waits, c)
	}
	l.mu.Unlock()
	if l.dirty.Add(int64(len(p))) >= flushBytes || l.noteFull() {
		l.s.flushSoon(l)
	}
	return nil
}
