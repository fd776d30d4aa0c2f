package layerstore

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// sample is a layer of these tests, and what its data file must be.
type sample struct {
	x          *index.Index
	blob, data []byte
}

func (s sample) desc() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: s.x.Blob, Size: int64(len(s.blob))}
}

// newSample makes a layer of size bytes of data, in files of 1 MiB, compressed in one of
// the three ways. What is in them compresses by a quarter; every seventh chunk is zeros.
func newSample(seed uint64, size int) sample {
	return sampleOf(seed, size, []index.Compression{index.Tar, index.Gzip, index.Zstd}[seed%3])
}

func sampleOf(seed uint64, size int, how index.Compression) sample {
	return sampleIn(1<<20, seed, size, how)
}

// sampleIn is sampleOf with files of another length.
func sampleIn(file int, seed uint64, size int, how index.Compression) sample {
	var key [32]byte
	key[0], key[1], key[2] = byte(seed), byte(seed>>8), byte(seed>>16)
	files := make([]byte, size)
	rand.NewChaCha8(key).Read(files)
	for i := range files {
		if files[i] &= 0x3f; i/index.DefaultChunkSize%7 == 6 {
			files[i] = 0
		}
	}
	var blob bytes.Buffer
	w := io.WriteCloser(nopCloser{&blob})
	switch how {
	case index.Gzip:
		w, _ = gzip.NewWriterLevel(&blob, gzip.BestSpeed)
	case index.Zstd:
		// Frames of 1 MiB, as zstd layers that can be lazy have them.
		w = &frames{w: &blob}
	}
	tw := tar.NewWriter(w)
	for off := 0; off < size; off += file {
		p := files[off:min(size, off+file)]
		must(tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("f%06d", off/file), Mode: 0o644, Size: int64(len(p)), Format: tar.FormatPAX}))
		_, err := tw.Write(p)
		must(err)
	}
	must(tw.Close())
	must(w.Close())
	sm := sample{blob: blob.Bytes()}
	var data memorySink
	x, err := index.Build(context.Background(), bytes.NewReader(sm.blob),
		ocispec.Descriptor{Digest: digest.FromBytes(sm.blob), Size: int64(len(sm.blob))}, &data, index.Options{})
	must(err)
	data.grow(x.DataSize)
	sm.x, sm.data = x, data.b
	if want := (size + 4095) / 4096 * 4096; len(sm.data) != want || !bytes.Equal(sm.data[:size], files) {
		panic(fmt.Sprintf("the data file has %d bytes instead of %d, or wrong ones", len(sm.data), want))
	}
	return sm
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

type frames struct {
	w    io.Writer
	have []byte
}

func (f *frames) Write(p []byte) (int, error) {
	f.have = append(f.have, p...)
	if len(f.have) >= 1<<20 {
		return len(p), f.Close()
	}
	return len(p), nil
}

func (f *frames) Close() error {
	enc, err := zstd.NewWriter(f.w, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	if err != nil {
		return err
	}
	if _, err := enc.Write(f.have); err != nil {
		return err
	}
	f.have = f.have[:0]
	return enc.Close()
}

// memorySink is a data file in memory.
type memorySink struct {
	mu sync.Mutex
	b  []byte
}

func (m *memorySink) grow(n int64) {
	if n > int64(len(m.b)) {
		m.b = append(m.b, make([]byte, n-int64(len(m.b)))...)
	}
}

func (m *memorySink) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.grow(off + int64(len(p)))
	return copy(m.b[off:], p), nil
}

func testMeta(w io.Writer, x *index.Index) error {
	_, err := fmt.Fprintf(w, "metadata of %s", x.Blob)
	return err
}

// memory is a Blob in memory that can be made bad.
type memory struct {
	b      []byte
	delay  atomic.Int64 // ns, of each read
	hold   atomic.Pointer[chan struct{}]
	fail   atomic.Pointer[error]
	spoil  atomic.Bool // every byte is wrong
	reads  atomic.Int64
	bytes  atomic.Int64
	mu     sync.Mutex
	prio   map[Priority]int
	doubts [][2]int64
}

func newMemory(b []byte) *memory { return &memory{b: b, prio: map[Priority]int{}} }

func (m *memory) Size() int64 { return int64(len(m.b)) }

func (m *memory) ReadAt(ctx context.Context, p []byte, off int64, prio Priority) (int, error) {
	m.reads.Add(1)
	m.bytes.Add(int64(len(p)))
	m.mu.Lock()
	m.prio[prio]++
	m.mu.Unlock()
	if ch := m.hold.Load(); ch != nil {
		select {
		case <-*ch:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if d := time.Duration(m.delay.Load()); d > 0 {
		select {
		case <-time.After(d):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	if e := m.fail.Load(); e != nil {
		return 0, *e
	}
	n := copy(p, m.b[off:])
	if m.spoil.Load() {
		for i := range p[:n] {
			p[i] ^= 0xff
		}
	}
	return n, nil
}

func (m *memory) Doubt(from, to int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.doubts = append(m.doubts, [2]int64{from, to})
}

func (m *memory) open(context.Context) (Blob, error) { return m, nil }

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func openStore(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	o.Meta = testMeta
	if o.Log == nil {
		o.Log = quiet()
	}
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close the store: %v", err)
		}
	})
	return s
}

func create(t testing.TB, s *Store, sm sample, m *memory) *Layer {
	t.Helper()
	h, err := s.Create(t.Context(), sm.x)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	if m != nil {
		h.SetSource(m.open)
	}
	return h
}

func check(t testing.TB, h *Layer, sm sample, off, n int) {
	t.Helper()
	p := make([]byte, n)
	if err := h.ReadAt(t.Context(), p, int64(off)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, sm.data[off:off+n]) {
		t.Fatalf("%d bytes from %d are wrong", n, off)
	}
}
