package snapshotter

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// shelf is a keeper.Store that outlives daemons as systemd does.
type shelf struct {
	mu    sync.Mutex
	files map[string]*os.File
}

var _ keeper.Store = (*shelf)(nil)

func (s *shelf) Put(_ context.Context, name string, f *os.File) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[name] != nil {
		return fs.ErrExist
	}
	d, err := again(f)
	s.files[name] = d
	return err
}

func (s *shelf) Get(_ context.Context, name string) (*os.File, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files[name] == nil {
		return nil, fs.ErrNotExist
	}
	return again(s.files[name])
}

func (s *shelf) Drop(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.files[name]
	if f == nil {
		return fs.ErrNotExist
	}
	delete(s.files, name)
	return f.Close()
}

func (s *shelf) List(context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.files)), nil
}

func (s *shelf) Close() error { return nil }

// again is the same open file once more.
func again(f *os.File) (d *os.File, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := raw.Control(func(fd uintptr) {
		var n int
		if n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3); err == nil {
			d = os.NewFile(uintptr(n), f.Name())
		}
	})
	return d, errors.Join(err, cerr)
}

// TestEROFSBeside: with systemd's store of open files beside the keeper either may be lost along with the daemon, and what
// containers read waits for the next one. Each gets what the other has.
func TestEROFSBeside(t *testing.T) {
	img := lazytest.NewImage()
	part, want := layerOf(t, lazytest.EStargz, "part")
	img.Add(part)
	let := img.Hold()
	defer let()
	r := newEROFS(t, img)
	r.layer("part", "", part)
	f, err := os.Open(filepath.Join(mountsBelow(t, filepath.Join(r.root, "snapshots"))[0], "part"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &shelf{files: map[string]*os.File{}}
	empty := func() {
		names, _ := s.List(t.Context())
		for _, n := range names {
			if err := s.Drop(t.Context(), n); err != nil {
				t.Error(err)
			}
		}
	}
	defer empty()
	r.erofs.Beside = s
	restart := func(what string, lose func(), off int) {
		t.Helper()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		lose()
		read := make(chan error, 1)
		go func() {
			b := make([]byte, lazytest.ChunkSize)
			_, err := f.ReadAt(b, int64(off))
			if err == nil && string(b) != want[off:off+len(b)] {
				err = errors.New("wrong bytes")
			}
			read <- err
		}()
		select {
		case err := <-read:
			t.Fatalf("%s: a read ended without a daemon: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
		r.open(nil)
		select {
		case err := <-read:
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: a read waits though there is a daemon again", what)
		}
		if _, err := keeper.Dial(t.Context(), r.erofs.Socket); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if names, _ := s.List(t.Context()); len(names) != 1 {
			t.Errorf("%s: systemd has %q", what, names)
		}
	}
	restart("nothing is lost", func() {}, 0)
	restart("the keeper is lost", func() {
		if err := keeper.End(t.Context(), r.erofs.Socket); err != nil {
			t.Error(err)
		}
	}, len(want)/4)
	restart("systemd has lost it", empty, len(want)/2)
}
