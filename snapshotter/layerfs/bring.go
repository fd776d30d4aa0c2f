package layerfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

const (
	// lookers is how many layers' indexes are looked for side by side: each waits for two or three
	// round trips.
	lookers = 8
	// pullIdle is how long what a pull began goes on without it: containerd comes for the next
	// layer within milliseconds, and for one that it unpacks itself within minutes at most.
	pullIdle = 2 * time.Minute
	// goneWithin is how long a layer may take to leave after its image was removed.
	goneWithin = 2 * time.Second
)

// pull is an image whose layers are asked for.
type pull struct {
	ctx    context.Context
	cancel context.CancelFunc

	// Guarded by FileSystem.mu.
	users int
	idle  *time.Timer
	jobs  map[digest.Digest]*job
}

// job is a layer on its way into the store.
type job struct {
	done   chan struct{}
	served string // how, for the log: "lazy", "eager"
	why    string
	err    error

	// early keeps the layer open, for what is read first to come before it is mounted; nil when it is not, or no more.
	// Guarded by FileSystem.mu.
	early *served
}

// Brought is a layer in the store, which stays there until Close at least.
type Brought struct {
	f *FileSystem
	s *served
}

// Implicit tells that Mount has to know the folders of the layers below (WithParents), unless there are none.
func (b *Brought) Implicit() bool { return b.s.h.Implicit() }

// Close lets go of the layer.
func (b *Brought) Close() { b.f.release(b.s, false) }

// Bring has the layer that the labels name in the store when it returns, and the image's layers above
// it on their way there.
func (f *FileSystem) Bring(ctx context.Context, labels map[string]string) (*Brought, error) {
	begun := time.Now()
	t, err := lazy.ParseLabels(labels)
	if err != nil {
		f.log.Info("layer", "served", "unpack", "why", err.Error())
		return nil, err
	}
	line := f.log.With("digest", t.Layer, "image", t.Ref)
	s, j, err := f.bring(ctx, t)
	var not index.ErrNotIndexable
	switch {
	case err == nil:
		line.Info("layer", "served", j.served, "why", j.why, "took", time.Since(begun).Round(time.Millisecond))
		return &Brought{f, s}, nil
	case errors.As(err, &not):
		line.Info("layer", "served", "unpack", "why", err.Error())
	default:
		line.Warn("layer", "served", "unpack", "why", err.Error(), "took", time.Since(begun).Round(time.Millisecond))
	}
	return nil, err
}

func (f *FileSystem) bring(ctx context.Context, t lazy.Target) (*served, *job, error) {
	if f.o.Source == nil {
		return nil, nil, lazy.ErrOff
	}
	// Without its former layer, which goes a moment after its last mount, it comes in another way.
	for end := time.Now().Add(goneWithin); f.forged(t.Layer) != nil && slices.Contains(f.store.Layers(), t.Layer); {
		if err := sleep(ctx, goneWithin/100); err != nil || time.Now().After(end) {
			return nil, nil, errors.Join(f.forged(t.Layer), err)
		}
	}
	for again := true; ; {
		p, err := f.join(t)
		if err != nil {
			return nil, nil, err
		}
		j := f.start(p, t, true)
		for _, d := range t.Neighbours {
			n := lazy.Target{Ref: t.Ref, Manifest: t.Manifest, Layer: d}
			f.start(p, n, false)
		}
		s, err := f.await(ctx, j, t)
		f.leave(t, p, j, err)
		switch {
		case errors.Is(err, context.Canceled) && ctx.Err() == nil && f.ctx.Err() == nil:
			continue // the other pull of this layer was given up, not this one
		case errors.Is(err, layerstore.ErrNotFound) && again:
			again = false // it came, and was evicted before it was asked for
			continue
		}
		return s, j, err
	}
}

// await waits for a job, and gives its layer.
func (f *FileSystem) await(ctx context.Context, j *job, t lazy.Target) (*served, error) {
	select {
	case <-j.done:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if j.err != nil {
		return nil, j.err
	}
	s, err := f.acquire(t)
	f.endEarly(j)
	if err != nil {
		return nil, err
	}
	if have := s.h.DiffID(); have != "" && t.DiffID != "" && have != t.DiffID {
		f.release(s, false)
		return nil, fmt.Errorf("the layer's diff ID is %s, its image's configuration says %s", have, t.DiffID)
	}
	return s, nil
}

// join counts a caller in for the pull of an image.
func (f *FileSystem) join(t lazy.Target) (*pull, error) {
	key := pullKey(t)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, errClosed
	}
	p := f.pulls[key]
	if p == nil {
		p = &pull{jobs: map[digest.Digest]*job{}}
		p.ctx, p.cancel = context.WithCancel(f.ctx)
		f.pulls[key] = p
	}
	if p.idle != nil {
		p.idle.Stop()
		p.idle = nil
	}
	p.users++
	return p, nil
}

func pullKey(t lazy.Target) string { return t.Ref + " " + t.Manifest.String() }

// leave counts it out. A job whose layer is gone since counts no more.
func (f *FileSystem) leave(t lazy.Target, p *pull, j *job, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if errors.Is(err, layerstore.ErrNotFound) && p.jobs[t.Layer] == j {
		delete(p.jobs, t.Layer)
	}
	if p.users--; p.users > 0 || f.closed {
		return
	}
	p.idle = time.AfterFunc(pullIdle, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if p.users == 0 && f.pulls[pullKey(t)] == p && !f.closed {
			p.cancel()
			delete(f.pulls, pullKey(t))
			for _, j := range p.jobs {
				f.wg.Go(func() { f.endEarly(j) })
			}
		}
	})
}

// beginEarly has what is read of a layer first fetched, when that is known, though the layer is not mounted yet.
func (f *FileSystem) beginEarly(p *pull, t lazy.Target, j *job) {
	s, err := f.acquire(t)
	if err != nil {
		return // whoever comes for it hears why
	}
	if order, err := s.h.Order(); err != nil || len(order) == 0 || s.h.Completed() {
		f.release(s, false)
		return
	}
	f.mu.Lock()
	j.early = s
	f.mu.Unlock()
	f.background(s)
	if p.ctx.Err() != nil {
		f.endEarly(j) // nobody else does
	}
}

// endEarly leaves the layer to those who mount it.
func (f *FileSystem) endEarly(j *job) {
	f.mu.Lock()
	s := j.early
	j.early = nil
	f.mu.Unlock()
	if s != nil {
		f.release(s, false)
	}
}

// start begins to bring a layer, if nobody has begun. A failure counts only for who looks ahead, unless it would be the
// same again: it may have been a while ago.
func (f *FileSystem) start(p *pull, t lazy.Target, now bool) *job {
	f.mu.Lock()
	defer f.mu.Unlock()
	if j := p.jobs[t.Layer]; j != nil && (!now || !j.failed()) {
		return j
	}
	j := &job{done: make(chan struct{})}
	p.jobs[t.Layer] = j
	if f.closed {
		j.err = errClosed
		close(j.done)
		return j
	}
	f.wg.Go(func() {
		if j.served, j.why, j.err = f.get(p.ctx, t); j.err == nil {
			f.beginEarly(p, t, j)
		}
		close(j.done)
	})
	return j
}

// failed tells that the job has failed, and another may not.
func (j *job) failed() bool {
	select {
	case <-j.done:
		var not index.ErrNotIndexable
		return j.err != nil && !errors.As(j.err, &not)
	default:
		return false
	}
}
