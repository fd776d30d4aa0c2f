package layerfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
)

const (
	// unpackers bounds the layers that are unpacked side by side: each takes a core and up to 30 MiB.
	unpackers = 8
	// sweepEvery is how often layers that were brought and never mounted are looked for; they go when
	// they are found twice.
	sweepEvery = 10 * time.Minute
)

// New opens the store and takes over what a former daemon left, or begins anew; Restore has to follow.
// What a former daemon mounted and does not live (Lives) is the caller's to unmount. The caller closes it.
func New(ctx context.Context, o Options) (_ *FileSystem, err error) {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Quiet <= 0 {
		o.Quiet = quiet
	}
	for _, dir := range []string{dirMounts, dirOpens, dirClaims, dirMetas} {
		if err := os.MkdirAll(filepath.Join(o.State, dir), 0o700); err != nil {
			return nil, fmt.Errorf("the folder of the layers' mounts cannot be made: %w", err)
		}
	}
	st, err := layerstore.Open(o.Store, layerstore.Options{Quota: o.Quota, Meta: meta, Log: o.Log})
	if err != nil {
		return nil, err
	}
	for _, b := range st.Broken() {
		o.Log.Error("a layer could not be restored; it is fetched again when it is needed", "error", b)
	}
	l, err := newLink(ctx, o)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("layers cannot be mounted: %w", err), st.Close())
	}
	compares := &comparing{Source: o.Source}
	if o.Source != nil {
		o.Source = compares
	}
	f := &FileSystem{
		o: o, log: o.Log, store: st, link: l, mounter: newMounter(o.Mounter), compares: compares,
		unpack: make(chan struct{}, min(runtime.GOMAXPROCS(0), unpackers)),
		look:   make(chan struct{}, lookers), fill: make(chan struct{}, fillers), decode: make(chan struct{}, 1),
		words:  make(chan struct{}, 1),
		places: map[string]*place{}, served: map[digest.Digest]*served{}, pulls: map[string]*pull{},
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.wg.Go(func() { l.watch(f.ctx) })
	f.wg.Go(f.sweep)
	return f, nil
}

// meta writes the metadata image of a layer.
func meta(w io.Writer, x *index.Index) error {
	l, err := erofs.Plan(x.Blob, x.Entries, x.DataSize)
	if err != nil {
		return index.ErrNotIndexable{Err: err}
	}
	_, err = l.WriteTo(w)
	return err
}

// Failed is closed when data files cannot be served any more, for Err's reason: only a new start helps.
func (f *FileSystem) Failed() <-chan struct{} { return f.link.done }

// Err is why Failed was closed; nil after Close.
func (f *FileSystem) Err() error { return f.link.err }

// Close ends all work. The mounts stay, for containers and for the next daemon; when none of them
// reads from blobfs, that and the keeper end.
func (f *FileSystem) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	for _, p := range f.pulls {
		if p.idle != nil {
			p.idle.Stop()
		}
	}
	last := true
	var open []*served
	for _, s := range f.served {
		open = append(open, s)
		last = last && s.opens == 0
	}
	for _, p := range f.places {
		last = last && (p.s == nil || p.kind == kindData)
	}
	f.mu.Unlock()
	f.cancel()
	f.mounter.close()
	f.wg.Wait()
	var errs []error
	if last {
		errs = append(errs, f.link.destroy())
	} else {
		errs = append(errs, f.link.stop(), f.link.close())
	}
	for _, s := range open {
		s.mu.Lock()
		if s.h != nil {
			errs = append(errs, s.h.Close())
			s.h = nil
		}
		s.mu.Unlock()
	}
	return errors.Join(append(errs, f.store.Close())...)
}

// sweep removes layers that were brought and never mounted.
func (f *FileSystem) sweep() {
	seen := map[digest.Digest]bool{}
	for sleep(f.ctx, sweepEvery) == nil {
		unused := map[digest.Digest]bool{}
		for _, d := range f.store.Layers() {
			if !f.needed(d) {
				unused[d] = true
			}
		}
		for d := range unused {
			if !seen[d] || f.needed(d) {
				continue
			}
			if err := f.store.Remove(d); err != nil && !errors.Is(err, layerstore.ErrNotFound) {
				f.log.Warn("a layer that nobody uses could not be removed", "digest", d, "error", err)
			}
			f.unclaim(d)
		}
		seen = unused
	}
}

// needed tells whether a layer is in use, or asked for by a pull.
func (f *FileSystem) needed(d digest.Digest) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.served[d] != nil || f.gone != nil {
		return true
	}
	for _, p := range f.pulls {
		if p.jobs[d] != nil {
			return true
		}
	}
	return false
}

// Usage is what a layer takes on disk, in bytes; 0 when it is not in the store.
func (f *FileSystem) Usage(d digest.Digest) int64 {
	h, err := f.store.Get(d)
	if err != nil {
		return 0
	}
	defer h.Close()
	return h.Usage()
}
