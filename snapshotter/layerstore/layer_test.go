package layerstore

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

func TestMain(m *testing.M) {
	childMain()
	goleak.VerifyTestMain(m)
}

// flaky is a Blob of which every 40th read fails and every 60th is wrong.
type flaky struct{ *memory }

func (f flaky) ReadAt(ctx context.Context, p []byte, off int64, prio Priority) (int, error) {
	n, err := f.memory.ReadAt(ctx, p, off, prio)
	switch i := f.reads.Load(); {
	case i%40 == 39:
		return 0, errors.New("connection reset")
	case i%60 == 59 && n > 0:
		p[n/2] ^= 0x10
	}
	return n, err
}

func TestReadsOfMissingBytesAreRightUnderConcurrency(t *testing.T) {
	for _, how := range compressions {
		t.Run(string(how), func(t *testing.T) {
			sm := sampleOf(1, 24<<20+777, how)
			m := newMemory(sm.blob)
			m.delay.Store(int64(200 * time.Microsecond))
			s := openStore(t, t.TempDir(), Options{})
			h := create(t, s, sm, m)
			h.SetSource(func(context.Context) (Blob, error) { return flaky{m}, nil })
			var wg sync.WaitGroup
			for g := range 16 {
				wg.Go(func() {
					rnd := rand.New(rand.NewPCG(uint64(g), 1))
					p := make([]byte, 300<<10)
					for range 60 {
						n := 1 + rnd.IntN(len(p))
						off := rnd.IntN(len(sm.data) - n)
						ctx, cancel := t.Context(), func() {}
						if rnd.IntN(4) == 0 {
							ctx, cancel = context.WithTimeout(ctx, time.Duration(rnd.IntN(3000))*time.Microsecond)
						}
						err := h.ReadAt(ctx, p[:n], int64(off))
						cancel()
						if err != nil && !errors.Is(err, context.DeadlineExceeded) {
							t.Errorf("read %d from %d: %v", n, off, err)
							return
						}
						if err == nil && !bytes.Equal(p[:n], sm.data[off:off+n]) {
							t.Errorf("%d bytes from %d are wrong", n, off)
							return
						}
					}
				})
			}
			wg.Go(func() {
				if err := h.Complete(t.Context()); err != nil {
					t.Error(err)
				}
			})
			wg.Wait()
			if t.Failed() {
				return
			}
			if !h.Completed() {
				t.Fatal("not complete")
			}
			check(t, h, sm, 0, len(sm.data))
			if st := h.Stats(); st.PresentBytes != int64(len(sm.data)) || st.Why != "" || !st.Complete {
				t.Errorf("stats %+v", st)
			}
		})
	}
}

func TestReadOutsideTheLayerFails(t *testing.T) {
	sm := newSample(2, 1<<20)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, newMemory(sm.blob))
	for _, r := range [][2]int64{{-1, 1}, {1 << 20, 1}, {1<<20 - 1, 2}, {1 << 62, 1 << 10}} {
		if h.ReadAt(t.Context(), make([]byte, r[1]), r[0]) == nil {
			t.Errorf("read of %d from %d succeeded", r[1], r[0])
		}
	}
	if err := h.ReadAt(t.Context(), nil, 1<<20); err != nil {
		t.Error(err)
	}
}

var compressions = []index.Compression{index.Tar, index.Gzip, index.Zstd}

func TestSequentialReadDecodesOnceAndAhead(t *testing.T) {
	for _, how := range compressions {
		t.Run(string(how), func(t *testing.T) {
			sm := sampleOf(3, 32<<20, how)
			m := newMemory(sm.blob)
			m.delay.Store(int64(20 * time.Millisecond))
			h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
			for off := 0; off < len(sm.data); off += 128 << 10 {
				check(t, h, sm, off, 128<<10)
			}
			st := h.Stats()
			if st.DecodedTwice != 0 || st.FetchedBytes > int64(len(sm.blob))*21/20 {
				t.Errorf("%d chunks were decoded twice, %d bytes fetched for %d", st.DecodedTwice, st.FetchedBytes, len(sm.blob))
			}
			// One block after the other would take 96 times 20 ms.
			if st.Waited > 1200*time.Millisecond {
				t.Errorf("the reads waited for %v; most should have been decoded ahead", st.Waited)
			}
		})
	}
}

func TestCompletionDecodesOnce(t *testing.T) {
	for _, how := range compressions {
		t.Run(string(how), func(t *testing.T) {
			sm := sampleOf(4, 32<<20, how)
			m := newMemory(sm.blob)
			m.delay.Store(int64(time.Millisecond))
			h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
			if err := h.Complete(t.Context()); err != nil {
				t.Fatal(err)
			}
			if st := h.Stats(); st.DecodedTwice != 0 || st.FetchedBytes > int64(len(sm.blob))*21/20 {
				t.Errorf("%d chunks were decoded twice, %d bytes fetched for %d", st.DecodedTwice, st.FetchedBytes, len(sm.blob))
			}
			check(t, h, sm, 0, len(sm.data))
		})
	}
}

func TestOneReadOfALongFileFetchesLittle(t *testing.T) {
	for _, how := range compressions {
		t.Run(string(how), func(t *testing.T) {
			sm := sampleIn(4<<20, 4, 32<<20, how)
			m := newMemory(sm.blob)
			h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
			const off = 9<<20 + 70<<10
			check(t, h, sm, off, 4096)
			from, _ := sm.x.Span(off/index.DefaultChunkSize, off/index.DefaultChunkSize)
			// The chunk lies about as far into the blob as into the data.
			most := int64(off)*int64(len(sm.blob))/int64(len(sm.data)) - from + 2*blockSize
			if got := m.bytes.Load(); got > most {
				t.Errorf("%d bytes were fetched; the chunk should need up to %d", got, most)
			}
		})
	}
}

func TestOneReadOfAShortFileFetchesItAndLittleMore(t *testing.T) {
	for _, how := range compressions {
		t.Run(string(how), func(t *testing.T) {
			sm := sampleOf(4, 32<<20, how)
			m := newMemory(sm.blob)
			h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
			const off = 9<<20 + 700<<10
			check(t, h, sm, off, 4096)
			const first, last = 9 << 20 / index.DefaultChunkSize, 10<<20/index.DefaultChunkSize - 1
			for end := time.Now().Add(5 * time.Second); !h.l.has.all(first, last); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatal("the rest of the file does not come")
				}
			}
			if n := h.l.has.count(); n > 2*(last-first+1)+2 { // with what is decoded on the way
				t.Errorf("%d chunks came with the %d of the file", n, last-first+1)
			}
			from, _ := sm.x.Span(first, first)
			_, to := sm.x.Span(last, last)
			if how == index.Gzip { // where it ends nearly
				to = int64(10<<20) * int64(len(sm.blob)) / int64(len(sm.data))
			}
			if got, most := m.bytes.Load(), to-from+3*blockSize; got > most {
				t.Errorf("%d bytes were fetched; the file should need up to %d", got, most)
			}
		})
	}
}

func TestReadersOfOneChunkShareOneDecode(t *testing.T) {
	sm := sampleIn(4<<20, 5, 4<<20, index.Tar)
	m := newMemory(sm.blob)
	gate := make(chan struct{})
	m.hold.Store(&gate)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() { check(t, h, sm, 1<<20+100, 1000) })
	}
	for h.Stats().Waits < 32 {
		time.Sleep(time.Millisecond)
	}
	close(gate)
	wg.Wait()
	if n := m.reads.Load(); n != 1 {
		t.Errorf("%d reads of the blob for one chunk", n)
	}
}

func TestDecodeIsCancelledWhenNobodyWaits(t *testing.T) {
	sm := newSample(6, 4<<20)
	m := newMemory(sm.blob)
	gate := make(chan struct{})
	m.hold.Store(&gate)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
	ctx1, cancel1 := context.WithCancel(t.Context())
	ctx2, cancel2 := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	go func() { errs <- h.ReadAt(ctx1, make([]byte, 10), 0) }()
	go func() { errs <- h.ReadAt(ctx2, make([]byte, 10), 0) }()
	for h.Stats().Waits < 2 || m.reads.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel1()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	runs := func() int { h.l.mu.Lock(); defer h.l.mu.Unlock(); return len(h.l.runs) }
	if runs() != 1 {
		t.Fatal("the decode ended while a reader waited")
	}
	cancel2()
	<-errs
	for deadline := time.Now().Add(5 * time.Second); runs() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the decode goes on though nobody waits")
		}
	}
	m.hold.Store(nil)
	check(t, h, sm, 0, 10)
}

func TestDemandOvertakesTheBackground(t *testing.T) {
	sm := newSample(7, 8<<20)
	m := newMemory(sm.blob)
	gate := make(chan struct{})
	m.hold.Store(&gate)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
	done := make(chan error, 1)
	go func() { done <- h.Complete(t.Context()) }()
	for m.reads.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	m.hold.Store(nil) // the reads in the background hang, later ones do not
	check(t, h, sm, 0, 4096)
	m.mu.Lock()
	demands := m.prio[Demand]
	m.mu.Unlock()
	if demands == 0 {
		t.Error("the read was not asked for with more hurry")
	}
	close(gate)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestCorruptSource(t *testing.T) {
	sm := newSample(8, 4<<20)
	m := newMemory(sm.blob)
	m.spoil.Store(true)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
	p := make([]byte, 100)
	err := h.ReadAt(t.Context(), p, 1<<20)
	if !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	if n := len(m.doubts); n != corruptTries || m.doubts[0][0] >= m.doubts[0][1] {
		t.Errorf("the source was told %v", m.doubts)
	}
	if h.Stats().Present != 0 || h.Stats().Why == "" {
		t.Errorf("stats %+v", h.Stats())
	}
	m.spoil.Store(false)
	check(t, h, sm, 1<<20, 100)
}

func TestSourceFailsForAWhile(t *testing.T) {
	sm := newSample(9, 4<<20)
	m := newMemory(sm.blob)
	down := errors.New("registry down")
	m.fail.Store(&down)
	s := openStore(t, t.TempDir(), Options{Patience: 400 * time.Millisecond})
	h := create(t, s, sm, m)
	if err := h.ReadAt(t.Context(), make([]byte, 10), 0); !errors.Is(err, down) {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := h.ReadAt(ctx, make([]byte, 10), 0); !errors.Is(err, down) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { m.fail.Store(nil) })
	check(t, h, sm, 0, 10)
}

func TestNoSource(t *testing.T) {
	sm := newSample(10, 1<<20)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, nil)
	if err := h.ReadAt(t.Context(), make([]byte, 10), 0); !errors.Is(err, ErrNoSource) {
		t.Fatal(err)
	}
	h.Close()
	if err := h.ReadAt(t.Context(), make([]byte, 10), 0); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}

func TestSourceOfTheWrongSize(t *testing.T) {
	sm := newSample(11, 1<<20)
	s := openStore(t, t.TempDir(), Options{Patience: time.Millisecond})
	h := create(t, s, sm, newMemory(sm.blob[1:]))
	if h.ReadAt(t.Context(), make([]byte, 10), 0) == nil {
		t.Fatal("a blob of another size was read")
	}
}

func TestCompleteLayerNeverOpensItsSource(t *testing.T) {
	sm := newSample(12, 3<<20)
	s := openStore(t, t.TempDir(), Options{})
	h, err := s.Unpack(t.Context(), sm.desc(), bytes.NewReader(sm.blob))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	h.SetSource(func(context.Context) (Blob, error) {
		t.Error("opened")
		return nil, errors.New("no")
	})
	check(t, h, sm, 0, len(sm.data))
	if err := h.Complete(t.Context()); err != nil || !h.Completed() {
		t.Fatal(err)
	}
	if err := h.Prefetch(t.Context(), []Range{{Off: 0, Len: 100}}); err != nil {
		t.Fatal(err)
	}
}

func TestReadOrderIsRecordedAndPrefetched(t *testing.T) {
	sm := newSample(13, 8<<20)
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	h := create(t, s, sm, newMemory(sm.blob))
	for _, off := range []int{3 << 20, 3<<20 + index.DefaultChunkSize, 0, 3 << 20, 7 << 20} {
		check(t, h, sm, off, 100)
	}
	want := []Range{{Off: 3 << 20, Len: 2 * index.DefaultChunkSize}, {Off: 0, Len: index.DefaultChunkSize}, {Off: 7 << 20, Len: index.DefaultChunkSize}}
	same := func(got []Range, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		var last time.Duration
		for i := range got {
			if got[i].At < last {
				t.Errorf("times go back in %v", got)
			}
			last, got[i].At = got[i].At, 0
		}
		if !slices.Equal(got, want) {
			t.Fatalf("order %v, want %v", got, want)
		}
	}
	same(h.Order())
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = openStore(t, dir, Options{})
	h, err := s.Get(sm.x.Blob)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	same(h.Order())
	order, _ := h.Order()
	other := openStore(t, t.TempDir(), Options{})
	m := newMemory(sm.blob)
	h2 := create(t, other, sm, m)
	if err := h2.SetOrder(order); err != nil {
		t.Fatal(err)
	}
	if err := h2.Prefetch(t.Context(), order); err != nil {
		t.Fatal(err)
	}
	same(h2.Order())
	m.mu.Lock()
	if m.prio[Prefetch] == 0 || m.prio[Demand] != 0 {
		t.Errorf("asked with priorities %v", m.prio)
	}
	m.mu.Unlock()
	for _, r := range order {
		check(t, h2, sm, int(r.Off), int(r.Len))
	}
	if st := h2.Stats(); st.Demand != 0 {
		t.Errorf("reads waited after the prefetch: %+v", st)
	}
	if h2.SetOrder([]Range{{Off: 8 << 20, Len: 1}}) == nil {
		t.Error("an order beyond the layer was taken")
	}
}

func TestFullDiskIsAnErrorAndThenRecovers(t *testing.T) {
	dir := smallTmpfs(t, "6m")
	sm := newSample(14, 12<<20)
	s := openStore(t, dir, Options{})
	h := create(t, s, sm, newMemory(sm.blob))
	ballast := writeBallast(t, dir, 4<<20)
	var full error
	for off := 0; off < 6<<20 && full == nil; off += index.DefaultChunkSize {
		p := bytes.Repeat([]byte{0xee}, index.DefaultChunkSize)
		if full = h.ReadAt(t.Context(), p, int64(off)); full == nil && !bytes.Equal(p, sm.data[off:off+index.DefaultChunkSize]) {
			t.Fatalf("wrong bytes from %d", off)
		}
	}
	if !errors.Is(full, ErrNoSpace) || !errors.Is(full, syscall.ENOSPC) {
		t.Fatalf("reading more than fits: %v", full)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := h.Complete(ctx); !errors.Is(err, ErrNoSpace) {
		t.Fatalf("complete: %v", err)
	}
	ballast()
	check(t, h, sm, 3<<20, 100<<10)
}

// What one store's reader read first is what another store, which gets the refined index, prefetches, and little else is fetched for it.
func TestRefinedIndexTakesTheOrderAlong(t *testing.T) {
	sm := sampleIn(8<<20, 6, 32<<20, index.Gzip)
	m := newMemory(sm.blob)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
	places := []int{20<<20 + 300<<10, 3 << 20, 29 << 20, 11<<20 + 900<<10}
	for _, off := range places {
		check(t, h, sm, off, 4096)
	}
	if text, err := h.IndexText(); err != nil || !index.Sound(text) {
		t.Fatalf("before: %v", err)
	}
	if err := h.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	order, err := h.Order()
	if err != nil || len(order) != len(places) {
		t.Fatalf("order %v, %v", order, err)
	}
	if err := h.Refine(t.Context(), newMemory(sm.blob)); err != nil {
		t.Fatal(err)
	}
	text, err := h.IndexText()
	if err != nil {
		t.Fatal(err)
	}
	fetched := func(x *index.Index) int64 {
		other, m := sm, newMemory(sm.blob)
		other.x = x
		h := create(t, openStore(t, t.TempDir(), Options{}), other, m)
		have, err := h.Order()
		if err != nil || len(x.First) > 0 && len(have) != len(order) {
			t.Fatalf("the order is %v, %v", have, err)
		}
		if err := h.Prefetch(t.Context(), order); err != nil {
			t.Fatal(err)
		}
		n := m.bytes.Load()
		for _, off := range places {
			check(t, h, sm, off, 4096)
		}
		return n
	}
	x, err := index.Decode(bytes.NewReader(text))
	if err != nil || len(x.First) != len(order) {
		t.Fatalf("%d ranges in the index, %v", len(x.First), err)
	}
	if plain, refined := fetched(sm.x), fetched(x); refined > plain*2/3 {
		t.Errorf("%d bytes were prefetched, %d without further points", refined, plain)
	}

	// A refined index that was altered is not told.
	if err := os.WriteFile(h.l.path(fileRefined), text[:len(text)-1], 0o600); err != nil {
		t.Fatal(err)
	}
	if text, err := h.IndexText(); err != nil || !index.Sound(text) {
		t.Errorf("with an altered file: %v", err)
	}
}
