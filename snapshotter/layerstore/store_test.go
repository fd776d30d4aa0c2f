package layerstore

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

func unpack(t testing.TB, s *Store, sm sample) *Layer {
	t.Helper()
	h, err := s.Unpack(t.Context(), sm.desc(), bytes.NewReader(sm.blob))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

func TestEagerAndLazyAreTheSame(t *testing.T) {
	sm := newSample(30, 5<<20+123)
	lazy := create(t, openStore(t, t.TempDir(), Options{}), sm, newMemory(sm.blob))
	if err := lazy.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	eager := unpack(t, openStore(t, t.TempDir(), Options{}), sm)
	if err := eager.Complete(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, h := range []*Layer{lazy, eager} {
		got, err := os.ReadFile(h.DataPath())
		if err != nil || !bytes.Equal(got, sm.data) {
			t.Errorf("the data file is wrong: %v", err)
		}
		if x, err := h.Index(); err != nil || x.Blob != sm.x.Blob || len(x.Entries) < 2 {
			t.Errorf("the index: %v", err)
		}
		if h.Digest() != sm.x.Blob || h.DiffID() != sm.x.DiffID || h.Size() != int64(len(sm.data)) {
			t.Error("the layer is described wrongly")
		}
	}
	a, _ := os.ReadFile(lazy.MetaPath())
	if b, _ := os.ReadFile(eager.MetaPath()); !bytes.Equal(a, b) || len(a) == 0 {
		t.Error("the metadata differs")
	}
	if lazy.Usage() > int64(len(sm.data)) {
		t.Errorf("%d bytes on disk though chunks are zeros", lazy.Usage())
	}
}

func TestCallersShareOneUnpack(t *testing.T) {
	sm := newSample(31, 2<<20)
	s := openStore(t, t.TempDir(), Options{})
	var read atomic.Int64
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			h, err := s.Unpack(t.Context(), sm.desc(), io.TeeReader(bytes.NewReader(sm.blob), counter{&read}))
			if err != nil {
				t.Error(err)
				return
			}
			check(t, h, sm, 0, len(sm.data))
			h.Close()
		})
	}
	wg.Wait()
	if read.Load() != int64(len(sm.blob)) {
		t.Errorf("%d bytes were read of blobs of %d", read.Load(), len(sm.blob))
	}
}

type counter struct{ n *atomic.Int64 }

func (c counter) Write(p []byte) (int, error) { c.n.Add(int64(len(p))); return len(p), nil }

func TestUnpackOfALazyLayerFillsIt(t *testing.T) {
	sm := newSample(32, 4<<20)
	s := openStore(t, t.TempDir(), Options{})
	m := newMemory(sm.blob)
	lazy := create(t, s, sm, m)
	check(t, lazy, sm, 1<<20, 100)
	h := unpack(t, s, sm)
	if st := h.Stats(); st.Present != st.Chunks {
		t.Errorf("stats %+v", st)
	}
	n := m.reads.Load()
	check(t, lazy, sm, 0, len(sm.data))
	if m.reads.Load() != n {
		t.Error("the source was read for a full layer")
	}
}

func TestFailedUnpackLeavesNothing(t *testing.T) {
	sm := newSample(33, 2<<20)
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	bad := sm.desc()
	bad.Digest = digest.FromString("another")
	if _, err := s.Unpack(t.Context(), bad, bytes.NewReader(sm.blob)); err == nil {
		t.Fatal("a blob of another digest was unpacked")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Unpack(ctx, sm.desc(), bytes.NewReader(sm.blob)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	s.opts.Meta = func(io.Writer, *index.Index) error { return errors.New("no image") }
	if _, err := s.Unpack(t.Context(), sm.desc(), bytes.NewReader(sm.blob)); err == nil {
		t.Fatal("a layer without metadata")
	}
	if _, err := s.Create(t.Context(), sm.x); err == nil {
		t.Fatal("a layer without metadata")
	}
	s.opts.Meta = testMeta
	for _, sub := range []string{dirNew, dirLayers, dirTrash} {
		if left, _ := os.ReadDir(filepath.Join(dir, sub)); len(left) > 0 {
			t.Errorf("%s has %v", sub, left)
		}
	}
	if s.charged.Load() != 0 {
		t.Errorf("%d bytes are charged for nothing", s.charged.Load())
	}
	unpack(t, s, sm)
}

func TestGetByDiffID(t *testing.T) {
	sm := newSample(34, 1<<20)
	s := openStore(t, t.TempDir(), Options{})
	unpack(t, s, sm)
	h, err := s.Get(sm.x.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	if _, err := s.Get(digest.FromString("x")); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

func TestRemove(t *testing.T) {
	sm := newSample(35, 8<<20)
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	m := newMemory(sm.blob)
	h := create(t, s, sm, m)
	check(t, h, sm, 0, 100)
	gate := make(chan struct{})
	m.hold.Store(&gate)
	filled := make(chan error, 1)
	go func() { filled <- h.Complete(t.Context()) }()
	n := m.reads.Load()
	for m.reads.Load() == n {
		time.Sleep(time.Millisecond)
	}
	if err := s.Remove(sm.x.Blob); err != nil {
		t.Fatal(err)
	}
	if err := <-filled; !errors.Is(err, ErrRemoved) {
		t.Fatalf("the fill ended with %v", err)
	}
	if _, err := s.Get(sm.x.Blob); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	m.hold.Store(nil)
	// Who has it open reads on, beside another one of the same name.
	again := create(t, s, sm, newMemory(sm.blob))
	check(t, h, sm, 5<<20, 100)
	check(t, again, sm, 5<<20, 100)
	again.Close()
	if err := s.Remove(sm.x.Blob); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if u := s.Usage(); u.Bytes != 0 || u.Layers != 0 || u.InUse != 0 || s.charged.Load() != 0 {
		t.Errorf("usage %+v, %d charged, after everything was removed", u, s.charged.Load())
	}
	if err := s.Remove(sm.x.Blob); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
}

func TestQuotaEvictsWhatNobodyUses(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{Quota: 12 << 20})
	var sms []sample
	for i := range uint64(4) {
		sms = append(sms, newSample(40+i, 5<<20))
	}
	a := unpack(t, s, sms[0])
	unpack(t, s, sms[1]).Close()
	// The third takes the room of the second, which nobody uses.
	c := unpack(t, s, sms[2])
	if _, err := s.Get(sms[1].x.Blob); !errors.Is(err, ErrNotFound) {
		t.Fatalf("the unused layer: %v", err)
	}
	// The fourth finds none.
	if _, err := s.Unpack(t.Context(), sms[3].desc(), bytes.NewReader(sms[3].blob)); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	lazy := create(t, s, sms[3], newMemory(sms[3].blob))
	if err := lazy.Prefetch(t.Context(), []Range{{Off: 0, Len: 5 << 20}}); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	if u := s.Usage(); u.Bytes > 12<<20 || u.InUse != 3 {
		t.Errorf("usage %+v", u)
	}
	// But who waits for bytes gets them.
	check(t, lazy, sms[3], 0, 4<<20)
	check(t, a, sms[0], 0, 5<<20)
	if u := s.Usage(); u.Bytes < 13<<20 || u.InUse != 3 {
		t.Errorf("usage %+v", u)
	}
	c.Close()
	check(t, lazy, sms[3], 4<<20, 1<<20)
	if u := s.Usage(); u.Bytes > 12<<20 || u.InUse != 2 {
		t.Errorf("usage %+v", u)
	}
}

func TestEvictionTakesTheLongestUnused(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	var sms []sample
	for i := range uint64(3) {
		sms = append(sms, newSample(50+i, 1<<20))
		unpack(t, s, sms[i]).Close()
	}
	h, _ := s.Get(sms[0].x.Blob)
	h.Close()
	s.Close()
	s = openStore(t, dir, Options{}) // the order outlives a restart
	if !s.evict(1) {
		t.Fatal("nothing was evicted")
	}
	for i, want := range []bool{true, false, true} {
		h, err := s.Get(sms[i].x.Blob)
		if (err == nil) != want {
			t.Errorf("layer %d: %v", i, err)
		}
		if err == nil {
			h.Close()
		}
	}
}

// TestTimesToComeAreNow: the clock was ahead by a day when a layer was last used.
func TestTimesToComeAreNow(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	var sms []sample
	for i := range uint64(2) {
		sms = append(sms, newSample(56+i, 1<<20))
		unpack(t, s, sms[i]).Close()
	}
	s.Close()
	ahead := time.Now().Add(24 * time.Hour)
	if err := os.Chtimes(filepath.Join(dir, dirLayers, folderName(sms[0].x.Blob), fileInfo), ahead, ahead); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir, Options{})
	h, err := s.Get(sms[1].x.Blob)
	if err != nil {
		t.Fatal(err)
	}
	h.Close()
	if !s.evict(1) {
		t.Fatal("nothing was evicted")
	}
	if _, err := s.Get(sms[0].x.Blob); !errors.Is(err, ErrNotFound) {
		t.Errorf("what was used longest ago is not what was evicted: %v", err)
	}
}

func TestStoreHasOneOwner(t *testing.T) {
	dir := t.TempDir()
	openStore(t, dir, Options{})
	if _, err := Open(dir, Options{Meta: testMeta}); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
}

func TestBrokenLayersAreSetAside(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	damage := map[string]func(dir string) error{
		"no info":    func(d string) error { return os.Remove(filepath.Join(d, fileInfo)) },
		"empty info": func(d string) error { return os.Truncate(filepath.Join(d, fileInfo), 0) },
		"short data": func(d string) error { return os.Truncate(filepath.Join(d, fileData), 4096) },
		"short meta": func(d string) error { return os.Truncate(filepath.Join(d, fileMeta), 1) },
		"no index":   func(d string) error { return os.Remove(filepath.Join(d, fileIndex)) },
		"another's": func(d string) error {
			return os.Rename(d, filepath.Join(filepath.Dir(d), "sha256-"+strings.Repeat("a", 64)))
		},
		"strange name":  func(d string) error { return os.Rename(d, d+"x") },
		"short present": func(d string) error { return os.Truncate(filepath.Join(d, filePresent), 9) },
	}
	good := newSample(60, 1<<20)
	unpack(t, s, good).Close()
	seed := uint64(61)
	for _, do := range damage {
		sm := newSample(seed, 1<<20)
		seed++
		create(t, s, sm, nil).Close()
		if err := do(filepath.Join(dir, dirLayers, folderName(sm.x.Blob))); err != nil {
			t.Fatal(err)
		}
	}
	s.Close()
	s = openStore(t, dir, Options{})
	if got := len(s.Broken()); got != len(damage) {
		t.Errorf("%d of %d are reported: %v", got, len(damage), s.Broken())
	}
	h, err := s.Get(good.x.Blob)
	if err != nil {
		t.Fatal(err)
	}
	check(t, h, good, 0, 1<<20)
	h.Close()
}

func TestAlteredIndexIsNotTrusted(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	sm := newSample(70, 1<<20)
	create(t, s, sm, nil).Close()
	path := filepath.Join(dir, dirLayers, folderName(sm.x.Blob), fileIndex)
	b, _ := os.ReadFile(path)
	b[len(b)/2] ^= 1
	os.WriteFile(path, b, 0o600)
	h, _ := s.Get(sm.x.Blob)
	defer h.Close()
	h.SetSource(newMemory(sm.blob).open)
	if err := h.ReadAt(t.Context(), make([]byte, 1), 0); err == nil || !strings.Contains(err.Error(), "altered") {
		t.Fatal(err)
	}
}

func TestRestoreOf300Layers(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, Options{})
	for i := range uint64(300) {
		sm := newSample(1000+i, 256<<10)
		if i%2 == 0 {
			unpack(t, s, sm).Close()
		} else {
			create(t, s, sm, nil).Close()
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	s = openStore(t, dir, Options{})
	for _, d := range s.Layers() {
		h, err := s.Get(d)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
	}
	took := time.Since(begun)
	t.Logf("300 layers were restored and opened in %v", took)
	if len(s.Layers()) != 300 || took > time.Second {
		t.Errorf("%d layers in %v", len(s.Layers()), took)
	}
}

func TestClosedStore(t *testing.T) {
	s := openStore(t, t.TempDir(), Options{})
	sm := newSample(80, 1<<20)
	m := newMemory(sm.blob)
	gate := make(chan struct{})
	m.hold.Store(&gate)
	h := create(t, s, sm, m)
	errs := make(chan error, 1)
	go func() { errs <- h.ReadAt(t.Context(), make([]byte, 10), 0) }()
	for m.reads.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-errs; !errors.Is(err, ErrClosed) {
		t.Fatalf("the read that waited: %v", err)
	}
	if _, err := s.Get(sm.x.Blob); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
	if _, err := s.Create(t.Context(), sm.x); !errors.Is(err, ErrClosed) {
		t.Fatal(err)
	}
}
