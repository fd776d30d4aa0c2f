package blobfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestReadsThroughFuseAndErofs(t *testing.T) {
	s, mnt := serve(t, Options{})
	for id, f := range testFiles() {
		if err := s.Add(id, string('a'+rune(id)), f); err != nil {
			t.Fatal(err)
		}
	}
	l, err := os.ReadDir(mnt)
	if err != nil || len(l) != 3 || l[0].Name() != "c" {
		t.Fatalf("ReadDir: %v, %v", l, err)
	}
	for id, f := range testFiles() {
		path := filepath.Join(mnt, string('a'+rune(id)))
		st, err := os.Stat(path)
		if err != nil || st.Size() != f.Size() || st.Mode() != 0o400 {
			t.Fatalf("Stat: %v, %v", st, err)
		}
		if err := readAll(path, id); err != nil {
			t.Errorf("file %d: %v", id, err)
		}
		for _, options := range []string{"", ",directio"} {
			if err := readAll(erofsOver(t, path, f.Size(), options), id); err != nil {
				t.Errorf("file %d through EROFS%s: %v", id, options, err)
			}
		}
	}
	if _, err := os.Stat(filepath.Join(mnt, "z")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a name that is not there: %v", err)
	}
	if err := os.WriteFile(filepath.Join(mnt, "c"), nil, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing: %v", err)
	}
	if st := s.Stats(); st.Reads == 0 || st.Bytes == 0 || st.Errors != 0 || st.Files != 3 || st.Waiting != 0 || st.Waited == 0 {
		t.Errorf("Stats: %+v", st)
	}
}

func TestDirectoryOfManyFiles(t *testing.T) {
	s, mnt := serve(t, Options{})
	for id := uint64(2); id < 3002; id++ {
		if err := s.Add(id, strings.Repeat("n", 100)+string(rune('0'+id%10))+time.Duration(id).String(), &pattern{size: 1}); err != nil {
			t.Fatal(err)
		}
	}
	l, err := os.ReadDir(mnt)
	if err != nil || len(l) != 3000 {
		t.Fatalf("ReadDir: %d names, %v", len(l), err)
	}
	if i, err := l[2999].Info(); err != nil || i.Size() != 1 {
		t.Fatalf("Info: %v, %v", i, err)
	}
}

func TestAddRefuses(t *testing.T) {
	s := newServer(Options{})
	if err := s.Add(2, "a", &pattern{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id   uint64
		name string
		size int64
	}{{0, "b", 1}, {1, "b", 1}, {1 << 62, "b", 1}, {2, "b", 1}, {3, "a", 1}, {3, "", 1}, {3, "..", 1}, {3, "a/b", 1},
		{3, "a\x00", 1}, {3, strings.Repeat("x", 256), 1}, {3, "b", -1}} {
		if err := s.Add(c.id, c.name, &pattern{size: c.size}); err == nil {
			t.Errorf("Add(%d, %q) of %d bytes is accepted", c.id, c.name, c.size)
		}
	}
}

// A reader that is killed goes at once, whatever the File does. One that gets a signal
// it handles goes on reading.
func TestSignals(t *testing.T) {
	r := newRig(t)
	s, mnt := serve(t, Options{})
	for i, how := range []string{"plain", "", ",directio"} {
		// One file each: readahead that nobody waits for stays, and its pages are locked.
		id, f := uint64(7+i), newStuck(t, true)
		path := filepath.Join(mnt, fmt.Sprint(id))
		if err := s.Add(id, fmt.Sprint(id), f); err != nil {
			t.Fatal(err)
		}
		through := path
		if how != "plain" {
			through = erofsOver(t, path, f.Size(), how)
		}
		p := r.start("reader", "7:1000000:"+through)
		<-f.entered
		for range 3 { // Go's runtime handles it
			p.Process.Signal(unix.SIGURG)
			time.Sleep(20 * time.Millisecond)
		}
		select {
		case <-p.read:
			text, _ := p.end(unix.SIGKILL)
			t.Fatalf("a harmless signal ended the read: %s", text)
		case <-time.After(3 * watchEvery):
		}
		begin := time.Now()
		p.end(unix.SIGKILL)
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("the killed reader of %s took %v to end", through, d)
		}
		s.Remove(id)
	}
}

func TestRestoreWaits(t *testing.T) {
	s, mnt := serve(t, Options{Restore: 20 * time.Second})
	res := make(chan error, 1)
	go func() { res <- readAll(filepath.Join(mnt, "late"), 5) }()
	lost := readAsync(filepath.Join(mnt, "lost"), 0)
	time.Sleep(50 * time.Millisecond)
	if err := s.Add(5, "late", &pattern{seed: 5, size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := <-res; err != nil {
		t.Fatal(err)
	}
	s.Restored()
	if err := <-lost; !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that did not come back: %v", err)
	}
}

// What the kernel knows by its id fails with EIO when nobody adds it again.
func TestRestoreDeadline(t *testing.T) {
	s := newServer(Options{Restore: time.Minute, Log: slog.New(slog.DiscardHandler)})
	w := newWorker(s)
	if w.handle(message(opGetattr, 9, make([]byte, 16))); w.out.msg != nil {
		t.Fatal("it was answered before the deadline")
	}
	if s.Stats().Waiting != 1 {
		t.Fatal("it does not wait")
	}
	s.Restored()
	if st := s.Stats(); st.Waiting != 0 || st.Errors != 1 {
		t.Errorf("after the deadline: %+v", st)
	}
	w.handle(message(opGetattr, 9, make([]byte, 16)))
	if e := int32(native.Uint32(w.out.msg[4:])); e != -int32(unix.EIO) {
		t.Errorf("after the deadline it is answered with %d", e)
	}
}

// A mount that another version of us made may ask for more at once than ours does, and
// for more than there is.
func TestLargeReads(t *testing.T) {
	for _, now := range []bool{true, false} {
		s := newServer(Options{})
		if err := s.Add(2, "f", &pattern{seed: 2, size: 3<<20 + 10, now: now}); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct{ off, want int64 }{{0, 1 << 20}, {3 << 20, 10}, {4 << 20, 0}, {1<<63 - 1, 0}} {
			arg := make([]byte, 40)
			native.PutUint64(arg[8:], uint64(c.off))
			native.PutUint32(arg[16:], maxReadEver)
			before := s.Stats().Bytes
			newWorker(s).handle(message(opRead, 2, arg))
			s.reads.Wait()
			if st := s.Stats(); int64(st.Bytes-before) != c.want || st.Errors != 0 {
				t.Errorf("a MiB at %d: %d bytes, not %d; %d errors", c.off, st.Bytes-before, c.want, st.Errors)
			}
		}
	}
}

// What a container's user may read is EROFS's matter; the files themselves are root's.
func TestOtherUsers(t *testing.T) {
	s, mnt := serve(t, Options{})
	if err := s.Add(3, "f", &pattern{seed: 3, size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(mnt, "f")
	for _, options := range []string{"", ",directio"} {
		f, err := os.Open(erofsOver(t, path, 1<<20, options))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		res := make(chan error, 1)
		go func() {
			runtime.LockOSThread() // and never unlock: the thread ends with what it is now
			const nobody = 65534
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
				res <- errno
				return
			}
			got, want := make([]byte, 1<<20), make([]byte, 1<<20)
			fill(want, 3, 0)
			_, err := f.ReadAt(got, 0)
			if err == nil && !bytes.Equal(got, want) {
				err = errors.New("wrong bytes")
			}
			if _, oerr := unix.Open(path, unix.O_RDONLY, 0); !errors.Is(oerr, unix.EACCES) {
				err = errors.Join(err, fmt.Errorf("another user opens a layer's data: %v", oerr))
			}
			res <- err
		}()
		if err := <-res; err != nil {
			t.Errorf("EROFS%s: %v", options, err)
		}
	}
}

// Run ends when the Server is closed under it.
func TestCloseEndsRun(t *testing.T) {
	needFuse(t)
	store := &memory{files: map[string]*os.File{}}
	defer store.Close()
	dir := t.TempDir()
	dev, _, err := Connect(t.Context(), store, mountOf(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer unmount(mountOf(dir))
	s := New(dev, Options{})
	dev.Close()
	done := make(chan error, 1)
	go func() { done <- s.Run(context.Background()) }()
	if _, err := os.ReadDir(mountOf(dir)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error("Close:", err)
	}
	if err := <-done; err != nil {
		t.Error("Run:", err)
	}
	if err := s.Resend(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Resend after Close: %v", err)
	}
}

func TestUnmountEndsRun(t *testing.T) {
	needFuse(t)
	store := &memory{files: map[string]*os.File{}}
	defer store.Close()
	dir := t.TempDir()
	dev, _, err := Connect(t.Context(), store, mountOf(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer unmount(mountOf(dir))
	s := New(dev, Options{})
	dev.Close()
	defer s.Close()
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context()) }()
	if _, err := os.ReadDir(mountOf(dir)); err != nil {
		t.Fatal(err)
	}
	unmount(mountOf(dir))
	select {
	case err := <-done:
		if !errors.Is(err, ErrGone) {
			t.Errorf("Run: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("Run goes on after the unmount")
	}
}
