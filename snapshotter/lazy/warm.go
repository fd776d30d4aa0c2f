package lazy

import (
	"context"
	"time"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

const (
	// warmParallel is how many neighbours are looked at side by side: their tables
	// together are a few MiB, and the layer that is being mounted comes first.
	warmParallel = 4

	// warmFor is how long a neighbour counts as looked at. containerd prepares the
	// layers of an image within seconds of each other, and names the remaining ones each time.
	warmFor = 10 * time.Minute
)

// warm reads the tables of contents of the layers that containerd will prepare next.
// It prepares them one after another, and each would wait two round trips;
// read now, side by side, they are in the store by then.
func (f *FileSystem) warm(t Target) {
	now := time.Now()
	var todo []digest.Digest
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return
	}
	for d, at := range f.warmed {
		if now.Sub(at) > warmFor {
			delete(f.warmed, d)
		}
	}
	f.warmed[t.Layer] = now
	for _, d := range t.Neighbours {
		if _, ok := f.warmed[d]; !ok {
			f.warmed[d] = now
			todo = append(todo, d)
		}
	}
	if len(todo) > 0 {
		f.wg.Add(1) // under mu, so that Close waits for it
	}
	f.mu.Unlock()
	if len(todo) == 0 {
		return
	}
	go func() {
		defer f.wg.Done()
		ctx, cancel := context.WithTimeout(f.ctx, mountTimeout)
		defer cancel()
		var g errgroup.Group
		g.SetLimit(warmParallel)
		for _, d := range todo {
			g.Go(func() error {
				// Only the label of its own layer tells of a table, so neighbours need the manifest's word.
				n := Target{Ref: t.Ref, Manifest: t.Manifest, Layer: d}
				desc, ref, err := f.describe(ctx, n)
				if err != nil {
					return nil // its own Mount will say why
				}
				if blob, _, err := f.open(ctx, t.Ref, desc, ref); err == nil {
					blob.Close()
				}
				return nil
			})
		}
		g.Wait()
	}()
}
