package layerstore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// restorers is how many layers are looked at side by side when a store is opened; they
// wait for the disk, not for the CPU.
const restorers = 16

// restore finds the layers on disk. It reads what is small, and leaves the rest to
// who opens a layer.
func (s *Store) restore() error {
	for _, sub := range []string{dirNew, dirTrash, dirBroken} {
		if err := empty(filepath.Join(s.dir, sub)); err != nil {
			return err
		}
	}
	found, err := os.ReadDir(filepath.Join(s.dir, dirLayers))
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(restorers)
	for _, e := range found {
		g.Go(func() error {
			l, err := s.restoreLayer(e.Name())
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				s.layers[l.info.Blob] = l
				s.charged.Add(l.charged.Load())
				return nil
			}
			err = fmt.Errorf("layer %s was set aside: %w", e.Name(), err)
			aside := filepath.Join(s.dir, dirBroken, e.Name())
			if merr := os.Rename(filepath.Join(s.dir, dirLayers, e.Name()), aside); merr != nil {
				err = errors.Join(err, merr)
			}
			s.broken = append(s.broken, err)
			return nil
		})
	}
	_ = g.Wait() // each error is in broken
	slices.SortFunc(s.broken, func(a, b error) int {
		if a.Error() < b.Error() {
			return -1
		}
		return 1
	})
	return nil
}

func empty(dir string) error {
	found, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range found {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) restoreLayer(name string) (*layer, error) {
	d, err := parseFolder(name)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(s.dir, dirLayers, name)
	in, chunks, err := readInfo(dir)
	if err != nil {
		return nil, err
	}
	if in.Blob != d {
		return nil, fmt.Errorf("it says that it is %s", in.Blob)
	}
	l := s.newLayer(dir, in, chunks)
	sizes := map[string]int64{fileIndex: in.IndexSize, fileMeta: in.MetaSize, fileData: in.DataSize}
	var st unix.Stat_t
	err = unix.Stat(filepath.Join(dir, fileComplete), &st)
	if l.complete.Store(err == nil); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		sizes[filePresent] = presentSize(chunks.len())
	} else {
		close(l.done)
	}
	for file, size := range sizes {
		if err := unix.Stat(filepath.Join(dir, file), &st); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if st.Size != size {
			return nil, fmt.Errorf("%s has %d bytes instead of %d", file, st.Size, size)
		}
		l.charged.Add(st.Blocks * 512)
	}
	if err := unix.Stat(filepath.Join(dir, fileInfo), &st); err != nil {
		return nil, err
	}
	l.charged.Add(st.Blocks * 512)
	// A time that is still to come is from before the clock was set back: it would be the latest for ever.
	if l.lastUsed = time.Unix(st.Mtim.Sec, st.Mtim.Nsec); time.Until(l.lastUsed) > 0 {
		l.lastUsed = time.Now()
	}
	return l, nil
}

func (s *Store) newLayer(dir string, in info, chunks chunkTable) *layer {
	return &layer{s: s, dir: dir, info: in, chunks: chunks, done: make(chan struct{}), lastUsed: time.Now()}
}
