package published

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/origin/origintest"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/test/rig"
)

// What origin has is what this package asks for.
var (
	_ Repository = (*origin.Repository)(nil)
	_ Pusher     = (*origin.Repository)(nil)
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// A thread of the rig's, for all processes it starts, that lasts as long as the test binary.
		goleak.IgnoreAnyFunction("github.com/docker-quay/docker-quay/test/rig.startOnLastingThread.func1.1"),
		goleak.IgnoreAnyFunction("github.com/docker-quay/docker-quay/test/rig.closeOnSignal"))
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// registry is a real one; its requests are counted.
func registry(t *testing.T) *rig.Registry {
	t.Helper()
	g, err := rig.ForTest(t).StartRegistry(testContext(t), rig.RegistryOptions{})
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// layer is a layer, compressed, and its index.
type layer struct {
	desc ocispec.Descriptor
	blob []byte
	x    *index.Index
}

func (l layer) published(t testing.TB) Layer {
	t.Helper()
	p, err := Encode(l.x)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// layerOf makes a layer with files of random contents; the same seed gives the same.
func layerOf(t testing.TB, seed uint64, files ...string) layer {
	t.Helper()
	var text, blob bytes.Buffer
	random := rand.NewChaCha8([32]byte{byte(seed)})
	w := tar.NewWriter(&text)
	for i, name := range files {
		p := make([]byte, 200_000+i)
		if _, err := random.Read(p); err != nil {
			t.Fatal(err)
		}
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(p)), ModTime: time.Unix(1_700_000_000, 0), Typeflag: tar.TypeReg}
		if err := errors.Join(w.WriteHeader(h), write(w, p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(&blob)
	if err := errors.Join(write(z, text.Bytes()), z.Close()); err != nil {
		t.Fatal(err)
	}
	l := layer{blob: blob.Bytes(), desc: describe(ocispec.MediaTypeImageLayerGzip, blob.Bytes())}
	x, err := index.Build(context.Background(), bytes.NewReader(l.blob), l.desc, nil, index.Options{})
	if err != nil {
		t.Fatal(err)
	}
	l.x = x
	return l
}

func write(w io.Writer, p []byte) error {
	_, err := w.Write(p)
	return err
}

func describe(mediaType string, text []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
}

// pushImage stores an image of layers, told from others by name.
func pushImage(t *testing.T, r *origin.Repository, name string, layers ...layer) ocispec.Descriptor {
	t.Helper()
	m := ocispec.Manifest{Annotations: map[string]string{"name": name}}
	for _, l := range layers {
		m.Layers = append(m.Layers, origintest.Push(t, r, l.desc.MediaType, l.blob))
	}
	return origintest.PushManifest(t, r, m)
}

// memory is a repository in memory, which counts, and misbehaves when told so.
type memory struct {
	list      []ocispec.Descriptor
	content   map[digest.Digest][]byte
	referrers func(ctx context.Context) error // instead of an answer, when it returns one
	asked     int
}

func (m *memory) Name() reference.Named {
	n, err := reference.ParseNormalizedNamed("registry.test/team/app")
	if err != nil {
		panic(err)
	}
	return n
}

func (m *memory) Referrers(ctx context.Context, _ digest.Digest, _ string) ([]ocispec.Descriptor, error) {
	m.asked++
	if m.referrers != nil {
		if err := m.referrers(ctx); err != nil {
			return nil, err
		}
	}
	return m.list, nil
}

func (m *memory) Manifest(_ context.Context, d string) (ocispec.Descriptor, []byte, error) {
	m.asked++
	text, ok := m.content[digest.Digest(d)]
	if !ok {
		return ocispec.Descriptor{}, nil, fmt.Errorf("%s: %w", d, origin.ErrNotFound)
	}
	return describe(ocispec.MediaTypeImageManifest, text), text, nil
}

// add puts a referrer into the list.
func (m *memory) add(text []byte) {
	if m.content == nil {
		m.content = map[digest.Digest][]byte{}
	}
	d := describe(ocispec.MediaTypeImageManifest, text)
	d.ArtifactType = ArtifactType
	m.list = append(m.list, d)
	m.content[d.Digest] = text
}

// blobs opens blobs from memory, and counts.
type blobs struct {
	content map[digest.Digest][]byte
	opened  int
}

func (b *blobs) put(text []byte) entry {
	if b.content == nil {
		b.content = map[digest.Digest][]byte{}
	}
	d := digest.FromBytes(text)
	b.content[d] = text
	return entry{digest: d, size: int64(len(text))}
}

func (b *blobs) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	b.opened++
	text, ok := b.content[d.Digest]
	if !ok {
		return nil, fmt.Errorf("%s: %w", d.Digest, origin.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(text)), nil
}

func encoded(t *testing.T, x *index.Index) string {
	t.Helper()
	var b strings.Builder
	if err := index.Encode(&b, x); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
