package blobfs

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// local is a complete file on the disk.
type local struct {
	f    *os.File
	size int64
	now  bool
}

func (l *local) Size() int64 { return l.size }

func (l *local) ReadAt(_ context.Context, p []byte, off int64) error {
	n, err := l.f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	return err
}

func (l *local) ReadNow(p []byte, off int64) (bool, error) {
	if !l.now {
		return false, nil
	}
	return true, l.ReadAt(context.Background(), p, off)
}

// newLocal is a file in the page cache.
func newLocal(b *testing.B, size int64, now bool) *local {
	b.Helper()
	f, err := os.Create(filepath.Join(b.TempDir(), "data"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	p := make([]byte, 1<<20)
	for off := int64(0); off < size; off += int64(len(p)) {
		fill(p, 1, off)
		if _, err := f.WriteAt(p, off); err != nil {
			b.Fatal(err)
		}
	}
	return &local{f, size, now}
}

// BenchmarkMiss reads what the kernel does not have, in steps of 128 KiB and through an
// EROFS file, from a complete file (at hand) and from one that goes through the pool.
// directio has the data nowhere but in the local file; cached, in the FUSE file too.
func BenchmarkMiss(b *testing.B) {
	const size = 256 << 20
	for _, c := range []struct {
		name, options string
		now           bool
		threads       int
		readahead     string // of the FUSE mount, KiB
	}{
		{"directio/prompt/1", ",directio", true, 1, "128"},
		{"directio/prompt/4", ",directio", true, 4, "128"},
		{"directio/pool/1", ",directio", false, 1, "128"},
		{"directio/pool/4", ",directio", false, 4, "128"},
		{"cached/prompt/1", "", true, 1, "128"},
		{"cached/pool/1", "", false, 1, "128"},
		{"cached/prompt/1/readahead1M", "", true, 1, "1024"},
	} {
		b.Run(c.name, func(b *testing.B) {
			s, mnt := serve(b, Options{})
			if err := s.Add(5, "f", newLocal(b, size, c.now)); err != nil {
				b.Fatal(err)
			}
			plain, err := unix.Open(filepath.Join(mnt, "f"), unix.O_RDONLY, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(plain)
			var st unix.Stat_t
			if err := unix.Fstat(plain, &st); err != nil {
				b.Fatal(err)
			}
			bdi := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
			if err := os.WriteFile(bdi, []byte(c.readahead), 0); err != nil {
				b.Skip("the readahead cannot be set: ", err)
			}
			f, err := os.Open(erofsOver(b, filepath.Join(mnt, "f"), size, c.options))
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
				unix.Fadvise(plain, 0, 0, unix.FADV_DONTNEED)
				before := s.Stats().Bytes
				b.StartTimer()
				var all sync.WaitGroup
				for i := range int64(c.threads) {
					all.Go(func() {
						part := int64(size / c.threads)
						if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.NewSectionReader(f, i*part, part), make([]byte, 128<<10)); err != nil {
							b.Error(err)
						}
					})
				}
				all.Wait()
				if got := s.Stats().Bytes - before; got < size*9/10 {
					b.Fatalf("only %d bytes were misses", got)
				}
			}
		})
	}
}

// BenchmarkRandomMiss is the round trip of 4 KiB.
func BenchmarkRandomMiss(b *testing.B) {
	const size = 64 << 20
	for name, now := range map[string]bool{"prompt": true, "pool": false} {
		b.Run(name, func(b *testing.B) {
			s, mnt := serve(b, Options{})
			if err := s.Add(5, "f", newLocal(b, size, now)); err != nil {
				b.Fatal(err)
			}
			fd, err := unix.Open(filepath.Join(mnt, "f"), unix.O_RDONLY|unix.O_DIRECT, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer unix.Close(fd)
			p := make([]byte, 4096)
			for b.Loop() {
				if _, err := unix.Pread(fd, p, rand.Int64N(size/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkHandle is the cost of a READ that is at hand without the kernel: no
// allocation.
func BenchmarkHandle(b *testing.B) {
	s := newServer(Options{})
	f := newLocal(b, 1<<20, true)
	s.Add(2, "a", f)
	w := newWorker(s)
	arg := make([]byte, 40)
	native.PutUint32(arg[16:], maxRead)
	m := message(opRead, 2, arg)
	b.ReportAllocs()
	b.SetBytes(maxRead)
	for b.Loop() {
		w.handle(m)
	}
}
