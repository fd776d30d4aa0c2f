package layerfs

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

const (
	// adopters is how many mounts that live are taken over side by side: a few small files of each
	// are opened.
	adopters = 16
	// restorers is the same of those that have to be mounted.
	restorers = 8
)

// Restore takes over the mounts that live, and makes those again that do not, as far as it can be
// done now. It returns how many failed; those are tried again by Check. Snapshots that are removed
// in the meantime are left out. It may run beside all other methods, but not twice.
func (f *FileSystem) Restore(ctx context.Context, points []lazy.Mountpoint) (failed int) {
	f.mu.Lock()
	f.gone = map[string]bool{}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.gone = nil
		f.mu.Unlock()
	}()
	var bad atomic.Int64
	report := func(mp lazy.Mountpoint, err error) {
		bad.Add(1)
		f.log.Warn("a layer could not be mounted again; it is tried again when it is next used", "mountpoint", mp.Path, "error", err)
	}
	lost := make([]bool, len(points))
	var g errgroup.Group
	g.SetLimit(adopters)
	for _, o := range f.notedOpens() {
		g.Go(func() error {
			if err := f.reopen(o); err != nil {
				f.log.Error("a layer that containers read is lost: they get errors from it", "digest", o.Layer, "image", o.Ref, "error", err)
			}
			return nil
		})
	}
	g.Wait()
	for i, mp := range points {
		g.Go(func() error {
			if lost[i] = !f.Lives(mp.Path); lost[i] {
				return nil
			}
			if err := f.adopt(ctx, mp); err != nil {
				report(mp, err)
			}
			return nil
		})
	}
	g.Wait()
	f.link.server.Restored()
	var h errgroup.Group
	h.SetLimit(restorers)
	for i, mp := range points {
		if !lost[i] {
			continue
		}
		h.Go(func() error {
			if err := f.mountAgain(ctx, mp); err != nil {
				report(mp, err)
			}
			return nil
		})
	}
	h.Wait()
	return int(bad.Load())
}

// Lives tells whether what a former daemon has mounted on a path is a layer that can still be read.
func (f *FileSystem) Lives(at string) bool {
	return isEROFS(at) && (f.link.taken || f.noted(at) == kindData)
}

// reopen gives the kernel a file back that it has open.
func (f *FileSystem) reopen(o opens) error {
	s, err := f.acquire(o.target())
	if err != nil {
		return err
	}
	f.mu.Lock()
	s.opens = o.Count
	f.mu.Unlock()
	s.mounted.Store(true)
	err = f.offer(s)
	f.release(s, false) // opens holds it
	return err
}

// adopt takes over a mount.
func (f *FileSystem) adopt(ctx context.Context, mp lazy.Mountpoint) error {
	t, err := lazy.ParseLabels(mp.Labels)
	if err != nil {
		return err
	}
	p, leave, err := f.enter(ctx, mp.Path)
	if err != nil {
		return err
	}
	defer leave()
	f.mu.Lock()
	skip := f.gone[mp.Path] || p.s != nil
	f.mu.Unlock()
	if skip {
		return nil
	}
	s, err := f.acquire(t)
	if err != nil {
		return err
	}
	k := f.noted(mp.Path)
	f.mu.Lock()
	p.s, p.kind = s, k
	f.mu.Unlock()
	s.mounted.Store(true)
	if k == kindBlobs {
		if err := f.offer(s); err != nil {
			return err
		}
	}
	if k == kindBlobs || f.claimed(s.digest) { // the former daemon may have ended before it compared the index
		f.background(s)
	}
	return nil
}

// mountAgain makes a lost mount.
func (f *FileSystem) mountAgain(ctx context.Context, mp lazy.Mountpoint) error {
	p, leave, err := f.enter(ctx, mp.Path)
	if err != nil {
		return err
	}
	defer leave()
	f.mu.Lock()
	skip := f.gone[mp.Path] || p.s != nil
	f.mu.Unlock()
	if skip {
		return nil
	}
	return f.remount(ctx, p, mp.Path, mp.Labels)
}
