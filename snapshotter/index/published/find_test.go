package published

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/origin/origintest"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/test/rig"
)

// from asks a registry for the index of a layer, and for its blob.
func from(repo *origin.Repository, image ocispec.Descriptor, l layer) Query {
	return Query{
		Repository: repo, Manifest: image.Digest, Layer: l.desc, DiffID: l.x.DiffID,
		Open: func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
			return repo.Open(ctx, d, 0, -1)
		},
	}
}

// TestStoreAndFind on the real registry: what one publishes others find; the image is as it was.
func TestStoreAndFind(t *testing.T) {
	g := registry(t)
	repo := origintest.Repository(t, g.Addr())
	low, high := layerOf(t, 1, "usr/bin/a", "usr/bin/b"), layerOf(t, 2, "srv/app")
	image := pushImage(t, repo, "app", low, high)
	ctx := testContext(t)
	find := func(l layer) (*index.Index, error) {
		return NewFinder(FinderOptions{}).Find(ctx, from(origintest.Repository(t, g.Addr()), image, l))
	}
	if _, err := find(low); !errors.Is(err, ErrNone) {
		t.Fatalf("before: %v", err)
	}

	all := []Layer{low.published(t), high.published(t)}
	first, pushed, err := Store(ctx, repo, image, all)
	if err != nil || !pushed {
		t.Fatalf("pushed %t, %v", pushed, err)
	}
	for _, l := range []layer{low, high} {
		x, err := find(l)
		if err != nil || encoded(t, x) != encoded(t, l.x) {
			t.Fatalf("%s: %v", l.desc.Digest, err)
		}
		// What it is for: the end of a layer, and no more of it than that takes.
		last, filled := len(x.Chunks)-1, 0
		open := func(off int64) (io.ReadCloser, error) { return repo.Open(ctx, l.desc, off, -1) }
		if err := x.Fill(ctx, last, last, open, func(c int, p []byte) error { filled++; return x.Check(c, p) }); err != nil || filled == 0 {
			t.Errorf("%s: %d chunks, %v", l.desc.Digest, filled, err)
		}
	}
	if d, _, err := repo.Manifest(ctx, image.Digest.String()); err != nil || d.Digest != image.Digest {
		t.Errorf("the image: %+v, %v", d, err)
	}

	// Again: nothing is sent, and the referrer is the same, whoever does it.
	g.ResetStats()
	again, pushed, err := Store(ctx, origintest.Repository(t, g.Addr()), image, all)
	if err != nil || pushed || again != first {
		t.Errorf("again: %s, pushed %t, %v; want %s", again, pushed, err, first)
	}
	if n := g.Stats().Requests[rig.Blobs]; n != 0 {
		t.Errorf("%d requests for blobs", n)
	}

	// Another program's indexes of the same layers come beside them, and nobody minds which is taken.
	other := low
	if other.x, err = index.Build(ctx, bytes.NewReader(low.blob), low.desc, nil, index.Options{ChunkSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	if d, pushed, err := Store(ctx, repo, image, []Layer{other.published(t)}); err != nil || !pushed || d == first {
		t.Errorf("another: %s, pushed %t, %v", d, pushed, err)
	}
	for _, l := range []layer{low, high} {
		if x, err := find(l); err != nil || x.Blob != l.desc.Digest {
			t.Errorf("%s: %v", l.desc.Digest, err)
		}
	}
	if d, pushed, err := Store(ctx, repo, image, all); err != nil || pushed || d != first {
		t.Errorf("the older one is still there: %s, pushed %t, %v", d, pushed, err)
	}

	// The indexes are the image's alone.
	next := pushImage(t, repo, "next", low)
	if _, err := NewFinder(FinderOptions{}).Find(ctx, from(repo, next, low)); !errors.Is(err, ErrNone) {
		t.Errorf("another image with the same layer: %v", err)
	}
	if _, err := NewFinder(FinderOptions{}).Find(ctx, from(repo, ocispec.Descriptor{}, low)); !errors.Is(err, ErrNone) {
		t.Errorf("no manifest: %v", err)
	}
}

// TestHostile: what somebody with the right to push can put there. It is refused, or has no effect on the honest one beside it.
func TestHostile(t *testing.T) {
	g := registry(t)
	repo := origintest.Repository(t, g.Addr())
	l, foreign := layerOf(t, 1, "a", "b"), layerOf(t, 2, "c")
	lie := func(change func(x *index.Index)) []byte {
		x := *l.x
		change(&x)
		var b bytes.Buffer
		if err := index.Encode(&b, &x); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	good := l.published(t).Text
	for _, c := range []struct {
		name string
		text []byte
		says string
	}{
		{"of another layer", foreign.published(t).Text, "it is of the layer"},
		{"of another size", lie(func(x *index.Index) { x.BlobSize++ }), "it is of the layer"},
		{"of another diff ID", lie(func(x *index.Index) { x.DiffID = digest.FromString("x") }), "configuration says"},
		{"of none", lie(func(x *index.Index) { x.DiffID = "" }), "no diff ID"},
		{"of a few KiB that want 250 MiB", lie(func(x *index.Index) {
			first := x.Points[0]
			x.Points, x.BlobSize = []index.Point{first}, l.desc.Size
			for i := range 4000 {
				x.Points = append(x.Points, index.Point{Blob: first.Blob + int64(i) + 1, Stream: int64(i+1) << 20, Raw: true, Window: make([]byte, 32<<10)})
			}
		}), "of memory"},
		{"no index", []byte("no index"), "damaged"},
		{"cut off", good[:len(good)-1], "damaged"},
		{"with something behind it", append(good[:len(good):len(good)], 0), "damaged"},
		{"larger than the layer", make([]byte, len(l.blob)+slack+1), "for a layer of"},
	} {
		t.Run(c.name, func(t *testing.T) {
			image := pushImage(t, repo, c.name, l)
			d := origintest.Push(t, repo, MediaType, c.text)
			d.Annotations = map[string]string{LayerAnnotation: l.desc.Digest.String()}
			hostile := ocispec.Manifest{ArtifactType: ArtifactType, Subject: &image, Layers: []ocispec.Descriptor{d}}
			origintest.PushManifest(t, repo, hostile)
			q := from(repo, image, l)
			if x, err := NewFinder(FinderOptions{}).Find(testContext(t), q); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("alone: %v, %v, want one with %q", x, err, c.says)
			}
			if _, _, err := Store(testContext(t), repo, image, []Layer{l.published(t)}); err != nil {
				t.Fatal(err)
			}
			hostile.Annotations = map[string]string{"again": "to be the last of the list"}
			origintest.PushManifest(t, repo, hostile)
			if x, err := NewFinder(FinderOptions{}).Find(testContext(t), q); err != nil || encoded(t, x) != encoded(t, l.x) {
				t.Errorf("beside the honest one: %v", err)
			}
		})
	}
}

// inMemory is a query for a layer whose index is in memory, behind a referrer.
func inMemory(t *testing.T, l layer, text []byte) (*memory, *blobs, Query) {
	t.Helper()
	subject := describe(ocispec.MediaTypeImageManifest, []byte("an image"))
	m, b := &memory{}, &blobs{}
	e := b.put(text)
	e.layer = l.desc.Digest
	referrer, err := encodeManifest(subject, []entry{e})
	if err != nil {
		t.Fatal(err)
	}
	m.add(referrer)
	return m, b, Query{Repository: m, Manifest: subject.Digest, Layer: l.desc, Open: b.open}
}

// TestLooks: the registry is asked once for an image, whatever it says, until that is old.
func TestLooks(t *testing.T) {
	l := layerOf(t, 1, "a")
	good := l.published(t).Text
	away := errors.New("the registry is away")
	for _, c := range []struct {
		name string
		text []byte
		vice func(m *memory)
		want error
		life time.Duration
		asks int // of the registry, for a look
		open int // of blobs, for two looks
	}{
		{"found", good, nil, nil, foundFor, 2, 3},
		{"none", good, func(m *memory) { m.list = nil }, ErrNone, noneFor, 1, 0},
		{"refused", []byte("no index"), nil, ErrInvalid, foundFor, 2, 2},
		{"away", good, func(m *memory) { m.referrers = func(context.Context) error { return away } }, away, failedFor, 1, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, b, q := inMemory(t, l, c.text)
			if c.vice != nil {
				c.vice(m)
			}
			f := NewFinder(FinderOptions{})
			now := time.Unix(1_700_000_000, 0)
			f.now = func() time.Time { return now }
			for i, at := range []time.Duration{0, c.life - 1, c.life + 1} {
				now = time.Unix(1_700_000_000, 0).Add(at)
				if _, err := f.Find(testContext(t), q); !errors.Is(err, c.want) || c.want == nil && err != nil {
					t.Errorf("%d: %v, want %v", i, err, c.want)
				}
				if want := c.asks * (1 + i/2); m.asked != want {
					t.Errorf("%d: the registry was asked %d times, want %d", i, m.asked, want)
				}
			}
			if b.opened != c.open {
				t.Errorf("%d indexes were fetched, want %d", b.opened, c.open)
			}
		})
	}
}

// TestSideBySide: layers that ask at the same time share one look.
func TestSideBySide(t *testing.T) {
	l := layerOf(t, 1, "a")
	m, b, q := inMemory(t, l, l.published(t).Text)
	var mu sync.Mutex // of what counts
	open := q.Open
	q.Open = func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
		mu.Lock()
		defer mu.Unlock()
		return open(ctx, d)
	}
	f := NewFinder(FinderOptions{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if _, err := f.Find(testContext(t), q); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if m.asked != 2 || b.opened != 20 {
		t.Errorf("asked %d times, opened %d", m.asked, b.opened)
	}
}

// TestStalls: nobody waits for a registry, or whoever has the index, longer than he is told.
func TestStalls(t *testing.T) {
	l := layerOf(t, 1, "a")
	stall := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

	m, _, q := inMemory(t, l, l.published(t).Text)
	m.referrers = stall
	f := NewFinder(FinderOptions{Within: 20 * time.Millisecond})
	if _, err := f.Find(testContext(t), q); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "did not say within 20ms") {
		t.Errorf("the registry stalls: %v", err)
	}
	if _, err := f.Find(testContext(t), q); !errors.Is(err, context.DeadlineExceeded) || m.asked != 1 {
		t.Errorf("it was asked %d times: %v", m.asked, err)
	}

	// Who gives up leaves nothing behind for others.
	m, _, q = inMemory(t, l, l.published(t).Text)
	m.referrers = stall
	f = NewFinder(FinderOptions{Within: time.Hour})
	ctx, cancel := context.WithTimeout(testContext(t), 20*time.Millisecond)
	defer cancel()
	if _, err := f.Find(ctx, q); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the asker gave up: %v", err)
	}
	m.referrers = nil
	if _, err := f.Find(testContext(t), q); err != nil {
		t.Errorf("the next one: %v", err)
	}

	// The places for fetches are taken: it ends with the time that the index has, and the container goes on without.
	_, _, q = inMemory(t, l, l.published(t).Text)
	f = NewFinder(FinderOptions{})
	for range parallelReads {
		f.fetch <- struct{}{}
	}
	begin := time.Now()
	if _, err := f.Find(testContext(t), q); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > readWithin+5*time.Second {
		t.Errorf("no place: %v after %v", err, time.Since(begin))
	}
}

// TestManyImages: a node that sees many images remembers no more than a bounded number.
func TestManyImages(t *testing.T) {
	f := NewFinder(FinderOptions{})
	l := layerOf(t, 1, "a")
	for i := range 3 * maxLooks {
		_, err := f.Find(testContext(t), Query{Repository: &memory{}, Manifest: digest.FromBytes([]byte{byte(i), byte(i >> 8)}), Layer: l.desc})
		if !errors.Is(err, ErrNone) {
			t.Fatal(err)
		}
	}
	if n := len(f.looks); n > maxLooks {
		t.Errorf("it remembers %d images", n)
	}
}

// TestWrongBytes: whoever gives the blob of an index gives another. The index is not to blame, and is asked for again.
func TestWrongBytes(t *testing.T) {
	l := layerOf(t, 1, "a")
	text := l.published(t).Text
	_, b, q := inMemory(t, l, text)
	d := digest.FromBytes(text)
	f := NewFinder(FinderOptions{})
	for _, wrong := range [][]byte{text[:10], append([]byte{1}, text[1:]...), append(text[:len(text):len(text)], 0)} {
		b.content[d] = wrong
		if _, err := f.Find(testContext(t), q); err == nil || errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes: %v", len(wrong), err)
		}
	}
	b.content[d] = text
	if _, err := f.Find(testContext(t), q); err != nil {
		t.Error(err)
	}
}
