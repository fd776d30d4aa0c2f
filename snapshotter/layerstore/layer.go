package layerstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// Layer is a handle on one layer: as long as it is open the layer is not evicted. All
// methods are safe for concurrent use.
type Layer struct {
	l      *layer
	closed atomic.Bool
}

// layer is what all handles on a layer share.
type layer struct {
	s      *Store
	info   info
	chunks chunkTable
	stats  counters

	// Guarded by s.mu.
	refs     int
	lastUsed time.Time
	gone     bool // no longer in s.layers; its folder goes with the last handle

	// opening is held by who opens or closes the files, and by who takes the folder
	// away; before any other lock.
	opening sync.Mutex
	flush   sync.Mutex // held by who syncs

	complete atomic.Bool // all of data was checked and synced
	full     atomic.Bool // all chunks are present
	charged  atomic.Int64
	dirty    atomic.Int64 // bytes written since the last sync

	// Set while the layer is open; see open.
	f       *os.File
	present *present // nil when it is complete
	has     bitset
	marks   bitset // chunks at which a sequential reader is to be gone ahead of
	rec     recorder

	wg sync.WaitGroup // of the runs

	mu       sync.Mutex // guards following
	dir      string
	opened   bool
	closing  bool
	removed  bool
	runs     []*run
	waits    map[int]chan struct{} // closed when that chunk has come
	followed []follower
	idx      *loaded       // nil when it is not needed
	done     chan struct{} // closed when complete is set

	waiting   bool      // the log was told that somebody waits, and not that this is over
	mentioned time.Time // when it was told

	src source
}

// Digest is that of the layer's blob.
func (h *Layer) Digest() digest.Digest { return h.l.info.Blob }

// DiffID is that of the layer's tar, "" when it is not known.
func (h *Layer) DiffID() digest.Digest { return h.l.info.DiffID }

// Size is the length of the data file.
func (h *Layer) Size() int64 { return h.l.info.DataSize }

// DataPath is the data file. Only when Completed may it be read past this package.
func (h *Layer) DataPath() string { return h.l.path(fileData) }

// MetaPath is the EROFS image whose one extra device is the data file.
func (h *Layer) MetaPath() string { return h.l.path(fileMeta) }

// Completed tells that the data file has all its bytes, checked and synced, and is not
// written to again.
func (h *Layer) Completed() bool { return h.l.complete.Load() }

// IndexSum is the digest of the layer's encoded index. Two layers of one blob and one
// IndexSum have the same data file, byte for byte; those of another index may not.
func (h *Layer) IndexSum() digest.Digest { return h.l.info.IndexSum }

// Implicit tells that the layer has things in directories that it leaves out, whose
// attributes are those of the layer below (index.Entry): its metadata image cannot know them.
func (h *Layer) Implicit() bool { return h.l.info.Implicit }

// SetSource names where missing chunks come from, from now on. open is called when the
// first one is needed, never for a layer that is complete, and again after it failed;
// its context is for the opening alone. The Blob is closed, if it can be, once the layer
// is complete, nobody has it open, or it has another source.
func (h *Layer) SetSource(open func(context.Context) (Blob, error)) {
	h.l.src.mu.Lock()
	h.l.src.open = open
	h.l.src.mu.Unlock()
	h.l.dropSource()
}

// ReadAt reads all of p from off, or returns an error. It waits for what is missing as
// long as ctx allows and the source can be hoped to deliver.
func (h *Layer) ReadAt(ctx context.Context, p []byte, off int64) error {
	l := h.l
	if h.closed.Load() {
		return fmt.Errorf("layer %s: %w", l.info.Blob, ErrClosed)
	}
	if off < 0 || int64(len(p)) > l.info.DataSize-off {
		return fmt.Errorf("layer %s has %d bytes, %d from %d were asked for", l.info.Blob, l.info.DataSize, len(p), off)
	}
	if len(p) == 0 {
		return nil
	}
	if full, rec := l.full.Load(), l.rec.on.Load(); !full || rec {
		first, last := l.chunks.at(off), l.chunks.at(off+int64(len(p))-1)
		if rec {
			l.rec.note(l, first, last)
		}
		if !full {
			if !l.has.all(first, last) {
				l.stats.demand.Add(1)
				if err := l.demand(ctx, off, first, last); err != nil {
					return err
				}
			} else if l.marks.any(first, last) {
				l.passed(off, first, last)
			}
		}
	}
	if _, err := l.f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read layer %s: %w", l.info.Blob, err)
	}
	return nil
}

// ReadNow is ReadAt when all of it is present. Otherwise it returns false at once and has
// read nothing.
func (h *Layer) ReadNow(p []byte, off int64) (bool, error) {
	l := h.l
	if h.closed.Load() || len(p) == 0 || off < 0 || int64(len(p)) > l.info.DataSize-off {
		return false, nil // ReadAt says what is wrong
	}
	if !l.full.Load() && !l.has.all(l.chunks.at(off), l.chunks.at(off+int64(len(p))-1)) {
		return false, nil
	}
	return true, h.ReadAt(context.Background(), p, off)
}

// Close lets go of the layer. Who closes the last handle waits for what is under way
// to stop, and for what was written to be synced.
func (h *Layer) Close() error {
	if h.closed.Swap(true) {
		return nil
	}
	return h.l.s.release(h.l)
}

func (l *layer) path(name string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return filepath.Join(l.dir, name)
}

// open makes the layer ready to be read, if it is not yet.
func (l *layer) open() (err error) {
	l.opening.Lock()
	defer l.opening.Unlock()
	if l.opened {
		return nil
	}
	f, err := os.OpenFile(l.path(fileData), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if st.Size() != l.info.DataSize {
		return fmt.Errorf("%s has %d bytes instead of %d", f.Name(), st.Size(), l.info.DataSize)
	}
	if !l.complete.Load() {
		p, err := openPresent(l.path(filePresent), l.chunks.len(), l.s.boot)
		if err != nil {
			return err
		}
		l.flush.Lock()
		l.present, l.has, l.marks = p, p.has, newBitset(l.chunks.len())
		l.flush.Unlock()
		// What this process did not write itself may still have to be synced.
		l.dirty.Store(1)
	}
	l.rec.begin(l)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.f = f
	l.opened, l.closing = true, false
	l.waits = map[int]chan struct{}{}
	l.followed = nil
	l.full.Store(l.present == nil || l.present.full())
	if l.full.Load() && !l.complete.Load() {
		l.s.flushSoon(l)
	}
	return nil
}

// shut is the opposite of open. Called with opening held, and nobody has a handle.
func (l *layer) shut() error {
	l.mu.Lock()
	if !l.opened {
		l.mu.Unlock()
		return nil
	}
	l.closing = true
	for _, r := range l.runs {
		r.dying = true
		r.cancel()
	}
	l.mu.Unlock()
	l.wg.Wait()
	err := errors.Join(l.rec.end(l), l.sync())
	l.dropSource()
	l.flush.Lock()
	defer l.flush.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.present != nil {
		err = errors.Join(err, l.present.close())
		l.present = nil
	}
	err = errors.Join(err, l.f.Close())
	l.idx = nil
	l.opened = false
	return err
}
