package layerstore

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
)

// headroom is the part of the quota (one in headroom) that only reads that somebody
// waits for may fill: the background shall not be why a container cannot read.
const headroom = 20

// passedEvery is how often the log says that the quota is passed.
const passedEvery = time.Minute

// Usage is what a store takes.
type Usage struct {
	Bytes    int64 // on disk, as the file system counts
	Layers   int
	Complete int // of the layers
	InUse    int // layers with an open handle
}

// Usage looks at the disk: what counts are the blocks of all files, those of layers on
// their way in or out among them.
func (s *Store) Usage() Usage {
	var u Usage
	for _, sub := range []string{dirLayers, dirNew, dirBroken, dirTrash} {
		found, _ := os.ReadDir(filepath.Join(s.dir, sub))
		for _, e := range found {
			u.Bytes += onDisk(filepath.Join(s.dir, sub, e.Name()))
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u.Layers = len(s.layers)
	u.InUse = len(s.leases)
	for _, l := range s.layers {
		if l.complete.Load() {
			u.Complete++
		}
	}
	return u
}

// Usage is what the layer's files take on disk, in bytes.
func (h *Layer) Usage() int64 {
	h.l.mu.Lock()
	dir := h.l.dir
	h.l.mu.Unlock()
	return onDisk(dir)
}

// charge counts n bytes that are about to be written (to l, unless it is nil), after
// room was made for them. Demand goes beyond the quota: that bounds what is kept, and is no
// reason to fail a container.
func (s *Store) charge(l *layer, n int64, prio Priority) error {
	most := s.opts.Quota
	if prio == Background {
		most -= most / headroom
	}
	for {
		used := s.charged.Load()
		if s.opts.Quota > 0 && used+n > most {
			if s.evict(used + n - most) {
				continue
			}
			if prio < Demand {
				return fmt.Errorf("%w: %d of the %d bytes of the quota are in use", ErrNoSpace, used, s.opts.Quota)
			}
			s.passed(used + n)
		}
		if s.charged.CompareAndSwap(used, used+n) {
			break
		}
	}
	if l != nil {
		l.charged.Add(n)
	}
	return nil
}

// passed tells the log that more is in use than the quota allows.
func (s *Store) passed(used int64) {
	now, last := time.Now(), s.told.Load()
	if last != nil && now.Sub(*last) < passedEvery || !s.told.CompareAndSwap(last, &now) {
		return
	}
	s.log.Warn("Containers read more than the quota of layers has room for. It is kept beyond the quota, and nothing else is; raise it, or run fewer images.",
		"bytes", used, "quota", s.opts.Quota)
}

func (s *Store) refund(l *layer, n int64) {
	s.charged.Add(-n)
	l.charged.Add(-n)
}

// evict removes the layers that nobody has open, the longest unused first, until n
// bytes came free. It reports whether any did.
func (s *Store) evict(n int64) bool {
	var freed int64
	for freed < n {
		l := s.takeOldest()
		if l == nil {
			break
		}
		size := l.charged.Load()
		s.log.Info("A layer that nobody uses was evicted.", "layer", l.info.Blob, "bytes", size)
		err := s.discard(l)
		l.opening.Unlock()
		if err != nil {
			s.log.Warn("Could not remove an evicted layer.", "layer", l.info.Blob, "error", err)
			continue
		}
		freed += size
	}
	return freed > 0
}

// takeOldest takes the layer that was unused the longest out of the store, and holds
// its opening. Layers that are just being opened or closed are passed over.
func (s *Store) takeOldest() *layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	var oldest *layer
	for _, l := range s.layers {
		if l.refs > 0 || s.leases[l] || oldest != nil && !l.lastUsed.Before(oldest.lastUsed) {
			continue
		}
		if l.opening.TryLock() {
			if oldest != nil {
				oldest.opening.Unlock()
			}
			oldest = l
		}
	}
	if oldest == nil {
		return nil
	}
	if err := s.unlinkLocked(oldest); err != nil {
		oldest.opening.Unlock()
		s.log.Error("A layer could not be evicted.", "layer", oldest.info.Blob, "error", err)
		return nil
	}
	return oldest
}

// Remove takes a layer out of the store. What fills it is cancelled. Who has it open
// can go on reading it, as with a file that was unlinked; its space comes free when
// the last handle is closed.
func (s *Store) Remove(d digest.Digest) error {
	s.mu.Lock()
	l := s.layers[d]
	if l == nil {
		s.mu.Unlock()
		return fmt.Errorf("%s: %w", d, ErrNotFound)
	}
	if err := s.unlinkLocked(l); err != nil {
		s.mu.Unlock()
		return err
	}
	inUse := l.refs > 0 || s.leases[l]
	s.mu.Unlock()

	if !inUse {
		l.opening.Lock()
		defer l.opening.Unlock()
		return s.discard(l)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removed = true
	for _, r := range l.runs {
		if r.demand <= r.next {
			r.dying = true
			r.cancel()
		}
	}
	return nil
}

// unlinkLocked takes a layer out of the store, and its folder out of the way of another
// of its name. Called with mu held.
func (s *Store) unlinkLocked(l *layer) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	to := s.asideNameLocked(dirTrash)
	if err := os.Rename(l.dir, to); err != nil {
		return fmt.Errorf("remove layer %s: %w", l.info.Blob, err)
	}
	l.dir = to
	l.gone = true
	delete(s.layers, l.info.Blob)
	return nil
}

// discard deletes a layer that is gone and that nobody has open. Called with opening
// held.
func (s *Store) discard(l *layer) error {
	if err := os.RemoveAll(l.path("")); err != nil {
		return fmt.Errorf("remove layer %s: %w", l.info.Blob, err)
	}
	s.charged.Add(-l.charged.Swap(0))
	return nil
}
