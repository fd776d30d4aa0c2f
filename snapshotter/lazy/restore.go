package lazy

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

// restoreParallel is how many layers are mounted again side by side. Each waits for
// two or three round trips unless the store has the bytes; eight keep a node with
// a hundred layers from starting them one after another, and leave the registry alone.
const restoreParallel = 8

// Mountpoint is a folder that should have a layer mounted, and the labels its snapshot
// was made with.
type Mountpoint struct {
	Path   string
	Labels map[string]string
}

// Restore mounts again what a former daemon had mounted, as far as it can be done now,
// and returns how many mounts failed; those are tried again by Check. Snapshots that
// are removed in the meantime are left out. It may run beside all other methods,
// but not twice at once.
func (f *FileSystem) Restore(ctx context.Context, points []Mountpoint) (failed int) {
	f.mu.Lock()
	f.gone = make(map[string]bool)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.gone = nil
		f.mu.Unlock()
	}()
	var bad atomic.Int64
	var g errgroup.Group
	g.SetLimit(restoreParallel)
	for _, mp := range points {
		g.Go(func() error {
			if err := f.restore(ctx, mp); err != nil {
				bad.Add(1)
				f.log.Warn("a lazy layer could not be mounted again; it is tried again when it is next used", "mountpoint", mp.Path, "error", err)
			}
			return nil
		})
	}
	g.Wait()
	return int(bad.Load())
}

func (f *FileSystem) restore(ctx context.Context, mp Mountpoint) error {
	p, leave, err := f.enter(ctx, mp.Path)
	if err != nil {
		return err
	}
	defer leave()
	f.mu.Lock()
	gone := f.gone[mp.Path]
	f.mu.Unlock()
	if gone || f.mountAt(mp.Path) != nil {
		return nil
	}
	return f.remount(ctx, p, mp.Path, mp.Labels)
}
