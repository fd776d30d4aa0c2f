package layerfs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/blobfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// served is a layer that is mounted, about to be, or still in use after its last mount went.
type served struct {
	digest  digest.Digest
	target  lazy.Target // as the first who wanted it named it
	mounted atomic.Bool // at any time

	refs int // mounts, and those about to mount; guarded by FileSystem.mu
	// opens is how often the kernel has its file of blobfs open: once for each EROFS that reads from it, also out of
	// sight below the overlay of a container. Changed with countMu held, too; guarded by FileSystem.mu.
	opens   int
	countMu sync.Mutex // held while opens and its note change

	mu     sync.Mutex // held by who opens or closes it; guards following
	h      *layerstore.Layer
	name   string // of its file in blobfs
	id     uint64
	fillMu sync.Mutex // guards following
	stop   context.CancelFunc
	filled chan struct{} // closed when the background's work has ended; nil before it begins

	offerMu sync.Mutex // guards offered
	offered bool       // blobfs has the file
}

// acquire opens a layer of the store. The caller releases it.
func (f *FileSystem) acquire(t lazy.Target) (*served, error) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil, errClosed
	}
	s := f.served[t.Layer]
	if s == nil {
		s = &served{digest: t.Layer, target: t}
		f.served[t.Layer] = s
	}
	s.refs++
	f.mu.Unlock()
	s.mu.Lock()
	err := s.openLocked(f)
	s.mu.Unlock()
	if err != nil {
		f.release(s, false)
		return nil, err
	}
	return s, nil
}

func (s *served) openLocked(f *FileSystem) error {
	if s.h != nil {
		return nil
	}
	h, err := f.store.Get(s.digest)
	if err != nil {
		return err
	}
	s.h = h
	s.mounted.Store(false)
	// The kernel keeps pages of an id as long as blobfs is mounted: it is of these bytes alone.
	sum := sha256.Sum256([]byte(s.digest.String() + " " + h.IndexSum().String()))
	s.id = binary.LittleEndian.Uint64(sum[:])>>3 | 1<<32 // below 1<<61, and not one of the first
	s.name = fmt.Sprintf("%.12s-%016x", s.digest.Encoded(), s.id)
	h.SetSource(func(ctx context.Context) (layerstore.Blob, error) {
		if f.o.Source == nil {
			return nil, errNoSource
		}
		return f.openBy(ctx, s.target, f.o.Source.Needed)
	})
	return nil
}

// errNoSource is why nothing can be opened when there is no Source.
var errNoSource = errors.New("this node fetches nothing")

// open finds a layer's blob.
func (f *FileSystem) open(ctx context.Context, t lazy.Target) (Blob, error) {
	if f.o.Source == nil {
		return nil, errNoSource
	}
	return f.openBy(ctx, t, f.o.Source.Blob)
}

// openBy is open with one of the Source's ways.
func (f *FileSystem) openBy(ctx context.Context, t lazy.Target, way func(context.Context, string, ocispec.Descriptor) (Blob, error)) (Blob, error) {
	desc, err := f.o.Source.Describe(ctx, t.Ref, t.Manifest, t.Layer)
	if err != nil {
		return nil, fmt.Errorf("the image's manifest could not be looked up: %w", err)
	}
	if desc.Digest != t.Layer {
		return nil, fmt.Errorf("the image's manifest has no layer %s", t.Layer)
	}
	return way(ctx, t.Ref, desc)
}

// release gives a reference back. With the last one the layer is closed; when it was mounted it
// leaves the store, too.
func (f *FileSystem) release(s *served, drop bool) {
	if drop {
		s.mounted.Store(true)
	}
	f.mu.Lock()
	s.refs--
	f.mu.Unlock()
	f.finish(s)
}

// finish closes a layer that nobody needs any more.
func (f *FileSystem) finish(s *served) {
	f.mu.Lock()
	needed := s.refs > 0 || s.opens > 0
	f.mu.Unlock()
	if needed {
		return
	}
	s.endFill()
	s.mu.Lock()
	defer s.mu.Unlock()
	f.mu.Lock()
	needed, closed := s.refs > 0 || s.opens > 0, f.closed
	f.mu.Unlock()
	if needed || s.h == nil || closed {
		if !needed && s.h == nil {
			f.forget(s)
		}
		return
	}
	f.withdraw(s)
	if s.mounted.Load() {
		if err := f.store.Remove(s.digest); err != nil && !errors.Is(err, layerstore.ErrNotFound) {
			f.log.Warn("a layer that nobody uses any more could not be removed", "digest", s.digest, "error", err)
		}
		f.unclaim(s.digest)
	}
	if err := s.h.Close(); err != nil {
		f.log.Warn("a layer could not be closed in order", "digest", s.digest, "error", err)
	}
	s.h = nil
	f.forget(s)
}

func (f *FileSystem) forget(s *served) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.refs == 0 && s.opens == 0 && f.served[s.digest] == s {
		delete(f.served, s.digest)
	}
}

// offer puts the layer's file into blobfs.
func (f *FileSystem) offer(s *served) error {
	s.offerMu.Lock()
	defer s.offerMu.Unlock()
	if s.offered {
		return nil
	}
	if err := f.link.server.Add(s.id, s.name, &dataFile{f: f, s: s, h: s.h}); err != nil {
		return fmt.Errorf("the data of layer %s cannot be served: %w", s.digest, err)
	}
	s.offered = true
	return nil
}

// settle takes a layer's file out of blobfs when no mount reads from it any more.
func (f *FileSystem) settle(s *served) {
	s.offerMu.Lock()
	defer s.offerMu.Unlock()
	f.mu.Lock()
	read := s.opens > 0 || f.closed
	for _, p := range f.places {
		read = read || p.s == s && p.kind == kindBlobs
	}
	f.mu.Unlock()
	if !read {
		f.withdrawLocked(s)
	}
}

func (f *FileSystem) withdraw(s *served) {
	s.offerMu.Lock()
	defer s.offerMu.Unlock()
	f.withdrawLocked(s)
}

func (f *FileSystem) withdrawLocked(s *served) {
	if !s.offered {
		return
	}
	s.offered = false
	if idle := f.link.server.Remove(s.id); idle != nil {
		<-idle // its reads were told to end
	}
}

// dataFile is a layer's data file for blobfs.
type dataFile struct {
	f *FileSystem
	s *served
	h *layerstore.Layer
}

var (
	_ blobfs.Prompt  = (*dataFile)(nil)
	_ blobfs.Counted = (*dataFile)(nil)
)

// Size implements blobfs.File.
func (d *dataFile) Size() int64 { return d.h.Size() }

// ReadAt implements blobfs.File.
func (d *dataFile) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.h.ReadAt(ctx, p, off)
}

// ReadNow implements blobfs.Prompt.
func (d *dataFile) ReadNow(p []byte, off int64) (bool, error) { return d.h.ReadNow(p, off) }

// Opened implements blobfs.Counted.
func (d *dataFile) Opened() { d.f.count(d.s, 1) }

// Released implements blobfs.Counted.
func (d *dataFile) Released() {
	f, s := d.f, d.s
	if f.count(s, -1) > 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.wg.Go(func() { f.settle(s); f.finish(s) })
	}
}

// count notes that the kernel has opened or closed a layer's file, for the next daemon too.
func (f *FileSystem) count(s *served, n int) int {
	s.countMu.Lock()
	defer s.countMu.Unlock()
	f.mu.Lock()
	s.opens = max(s.opens+n, 0)
	now := s.opens
	f.mu.Unlock()
	if err := f.noteOpens(s, now); err != nil {
		f.log.Error("who reads a layer cannot be noted: after the daemon's end containers may get errors", "digest", s.digest, "error", err)
	}
	return now
}
