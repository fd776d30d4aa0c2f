package layerfs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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
		if p.users == 0 && f.pulls[pullKey(t)] == p {
			p.cancel()
			delete(f.pulls, pullKey(t))
		}
	})
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
		j.served, j.why, j.err = f.get(p.ctx, t)
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

// get gets a layer into the store.
func (f *FileSystem) get(ctx context.Context, t lazy.Target) (served, why string, err error) {
	if h, err := f.store.Get(t.Layer); err == nil {
		served := "lazy"
		if h.Completed() {
			served = "eager"
		}
		return served, "it is here", h.Close()
	}
	desc, why, err := f.find(ctx, t)
	if err != nil || why != "" {
		return "lazy", why, err
	}
	return "eager", "nobody has an index of it", f.unpackAll(ctx, t, desc)
}

// find makes a layer of an index that somebody has; why is empty when there is none.
func (f *FileSystem) find(ctx context.Context, t lazy.Target) (desc ocispec.Descriptor, why string, err error) {
	if err := enter(ctx, f.look); err != nil {
		return desc, "", err
	}
	defer func() { <-f.look }()
	desc, err = f.o.Source.Describe(ctx, t.Ref, t.Manifest, t.Layer)
	if err != nil {
		return desc, "", fmt.Errorf("the image's manifest could not be looked up: %w", err)
	}
	if desc.Digest != t.Layer {
		return desc, "", fmt.Errorf("the image's manifest has no layer %s", t.Layer)
	}
	x, why, err := f.ownIndex(ctx, t, desc)
	if err != nil {
		return desc, "", err
	}
	published := false
	theirs, order := f.fromOthers(ctx, t, desc, x == nil && !f.o.NoMembers && f.forged(t.Layer) == nil)
	if theirs != nil {
		x, why, published = theirs, "index of another node", true
	}
	if x == nil && !f.o.NoPublished && f.forged(t.Layer) == nil {
		x, err = f.o.Source.Index(ctx, t.Ref, t.Manifest, desc)
		if err != nil {
			// All of the layer is fetched anyhow, if the registry is there at all.
			f.log.Debug("whether an index of a layer is published could not be found out", "digest", t.Layer, "image", t.Ref, "error", err)
			x = nil
		}
		why, published = "published index", true
	}
	if x == nil {
		return desc, "", nil
	}
	if published {
		if err := f.claim(t.Layer, ""); err != nil {
			return desc, "", fmt.Errorf("that an index has to be checked cannot be noted: %w", err)
		}
	}
	h, err := f.store.Create(ctx, x)
	switch {
	case err == nil:
		if len(order) > 0 {
			if err := h.SetOrder(order); err != nil {
				f.log.Debug("another node's word of what is read first is not used", "digest", t.Layer, "error", err)
			}
		}
		return desc, why, h.Close()
	case ctx.Err() != nil, errors.Is(err, layerstore.ErrNoSpace):
		return desc, "", err
	}
	f.log.Warn("the layer's index is not used", "digest", t.Layer, "image", t.Ref, "source", why, "error", err)
	f.unclaim(t.Layer)
	return desc, "", nil
}

// ownIndex makes an index of the layer's own table of contents; nil when it has none that can be used.
func (f *FileSystem) ownIndex(ctx context.Context, t lazy.Target, desc ocispec.Descriptor) (*index.Index, string, error) {
	if !lazy.HasTable(desc, t) {
		return nil, "", nil
	}
	blob, err := f.o.Source.Blob(ctx, t.Ref, desc)
	if err != nil {
		return nil, "", fmt.Errorf("the layer could not be opened: %w", err)
	}
	defer blob.Close()
	x, why, err := lazy.OwnIndex(ctx, tableReader{blob}, desc, t)
	if err == nil {
		return x, why, nil
	}
	if ctx.Err() != nil {
		return nil, "", err
	}
	// A table that is not what the manifest says, or cannot be used: the layer itself can still be.
	f.log.Warn("the layer's table of contents is not used", "digest", t.Layer, "image", t.Ref, "error", err)
	return nil, "", nil
}

// unpackAll fetches a layer and unpacks it into the store.
func (f *FileSystem) unpackAll(ctx context.Context, t lazy.Target, desc ocispec.Descriptor) error {
	if err := enter(ctx, f.unpack); err != nil {
		return err
	}
	defer func() { <-f.unpack }()
	blob, err := f.o.Source.Blob(ctx, t.Ref, desc)
	if err != nil {
		return fmt.Errorf("the layer could not be opened: %w", err)
	}
	defer blob.Close()
	r := blob.Reader(ctx)
	defer r.Close()
	var h *layerstore.Layer
	if h, err = f.store.Unpack(ctx, desc, r); err != nil {
		return err
	}
	// Only what was synced is mounted past the daemon.
	return errors.Join(h.Complete(ctx), h.Close())
}
