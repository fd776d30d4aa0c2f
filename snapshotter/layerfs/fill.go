package layerfs

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/docker-quay/docker-quay/snapshotter/index/published"
)

const (
	// quiet is how long no container may have waited for bytes before a layer is fetched as a whole. On a busy machine
	// two reads of a program that starts are seconds apart.
	quiet = 5 * time.Second
	// quietMost is when it is fetched all the same: who reads all the time is helped by that.
	quietMost = time.Minute
	// fillers is how many layers are fetched in the background at once: enough for a link that one
	// registry connection does not fill, few enough that layers become complete one after another.
	fillers = 3
	// refillLeast and refillMost bound the wait before the next try.
	refillLeast = 5 * time.Second
	refillMost  = 5 * time.Minute
)

// background sees to it that the layer becomes complete, once.
func (f *FileSystem) background(s *served) {
	s.fillMu.Lock()
	defer s.fillMu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.filled != nil || f.closed {
		return
	}
	ctx, stop := context.WithCancel(f.ctx)
	done := make(chan struct{})
	s.stop, s.filled = stop, done
	f.wg.Go(func() {
		defer close(done)
		f.fillUp(ctx, s)
	})
}

// endFill ends the background's work and waits for that.
func (s *served) endFill() {
	s.fillMu.Lock()
	defer s.fillMu.Unlock()
	if s.filled == nil {
		return
	}
	s.stop()
	<-s.filled
	s.stop, s.filled = nil, nil
}

// fillUp prefetches what is known to be read first, then gets everything, and has the layer's
// mounts read the plain file.
func (f *FileSystem) fillUp(ctx context.Context, s *served) {
	if order, err := s.h.Order(); err == nil && len(order) > 0 && !s.h.Completed() {
		if err := s.h.Prefetch(ctx, order); err != nil && ctx.Err() == nil {
			f.log.Debug("what a layer's containers read first could not be prefetched", "digest", s.digest, "error", err)
		}
	}
	for wait := refillLeast; ; wait = min(2*wait, refillMost) {
		err := f.complete(ctx, s)
		if err == nil {
			break
		}
		if ctx.Err() != nil || errors.Is(err, published.ErrForged) {
			return
		}
		f.log.Warn("a layer could not be completed; it is tried again", "digest", s.digest, "image", s.target.Ref, "in", wait.String(), "error", err)
		if sleep(ctx, wait/2+rand.N(wait)) != nil {
			return
		}
	}
	f.promote(ctx, s)
	if err := f.refine(ctx, s); err != nil && ctx.Err() == nil {
		f.log.Info("others are not told where a layer's containers begin to read", "digest", s.digest, "image", s.target.Ref, "error", err)
	}
}

// refine makes the index that other nodes are told, once what containers read first was read: when nothing was added to it
// for a while. Mounts read past the daemon by now, but for those of containers that run already.
func (f *FileSystem) refine(ctx context.Context, s *served) error {
	for n := 0; ; {
		order, err := s.h.Order()
		if err != nil || len(order) == 0 {
			return err
		}
		if len(order) == n {
			break
		}
		n = len(order)
		if err := sleep(ctx, f.o.Quiet); err != nil {
			return err
		}
	}
	if x, err := s.h.Index(); err != nil || len(x.First) > 0 {
		return err // somebody else has done it
	}
	blob, err := f.open(ctx, s.target)
	if err != nil {
		return err
	}
	defer blob.Close()
	if err := enter(ctx, f.decode); err != nil {
		return err
	}
	defer func() { <-f.decode }()
	return s.h.Refine(ctx, blob)
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// complete returns when the layer is complete and checked.
func (f *FileSystem) complete(ctx context.Context, s *served) error {
	if s.h.Completed() && !f.claimed(s.digest) {
		return nil
	}
	if err := f.awaitQuiet(ctx); err != nil {
		return err
	}
	if err := enter(ctx, f.fill); err != nil {
		return err
	}
	defer func() { <-f.fill }()
	begun := time.Now()
	blob, err := f.open(ctx, s.target)
	if err != nil {
		return err
	}
	defer blob.Close()
	// All of the blob first: in bulk it comes faster than range by range, and node and
	// content store have it then.
	if err := blob.Wait(ctx); err != nil {
		return err
	}
	// One layer at a time is decoded: containers are not to find the cores taken.
	if err := enter(ctx, f.decode); err != nil {
		return err
	}
	defer func() { <-f.decode }()
	if err := s.h.Complete(ctx); err != nil {
		return err
	}
	if f.claimed(s.digest) {
		if err := f.verify(ctx, s, blob); err != nil {
			return err
		}
	}
	f.log.Info("layer is complete", "digest", s.digest, "image", s.target.Ref, "took", time.Since(begun).Round(time.Millisecond))
	return nil
}

func enter(ctx context.Context, places chan struct{}) error {
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// awaitQuiet returns when no container has waited for bytes for a while, of whatever layer: the link is theirs first.
func (f *FileSystem) awaitQuiet(ctx context.Context) error {
	end := time.Now().Add(max(quietMost, f.o.Quiet))
	for {
		before := f.link.server.Stats()
		if err := sleep(ctx, f.o.Quiet); err != nil {
			return err
		}
		now := f.link.server.Stats()
		if now.Waited == before.Waited && now.Waiting == 0 || time.Now().After(end) {
			return nil
		}
	}
}

// promote replaces the mounts of a complete layer that read from blobfs by such that read the file.
func (f *FileSystem) promote(ctx context.Context, s *served) {
	f.mu.Lock()
	var at []string
	for path, p := range f.places {
		if p.s == s && p.kind == kindBlobs {
			at = append(at, path)
		}
	}
	f.mu.Unlock()
	for _, path := range at {
		if err := f.promoteOne(ctx, s, path); err != nil && ctx.Err() == nil {
			f.log.Info("a mount of a layer that is complete goes on by way of the daemon", "mountpoint", path, "digest", s.digest, "reason", err)
		}
	}
	f.settle(s)
}

func (f *FileSystem) promoteOne(ctx context.Context, s *served, at string) error {
	p, leave, err := f.enter(ctx, at)
	if err != nil {
		return err
	}
	defer leave()
	f.mu.Lock()
	ours := p.s == s && p.kind == kindBlobs
	f.mu.Unlock()
	if !ours || ctx.Err() != nil {
		return nil
	}
	_, err = f.mounter.do(order{Op: opReplace, At: at, Meta: f.metaOf(at, s), Data: s.h.DataPath(), Loop: f.o.Loop})
	if err != nil {
		return err
	}
	f.mu.Lock()
	p.kind = kindData
	f.mu.Unlock()
	return f.note(at, kindData)
}

// verify compares a published index with the blob, which is here.
func (f *FileSystem) verify(ctx context.Context, s *served, blob Blob) error {
	x, err := s.h.Index()
	if err != nil {
		return err
	}
	r := blob.Reader(ctx)
	defer r.Close()
	err = f.o.Source.Verify(ctx, r, x)
	switch {
	case err == nil:
		f.unclaim(s.digest)
	case errors.Is(err, published.ErrForged):
		f.log.Error("a published index shows other contents than its layer has: containers must not be started from it any more; remove the image, ask who published it, and pull it again",
			"digest", s.digest, "image", s.target.Ref, "error", err)
		if cerr := f.claim(s.digest, err.Error()); cerr != nil {
			return errors.Join(err, cerr)
		}
	}
	return err
}
