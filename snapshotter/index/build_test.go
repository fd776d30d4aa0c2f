package index

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	kgzip "github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func descOf(blob []byte) ocispec.Descriptor {
	return ocispec.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))}
}

// memory is a sink.
type memory struct{ b []byte }

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if end := off + int64(len(p)); end > int64(len(m.b)) {
		m.b = append(m.b, make([]byte, end-int64(len(m.b)))...)
	}
	return copy(m.b[off:], p), nil
}

func mustBuild(tb testing.TB, blob []byte, o Options) (*Index, []byte) {
	tb.Helper()
	sink := &memory{}
	x, err := Build(context.Background(), bytes.NewReader(blob), descOf(blob), sink, o)
	if err != nil {
		tb.Fatal(err)
	}
	sink.b = append(sink.b, make([]byte, x.DataSize-int64(len(sink.b)))...)
	return x, sink.b
}

// realTar is a tar of real files of this machine, about n bytes.
func realTar(tb testing.TB, n int) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, dir := range []string{"/usr/lib/python3", "/usr/share", "/usr/lib/git-core", "/usr/bin", "/usr/lib"} {
		filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || b.Len() >= n {
				return nil
			}
			info, err := e.Info()
			if err != nil {
				return nil
			}
			link, _ := os.Readlink(path)
			h, err := tar.FileInfoHeader(info, link)
			if err != nil || info.Size() > int64(n) {
				return nil
			}
			h.Name = path[1:]
			var p []byte
			if e.Type().IsRegular() {
				if p, err = os.ReadFile(path); err != nil {
					return nil
				}
				h.Size = int64(len(p))
			}
			if err := w.WriteHeader(h); err != nil {
				tb.Fatal(err)
			}
			w.Write(p)
			return nil
		})
	}
	w.Close()
	return b.Bytes()
}

func gzipped(tb testing.TB, p []byte) []byte {
	tb.Helper()
	var b bytes.Buffer
	w, _ := kgzip.NewWriterLevel(&b, 6)
	w.Write(p)
	w.Close()
	return b.Bytes()
}

func zstdFrames(tb testing.TB, p []byte, frame int) []byte {
	tb.Helper()
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
	if err != nil {
		tb.Fatal(err)
	}
	defer enc.Close()
	var b []byte
	for len(p) > 0 {
		n := min(len(p), frame)
		b = enc.EncodeAll(p[:n], b)
		b = append(b, 0x5a, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3) // a skippable frame
		p = p[n:]
	}
	return b
}

// checkAgainstTar compares an index and its data with what archive/tar reads.
func checkAgainstTar(t *testing.T, x *Index, data, stream []byte) {
	t.Helper()
	if want := digest.FromBytes(stream); x.DiffID != want {
		t.Errorf("the diff ID is %s, not %s", x.DiffID, want)
	}
	byPath := make(map[string]*Entry)
	for i := range x.Entries {
		byPath[x.Entries[i].Path] = &x.Entries[i]
	}
	tr := tar.NewReader(bytes.NewReader(stream))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		p, _ := io.ReadAll(tr)
		e := byPath[filepath.Clean(h.Name)]
		if e == nil {
			t.Errorf("%q is missing", h.Name)
			continue
		}
		if e.HardLink >= 0 {
			e = &x.Entries[e.HardLink]
		}
		if !e.Implicit && (e.Size != int64(len(p)) || !bytes.Equal(data[e.Data:e.Data+e.Size], p)) {
			t.Errorf("%q has other contents", h.Name)
		}
		if h.Typeflag != tar.TypeSymlink && e.Mode&0o7777 != uint32(h.Mode)&0o7777 || e.UID != uint32(h.Uid) || e.Link != h.Linkname && h.Typeflag == tar.TypeSymlink || e.Sec != h.ModTime.Unix() {
			t.Errorf("%q has other attributes: %+v", h.Name, e)
		}
	}
	for i, c := range x.Chunks {
		if sha256.Sum256(data[c.Off:c.Off+c.Len]) != c.Sum {
			t.Errorf("chunk %d has another sum", i)
		}
	}
}

// Every form of a layer has the same index but for its points, comes through Encode and
// Decode unchanged, and fills at random.
func TestBuild(t *testing.T) {
	stream := realTar(t, 6<<20)
	forms := gzipForms(t, stream)
	forms["tar"] = stream
	forms["zstd frames"] = zstdFrames(t, stream, 200_000)
	forms["zstd"] = zstdFrames(t, stream, len(stream))
	for form, blob := range forms {
		t.Run(form, func(t *testing.T) {
			x, data := mustBuild(t, blob, Options{Spacing: 300_000, ChunkSize: 64 << 10})
			checkAgainstTar(t, x, data, stream)
			var b bytes.Buffer
			if err := Encode(&b, x); err != nil {
				t.Fatal(err)
			}
			text := bytes.Clone(b.Bytes())
			y, err := Decode(&b)
			if err != nil {
				t.Fatal(err)
			}
			if !sameIndex(x, y) {
				t.Error("the index changes when it is encoded and decoded")
			}
			if err := Encode(&b, y); err != nil || !bytes.Equal(b.Bytes(), text) {
				t.Errorf("encoded again it is another text: %v", err)
			}
			checkFill(t, y, blob, data, 60)
		})
	}
}

// A blob that is not what its descriptor says is an error of its own kind, whatever
// else it leads to; one that is, and cannot be indexed, is ErrNotIndexable.
func TestBuildErrors(t *testing.T) {
	stream := realTar(t, 2<<20)
	blob := gzipped(t, stream)
	flipped := bytes.Clone(blob)
	flipped[len(flipped)/2] ^= 1
	for name, c := range map[string]struct {
		blob         []byte
		desc         ocispec.Descriptor
		notIndexable bool
	}{
		"damaged":               {flipped, descOf(blob), false},
		"cut off":               {blob[:len(blob)/2], descOf(blob), false},
		"longer":                {append(bytes.Clone(blob), 0), descOf(blob), false},
		"wrong digest":          {blob, descOf(flipped), false},
		"damaged at its source": {flipped, descOf(flipped), true},
		"cut off at its source": {blob[:len(blob)/2], descOf(blob[:len(blob)/2]), true},
		"trailing bytes":        {append(bytes.Clone(blob), 0), descOf(append(bytes.Clone(blob), 0)), true},
		"no tar":                {[]byte("hello, world"), descOf([]byte("hello, world")), true},
		"no size":               {blob, ocispec.Descriptor{Digest: digest.FromBytes(blob)}, true},
	} {
		_, err := Build(context.Background(), bytes.NewReader(c.blob), c.desc, nil, Options{})
		var not ErrNotIndexable
		if err == nil || errors.As(err, &not) != c.notIndexable {
			t.Errorf("%s: %v", name, err)
		}
	}
	gone := errors.New("disk full")
	if _, err := Build(context.Background(), bytes.NewReader(blob), descOf(blob), failing{gone}, Options{}); !errors.Is(err, gone) {
		t.Errorf("sink: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Build(ctx, bytes.NewReader(blob), descOf(blob), nil, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("context: %v", err)
	}
}

type failing struct{ err error }

func (f failing) WriteAt([]byte, int64) (int, error) { return 0, f.err }

// The figure of the package comment: an index is at most 1 % of its layer.
func TestSize(t *testing.T) {
	stream := realTar(t, 120<<20)
	blob := gzipped(t, stream)
	x, _ := mustBuild(t, blob, Options{})
	whole := encodedSize(t, x)
	part := func(change func(*Index)) int {
		y := *x
		change(&y)
		return whole - encodedSize(t, &y)
	}
	t.Logf("a layer of %d entries, %d MiB, %d MiB compressed: %d bytes of index, %.2f %%", len(x.Entries), len(stream)>>20, len(blob)>>20, whole, float64(whole)*100/float64(len(blob)))
	t.Logf("windows %d of %d points, sums %d", part(func(y *Index) {
		y.Points = append([]Point(nil), x.Points...)
		for i := range y.Points {
			y.Points[i].Window = nil
		}
	}), len(x.Points), 32*len(x.Chunks))
	if whole > len(blob)/100 {
		t.Errorf("the index of a layer of %d bytes has %d", len(blob), whole)
	}
}

func encodedSize(tb testing.TB, x *Index) int {
	var b bytes.Buffer
	if err := Encode(&b, x); err != nil {
		tb.Fatal(err)
	}
	return b.Len()
}

// Build must take memory for what is under way, not for what the layer has.
func TestMemory(t *testing.T) {
	var b bytes.Buffer
	w, _ := kgzip.NewWriterLevel(&b, 1)
	tw := tar.NewWriter(w)
	block := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(block[:1<<18])
	for i := range 64 {
		tw.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Size: 8 << 20, Mode: 0o644})
		for range 8 {
			tw.Write(block)
		}
	}
	tw.Close()
	w.Close()
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var peak atomic.Uint64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			case <-time.After(5 * time.Millisecond):
				runtime.ReadMemStats(&now)
				peak.Store(max(peak.Load(), now.HeapInuse-min(before.HeapInuse, now.HeapInuse)))
			}
		}
	}()
	_, err := Build(context.Background(), bytes.NewReader(b.Bytes()), descOf(b.Bytes()), discard{}, Options{})
	close(stop)
	<-stopped
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("512 MiB of data took %d MiB of memory at most", peak.Load()>>20)
	if peak.Load() > 40<<20 {
		t.Errorf("Build took %d MiB of memory", peak.Load()>>20)
	}
}

type discard struct{}

func (discard) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }

// sameIndex compares what two indexes say, and not what they were made from.
func sameIndex(x, y *Index) bool {
	a, b := *x, *y
	a.text, b.text = nil, nil
	return reflect.DeepEqual(a, b)
}
