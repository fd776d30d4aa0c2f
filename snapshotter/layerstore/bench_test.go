package layerstore

import (
	"bytes"
	"context"
	"sync"
	"testing"
	"time"
)

// Reads of present chunks, of a layer that is not full and of one that is.
func BenchmarkReadPresent(b *testing.B) {
	sm := newSample(1, 64<<20)
	s := openStore(b, b.TempDir(), Options{})
	lazy := create(b, s, sm, newMemory(sm.blob))
	half := []Range{{Off: 0, Len: 32 << 20}}
	if err := lazy.Prefetch(b.Context(), half); err != nil {
		b.Fatal(err)
	}
	eager := newSample(2, 64<<20)
	full := unpack(b, s, eager)
	if err := full.Complete(b.Context()); err != nil {
		b.Fatal(err)
	}
	for _, h := range []*Layer{lazy, full} {
		h.l.rec.on.Store(false)
	}
	for _, c := range []struct {
		name string
		h    *Layer
		n    int
	}{{"lazy4K", lazy, 4 << 10}, {"full4K", full, 4 << 10}, {"lazy128K", lazy, 128 << 10}, {"full128K", full, 128 << 10}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(int64(c.n))
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, c.n)
				ctx := context.Background()
				off := int64(0)
				for pb.Next() {
					if err := c.h.ReadAt(ctx, p, off); err != nil {
						b.Fatal(err)
					}
					off = (off + 1<<20 + 4096) % (31 << 20)
				}
			})
		})
	}
}

// link is a Blob behind a link of 25 MB/s (200 Mbit/s) and 10 ms.
type link struct {
	*memory
	mu   sync.Mutex
	free time.Time
}

func (l *link) ReadAt(ctx context.Context, p []byte, off int64, prio Priority) (int, error) {
	l.mu.Lock()
	now := time.Now()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(len(p)) * time.Second / 25e6)
	at := l.free.Add(10 * time.Millisecond)
	l.mu.Unlock()
	time.Sleep(time.Until(at))
	return l.memory.ReadAt(ctx, p, off, prio)
}

func BenchmarkColdSequential(b *testing.B) {
	for _, c := range []struct {
		name string
		slow bool
	}{{"memory", false}, {"200Mbit10ms", true}} {
		for _, fill := range []bool{false, true} {
			name := c.name + "/read"
			if fill {
				name = c.name + "/complete"
			}
			b.Run(name, func(b *testing.B) {
				sm := newSample(1, 64<<20)
				b.SetBytes(int64(len(sm.data)))
				p := make([]byte, 128<<10)
				for range b.N {
					b.StopTimer()
					s := openStore(b, b.TempDir(), Options{})
					h := create(b, s, sm, newMemory(sm.blob))
					if c.slow {
						lk := &link{memory: newMemory(sm.blob)}
						h.SetSource(func(context.Context) (Blob, error) { return lk, nil })
					}
					b.StartTimer()
					if fill {
						if err := h.Complete(context.Background()); err != nil {
							b.Fatal(err)
						}
						continue
					}
					for off := int64(0); off < h.Size(); off += int64(len(p)) {
						if err := h.ReadAt(context.Background(), p, off); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

func BenchmarkUnpack(b *testing.B) {
	sm := newSample(1, 64<<20)
	s := openStore(b, b.TempDir(), Options{})
	b.SetBytes(int64(len(sm.data)))
	for range b.N {
		h, err := s.Unpack(context.Background(), sm.desc(), bytes.NewReader(sm.blob))
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		h.Close()
		if err := s.Remove(sm.x.Blob); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
