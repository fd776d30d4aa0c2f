package blobfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stuck is a File that answers when it is told to, and may not care for its context.
type stuck struct {
	deaf    bool
	entered chan struct{}
	free    chan struct{}
}

func newStuck(t *testing.T, deaf bool) *stuck {
	f := &stuck{deaf: deaf, entered: make(chan struct{}, 1000), free: make(chan struct{})}
	t.Cleanup(func() { close(f.free) })
	return f
}

func (f *stuck) Size() int64 { return 1 << 30 }

func (f *stuck) ReadAt(ctx context.Context, p []byte, off int64) error {
	f.entered <- struct{}{}
	done := ctx.Done()
	if f.deaf {
		done = nil
	}
	select {
	case <-f.free:
		return errors.New("it was stuck")
	case <-done:
		return ctx.Err()
	}
}

// readAsync reads a page at off and reports how that went.
func readAsync(path string, off int64) <-chan error {
	res := make(chan error, 1)
	go func() {
		f, err := os.Open(path)
		if err == nil {
			_, err = f.ReadAt(make([]byte, 4096), off)
			f.Close()
		}
		res <- err
	}()
	return res
}

func wantEIO(t *testing.T, res <-chan error) {
	t.Helper()
	select {
	case err := <-res:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("a pending read ends with %v, not EIO", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a pending read does not end")
	}
}

func TestStuckFilesHoldNobodyUp(t *testing.T) {
	s, mnt := serve(t, Options{Reads: 16, ReadsPerFile: 8})
	var pending []<-chan error
	for id := uint64(10); id < 13; id++ {
		f := newStuck(t, true)
		if err := s.Add(id, string('a'+rune(id)), f); err != nil {
			t.Fatal(err)
		}
		for i := range int64(20) {
			pending = append(pending, readAsync(filepath.Join(mnt, string('a'+rune(id))), i<<20))
		}
		<-f.entered
	}
	if err := s.Add(3, "good", &pattern{seed: 3, size: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := readAll(filepath.Join(mnt, "good"), 3); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("reading beside stuck files took %v", d)
	}
	for id := uint64(10); id < 13; id++ {
		s.Remove(id)
	}
	for _, p := range pending {
		wantEIO(t, p)
	}
}

func TestRemove(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		s, mnt := serve(t, Options{})
		f := newStuck(t, deaf)
		if err := s.Add(7, "f", f); err != nil {
			t.Fatal(err)
		}
		open, err := os.Open(filepath.Join(mnt, "f"))
		if err != nil {
			t.Fatal(err)
		}
		defer open.Close()
		res := readAsync(filepath.Join(mnt, "f"), 0)
		<-f.entered
		idle := s.Remove(7)
		wantEIO(t, res)
		if !deaf {
			<-idle
		} else {
			select {
			case <-idle:
				t.Error("idle is told while the File is in ReadAt")
			default:
			}
		}
		if _, err := open.ReadAt(make([]byte, 10), 1<<20); !errors.Is(err, unix.EIO) {
			t.Errorf("a read of a removed file: %v", err)
		}
		if _, err := os.Stat(filepath.Join(mnt, "f")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the name of a removed file: %v", err)
		}
		if s.Remove(7) != nil {
			t.Error("removing it twice")
		}
		// Another file may have the name at once.
		if err := s.Add(8, "f", &pattern{seed: 8, size: 4096}); err != nil {
			t.Fatal(err)
		}
		if err := readAll(filepath.Join(mnt, "f"), 8); err != nil {
			t.Error(err)
		}
	}
}

func TestReadTimeout(t *testing.T) {
	s, mnt := serve(t, Options{ReadTimeout: 50 * time.Millisecond})
	if err := s.Add(7, "f", newStuck(t, true)); err != nil {
		t.Fatal(err)
	}
	wantEIO(t, readAsync(filepath.Join(mnt, "f"), 0))
	if s.Stats().Errors == 0 {
		t.Error("the error is not counted")
	}
}
