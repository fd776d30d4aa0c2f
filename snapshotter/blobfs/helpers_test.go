package blobfs

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
)

// The test binary is also the daemon, the keeper and the readers of its tests: role
// says which.
const (
	roleEnv = "BLOBFS_TEST_ROLE"
	dirEnv  = "BLOBFS_TEST_DIR"
	argsEnv = "BLOBFS_TEST_ARGS"
	// roleLife is when a process of a test that forgot it ends by itself.
	roleLife = 10 * time.Minute
)

func TestMain(m *testing.M) {
	dir, args := os.Getenv(dirEnv), strings.Fields(os.Getenv(argsEnv))
	role := os.Getenv(roleEnv)
	if role == "" {
		goleak.VerifyTestMain(m)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), roleLife)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM)
	var err error
	switch role {
	case "keeper":
		err = keeper.Run(ctx, socketOf(dir))
	case "daemon":
		err = daemon(ctx, dir)
	case "selfish":
		err = selfish(ctx, dir)
	case "reader":
		err = storm(ctx, args)
	}
	stop()
	cancel()
	if err != nil {
		fmt.Println("ERROR", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func socketOf(dir string) string { return filepath.Join(dir, "keeper.sock") }
func mountOf(dir string) string  { return filepath.Join(dir, "blobs") }

// testFiles are what the daemons of the tests serve. The second is never at hand, the
// third waits as a network does.
func testFiles() map[uint64]File {
	return map[uint64]File{
		2: &pattern{seed: 2, size: 24<<20 + 4096, now: true},
		3: &pattern{seed: 3, size: 16 << 20},
		4: &pattern{seed: 4, size: 16 << 20, wait: 4 * time.Millisecond},
	}
}

// daemon is what a real one does at its start: take over, answer, restore.
func daemon(ctx context.Context, dir string) error {
	store, err := keeper.Dial(ctx, socketOf(dir))
	if err != nil {
		return err
	}
	dev, taken, err := Connect(ctx, store, mountOf(dir))
	if err != nil {
		return err
	}
	s := New(dev, Options{Restore: 30 * time.Second})
	dev.Close()
	defer s.Close()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if taken {
		if err := s.Resend(); err != nil {
			return err
		}
	}
	for id, f := range testFiles() {
		if err := s.Add(id, strconv.FormatUint(id, 10), f); err != nil {
			return err
		}
		time.Sleep(2 * time.Millisecond) // a restore reads its state from the disk
	}
	s.Restored()
	fmt.Println("serving", taken)
	return <-done
}

// selfish is a daemon that opens a file of its own mount, so that it waits for itself.
func selfish(ctx context.Context, dir string) error {
	lock, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		return err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return err
	}
	store, err := keeper.Dial(ctx, socketOf(dir))
	if err != nil {
		return err
	}
	dev, _, err := Connect(ctx, store, mountOf(dir))
	if err != nil {
		return err
	}
	s := New(dev, Options{Restore: time.Minute})
	go func() { // as mount(2) of EROFS would
		unix.Open(filepath.Join(mountOf(dir), "absent"), unix.O_RDONLY, 0)
	}()
	go func() {
		for s.Stats().Waiting == 0 {
			time.Sleep(time.Millisecond)
		}
		fmt.Println("serving selfish")
	}()
	return s.Run(ctx)
}

// pattern is a File whose bytes say where they are.
type pattern struct {
	seed uint64
	size int64
	now  bool
	wait time.Duration // at most
}

func (f *pattern) Size() int64 { return f.size }

func (f *pattern) ReadAt(ctx context.Context, p []byte, off int64) error {
	if f.wait > 0 {
		select {
		case <-time.After(rand.N(f.wait)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	fill(p, f.seed, off)
	return nil
}

func (f *pattern) ReadNow(p []byte, off int64) (bool, error) {
	if !f.now || off>>20%2 == 1 { // the odd MiB are "not there yet"
		return false, nil
	}
	fill(p, f.seed, off)
	return true, nil
}

func word(seed uint64, i int64) uint64 {
	x := (uint64(i) + seed<<40) * 0x9E3779B97F4A7C15
	return x ^ x>>29 | 1 // never zero
}

// fill writes what lies at off of the file of seed.
func fill(p []byte, seed uint64, off int64) {
	for len(p) > 0 {
		if off%8 == 0 && len(p) >= 8 {
			binary.LittleEndian.PutUint64(p, word(seed, off/8))
			p, off = p[8:], off+8
			continue
		}
		p[0] = byte(word(seed, off/8) >> (off % 8 * 8))
		p, off = p[1:], off+1
	}
}

// storm reads at random from files "SEED:SIZE:PATH" until ctx ends.
func storm(ctx context.Context, args []string) error {
	type target struct {
		f    *os.File
		seed uint64
		size int64
	}
	var l []target
	for _, a := range args {
		v := strings.SplitN(a, ":", 3)
		seed, _ := strconv.ParseUint(v[0], 10, 64)
		size, _ := strconv.ParseInt(v[1], 10, 64)
		f, err := os.Open(v[2])
		if err != nil {
			return err
		}
		defer f.Close()
		l = append(l, target{f, seed, size})
	}
	got, want := make([]byte, 512<<10), make([]byte, 512<<10)
	reads, slowest := 0, time.Duration(0)
	for ; ctx.Err() == nil; reads++ {
		t := l[rand.IntN(len(l))]
		off := rand.Int64N(t.size)
		n := int(min(1+rand.Int64N(int64(len(got))), t.size-off))
		if rand.IntN(4) > 0 {
			n = min(n, 1+rand.IntN(8192))
		}
		unix.Fadvise(int(t.f.Fd()), off, int64(n), unix.FADV_DONTNEED)
		begin := time.Now()
		if _, err := t.f.ReadAt(got[:n], off); err != nil {
			return fmt.Errorf("read of %d at %d: %w", n, off, err)
		}
		slowest = max(slowest, time.Since(begin))
		fill(want[:n], t.seed, off)
		if !bytes.Equal(got[:n], want[:n]) {
			return fmt.Errorf("wrong bytes in %d at %d of %s", n, off, t.f.Name())
		}
	}
	fmt.Println("reads", reads, "slowest", slowest.Round(time.Millisecond))
	return nil
}

// serve runs a Server in this process on a mount of its own.
func serve(t testing.TB, o Options) (*Server, string) {
	t.Helper()
	needFuse(t)
	dir := t.TempDir()
	store := &memory{files: map[string]*os.File{}}
	dev, _, err := Connect(context.Background(), store, mountOf(dir))
	if err != nil {
		t.Fatal(err)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := New(dev, o)
	dev.Close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if err := noPoll(s, mountOf(dir)); err != nil {
		t.Error(err)
	}
	t.Cleanup(func() {
		unmount(mountOf(dir))
		cancel()
		err := <-done
		if err != nil && !errors.Is(err, ErrGone) {
			t.Error("Run:", err)
		}
		s.Close()
		store.Close()
	})
	return s, mountOf(dir)
}

// noPoll has the kernel learn that there is no POLL. os.Open polls, under the lock of
// the runtime's poller, which the workers of this same process would need to answer it.
func noPoll(s *Server, mnt string) error {
	const id = 1<<62 - 1
	if err := s.Add(id, "poll", &pattern{}); err != nil {
		return err
	}
	fd, err := unix.Open(filepath.Join(mnt, "poll"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 1000)
	unix.Close(fd)
	s.Remove(id)
	return err
}

// memory is a Store that lives as long as its process.
type memory struct {
	mu    sync.Mutex
	files map[string]*os.File
}

func (m *memory) Put(_ context.Context, name string, f *os.File) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	fd, err := unix.Dup(int(rawFD(f)))
	m.files[name] = os.NewFile(uintptr(fd), name)
	return err
}

func (m *memory) Get(_ context.Context, name string) (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fd, err := unix.Dup(int(rawFD(m.files[name])))
	return os.NewFile(uintptr(fd), name), err
}

func (m *memory) Drop(_ context.Context, name string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := m.files[name].Close()
	delete(m.files, name)
	return err
}

func (m *memory) List(context.Context) ([]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var l []string
	for n := range m.files {
		l = append(l, n)
	}
	return l, nil
}

func (m *memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for n, f := range m.files {
		f.Close()
		delete(m.files, n)
	}
	return nil
}

func rawFD(f *os.File) (fd uintptr) {
	raw, _ := f.SyscallConn()
	raw.Control(func(n uintptr) { fd = n })
	return fd
}

// readAll reads the whole file in steps of 128 KiB and checks it against seed.
func readAll(path string, seed uint64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	got, want := make([]byte, 128<<10), make([]byte, 128<<10)
	for off := int64(0); ; {
		n, err := io.ReadFull(f, got)
		fill(want[:n], seed, off)
		if !bytes.Equal(got[:n], want[:n]) {
			return fmt.Errorf("wrong bytes at %d", off)
		}
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		}
		if err != nil {
			return err
		}
		off += int64(n)
	}
}
