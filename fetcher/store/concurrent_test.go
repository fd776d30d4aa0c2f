package store

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Suppliers race for the pieces with bytes of their own. Whoever marks first, from then on the piece does not change, and its record
// fits it.
func TestWritesRaceMarks(t *testing.T) {
	const size, writers = 8 * 64 * kib, 4
	_, d := content(size)
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	b := openBlob(t, s, d, size)

	marked := make([]atomic.Uint32, b.Pieces()) // CRC as seen right after the mark
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			p := bytes.Repeat([]byte{byte(w + 1)}, 64*kib)
			buf := make([]byte, 64*kib)
			for range 3 {
				for _, i := range rnd.Perm(b.Pieces()) {
					off, n := b.PieceRange(i)
					step := int64(1+rnd.IntN(4)) * 32 * kib
					for o := int64(0); o < n; o += step {
						k, err := b.WriteAt(p[:min(step, n-o)], off+o)
						if errors.Is(err, ErrHeld) && k == 0 {
							break
						}
						if err != nil {
							t.Error(err)
						}
					}
					if err := b.MarkPiece(i, Source(1+w%3)); err != nil {
						t.Error(err)
					}
					if k, err := b.ReadAt(buf, off); err != nil || int64(k) != n {
						t.Error(k, err)
					}
					crc := crc32.Checksum(buf[:n], castagnoli)
					if old := marked[i].Swap(crc); old != 0 && old != crc {
						t.Errorf("piece %d changed after it was marked", i)
					}
				}
			}
		})
	}
	wg.Add(1)
	go func() { // and somebody who only watches
		defer wg.Done()
		for b.Frontier() < b.Pieces() {
			<-b.Changed()
		}
	}()
	wg.Wait()
	if len(b.state.busy) != 0 {
		t.Errorf("still busy: %v", b.state.busy)
	}
	f, err := os.Open(filepath.Join(s.blobDir(d), filePieces))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n := 0
	if _, err := readPieces(f, piecesLen(size), func(i int, _ Source, crc uint32) {
		n++
		if crc != marked[i].Load() {
			t.Errorf("piece %d: the record does not fit the bytes", i)
		}
	}); err != nil || n != b.Pieces() {
		t.Error(n, err)
	}
}

// A write waits for a mark of its piece and then finds it held; a mark waits for a write in flight. Nothing waits for other pieces.
func TestWriteAndMarkWait(t *testing.T) {
	const size = 3 * 64 * kib
	data, d := content(size)
	b := openBlob(t, openStore(t, t.TempDir(), 0), d, size)
	st := b.state
	setBusy := func(i, n int) {
		st.mu.Lock()
		if st.busy[i] = n; n == 0 {
			delete(st.busy, i)
		}
		st.idle.Broadcast()
		st.mu.Unlock()
	}
	done := make(chan error, 1)
	waits := func(what string) {
		t.Helper()
		select {
		case err := <-done:
			t.Errorf("%s did not wait: %v", what, err)
		case <-time.After(20 * time.Millisecond):
		}
	}

	setBusy(1, -1) // somebody marks piece 1
	go func() {
		_, err := b.WriteAt(data[:128*kib], 0)
		done <- err
	}()
	waits("a write across a piece that is being marked")
	put(t, b, data, 2)
	setBusy(1, 0) // that failed
	if err := <-done; err != nil {
		t.Error(err)
	}

	setBusy(0, 1) // somebody writes piece 0
	go func() { done <- b.MarkPiece(0, Origin) }()
	waits("a mark of a piece that is being written")
	if b.Has(0) {
		t.Error("held while it is written")
	}
	setBusy(0, 0)
	if err := <-done; err != nil || !b.Has(0) {
		t.Error(err)
	}

	// What Verify read is not what is held now.
	put(t, b, data, 1)
	before := st.cleared
	b.ClearPieces(func(i int, _ Source) bool { return i == 1 })
	put(t, b, data, 1)
	want(t, "finish after a clear", st.finish(d, before), ErrMissing)
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

// Whoever holds the lock of use has the folder that the path names, whatever was removed between its open and its lock.
func TestLockUseRacesRemoval(t *testing.T) {
	s := openStore(t, t.TempDir(), 0)
	_, d := content(10)
	dir := s.blobDir(d)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if l, err := lockRemove(dir); err == nil && l != nil {
				if old, err := s.trash(dir); err == nil {
					s.delete(old)
				}
				l.Close()
			}
		}
	})
	var n int
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); n++ {
		f, err := lockUse(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		if !samePath(f, f.Name()) {
			t.Error("locked what is gone")
			f.Close()
			break
		}
		f.Close()
	}
	close(stop)
	wg.Wait()
	t.Logf("%d locks", n)
}

// Everything at once on few digests: handles come and go, pieces too, blobs are evicted and removed. What is read is always right.
func TestChaos(t *testing.T) {
	sizes := []int{64*kib + 1, 3 * 64 * kib, 5*64*kib - 1}
	dir := t.TempDir()
	stores := []*Store{openStore(t, dir, 3*mib), openStore(t, dir, 3*mib)} // flock sees them as two processes
	rounds := 30
	var wg sync.WaitGroup
	for w := range 6 {
		wg.Go(func() {
			s := stores[w%2]
			rnd := rand.New(rand.NewPCG(2, uint64(w)))
			for range rounds {
				data, d := content(sizes[rnd.IntN(len(sizes))])
				b, err := s.Blob(t.Context(), d, int64(len(data)))
				if errors.Is(err, ErrQuota) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				for _, i := range rnd.Perm(b.Pieces()) {
					off, n := b.PieceRange(i)
					if !b.Has(i) {
						_, err := b.WriteAt(data[off:off+n], off)
						if err == nil {
							err = b.MarkPiece(i, Peer)
						}
						if err != nil && !errors.Is(err, ErrHeld) {
							t.Error(err)
						}
					}
					buf := make([]byte, n)
					if _, err := b.ReadAt(buf, off); err == nil {
						if !bytes.Equal(buf, data[off:off+n]) {
							t.Error("wrong bytes")
						}
					} else if !errors.Is(err, ErrMissing) {
						t.Error(err)
					}
				}
				switch rnd.IntN(4) {
				case 0:
					b.ClearPieces(func(i int, _ Source) bool { return rnd.IntN(2) == 0 })
				default:
					if err := b.Verify(t.Context()); err != nil && !errors.Is(err, ErrMissing) {
						t.Error(err)
					}
				}
				if err := b.Close(); err != nil {
					t.Error(err)
				}
				switch rnd.IntN(6) {
				case 0:
					s.Remove(d)
				case 1:
					s.MakeRoom(t.Context(), 2*mib)
				case 2:
					if _, err := s.List(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

// Two handles of one digest are one blob; the first to come opens it for both.
func TestShared(t *testing.T) {
	const size = 2 * 64 * kib
	data, d := content(size)
	s := openStore(t, t.TempDir(), 0)
	var wg sync.WaitGroup
	bs := make([]*Blob, 8)
	for i := range bs {
		wg.Go(func() {
			var err error
			if bs[i], err = s.Blob(t.Context(), d, size); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	put(t, bs[0], data, 0, 1)
	if !bs[7].Has(1) {
		t.Fatal("handles do not share")
	}
	if err := bs[3].Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, b := range bs {
		if !b.Complete() {
			t.Error("not complete for all")
		}
		if err := b.Close(); err != nil || b.Close() != nil {
			t.Error(i, err)
		}
	}
	if len(s.open) != 0 {
		t.Error("still open")
	}
}

func BenchmarkWriteAndMark(b *testing.B) {
	const size = 64 * mib
	data, d := content(size)
	for _, c := range []struct {
		name string
		mark func(bl *Blob, i int, p []byte) error
	}{
		{"MarkPiece", func(bl *Blob, i int, _ []byte) error { return bl.MarkPiece(i, Origin) }},
		{"MarkPieceCRC", func(bl *Blob, i int, p []byte) error {
			return bl.MarkPieceCRC(i, Origin, crc32.Checksum(p, castagnoli))
		}},
	} {
		b.Run(c.name, func(b *testing.B) {
			s := openStore(b, b.TempDir(), 0)
			bl := openBlob(b, s, d, size)
			b.SetBytes(64 * kib)
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				i := n % bl.Pieces()
				if i == 0 {
					bl.ClearPieces(func(int, Source) bool { return true })
				}
				off, n := bl.PieceRange(i)
				if _, err := bl.WriteAt(data[off:off+n], off); err != nil {
					b.Fatal(err)
				}
				if err := c.mark(bl, i, data[off:off+n]); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkReadAt(b *testing.B) {
	const size = 64 * mib
	data, d := content(size)
	s := openStore(b, b.TempDir(), 0)
	bl := openBlob(b, s, d, size)
	put(b, bl, data, all(bl)...)
	for _, n := range []int{4 * kib, 128 * kib, mib} {
		b.Run(fmt.Sprintf("%dKiB", n/kib), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, n)
				for pb.Next() {
					off := rand.Int64N(int64(size - n))
					if _, err := bl.ReadAt(p, off); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
