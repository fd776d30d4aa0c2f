// Package lazytest is a source of layers in memory, and makes layers for it, for the
// tests of everything that mounts layers.
package lazytest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// Ref is the image that the layers of this package belong to.
const Ref = "registry.example/app:1"

// Manifest is the digest of its manifest.
var Manifest = digest.FromString("manifest")

// ChunkSize is the size of file chunks in the layers made here, in bytes: small, so that
// small files have several.
const ChunkSize = 16 << 10

// Image is layers in memory. It implements lazy.Layers.
type Image struct {
	mu      sync.Mutex // guards following
	layers  map[digest.Digest]*stored
	down    error         // answer to everything
	hang    chan struct{} // Describe waits for it
	held    chan struct{} // all but demand waits for it
	indexes map[digest.Digest]*index.Index
	told    map[digest.Digest][]byte
	open    int
	fetched map[digest.Digest]int
	reads   map[digest.Digest]int
}

type stored struct {
	desc ocispec.Descriptor
	data []byte
}

var _ lazy.Layers = (*Image)(nil)

// NewImage makes an image of no layers.
func NewImage() *Image {
	return &Image{
		layers:  make(map[digest.Digest]*stored),
		indexes: make(map[digest.Digest]*index.Index),
		told:    make(map[digest.Digest][]byte),
		fetched: make(map[digest.Digest]int),
		reads:   make(map[digest.Digest]int),
	}
}

// Add adds a layer.
func (i *Image) Add(l Layer) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.layers[l.Desc.Digest] = &stored{l.Desc, bytes.Clone(l.Data)}
}

// Down makes every call fail with err; nil ends it.
func (i *Image) Down(err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.down = err
}

// Hang makes Describe wait until its context ends; the function returned ends it.
func (i *Image) Hang() (stop func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	ch := make(chan struct{})
	i.hang = ch
	return func() { i.mu.Lock(); i.hang = nil; i.mu.Unlock(); close(ch) }
}

// Remove forgets a layer: it is not found any more.
func (i *Image) Remove(d digest.Digest) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.layers, d)
}

// Corrupt flips a bit of every byte of a layer in [off, off+n).
func (i *Image) Corrupt(d digest.Digest, off, n int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for k := range i.layers[d].data[off : off+n] {
		i.layers[d].data[off+k] ^= 0x40
	}
}

// Open handles, and calls of Fetch and ReadAt for a layer.
func (i *Image) Counts(d digest.Digest) (open, fetched, reads int) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.open, i.fetched[d], i.reads[d]
}

// Describe implements lazy.Layers.
func (i *Image) Describe(ctx context.Context, ref string, manifest, layer digest.Digest) (ocispec.Descriptor, error) {
	i.mu.Lock()
	hang, down, s := i.hang, i.down, i.layers[layer]
	i.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
			return ocispec.Descriptor{}, ctx.Err()
		}
	}
	switch {
	case down != nil:
		return ocispec.Descriptor{}, down
	case ref != Ref || manifest != "" && manifest != Manifest || s == nil:
		return ocispec.Descriptor{}, fmt.Errorf("%s has no layer %s", ref, layer)
	}
	return s.desc, nil
}

// Open implements lazy.Layers.
func (i *Image) Open(_ context.Context, _ string, desc ocispec.Descriptor) (lazy.Layer, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.down != nil {
		return nil, i.down
	}
	i.open++
	return &handle{image: i, digest: desc.Digest}, nil
}

type handle struct {
	image  *Image
	digest digest.Digest
	once   sync.Once
}

func (h *handle) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	h.image.mu.Lock()
	defer h.image.mu.Unlock()
	h.image.reads[h.digest]++
	s := h.image.layers[h.digest]
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case h.image.down != nil:
		return 0, h.image.down
	case s == nil:
		return 0, errors.New("the layer is gone")
	}
	return bytes.NewReader(s.data).ReadAt(p, off)
}

func (h *handle) Fetch() {
	h.image.mu.Lock()
	defer h.image.mu.Unlock()
	h.image.fetched[h.digest]++
}

func (h *handle) Close() error {
	h.once.Do(func() {
		h.image.mu.Lock()
		defer h.image.mu.Unlock()
		h.image.open--
	})
	return nil
}

// Layer is a compressed layer.
type Layer struct {
	Desc ocispec.Descriptor
	Data []byte
	Tar  []byte // uncompressed, as given
}

// Entry is one entry of a layer's archive.
type Entry struct {
	tar.Header
	Body string
}

// Tar makes an archive. Entries without a type are regular files, entries
// without a time have one.
func Tar(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Format = tar.FormatPAX
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.Body))
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, e.Body)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// EStargz makes an eStargz layer of an archive.
func EStargz(t testing.TB, archive []byte) Layer {
	t.Helper()
	data, toc := build(t, archive)
	return Layer{
		Desc: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(data), Size: int64(len(data)),
			Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: toc.String()},
		},
		Data: data, Tar: archive,
	}
}

// ZstdChunked makes a zstd:chunked layer of an archive, annotated as podman does:
// by the digest of the compressed table only.
func ZstdChunked(t testing.TB, archive []byte) Layer {
	t.Helper()
	meta := map[string]string{}
	data, _ := build(t, archive, estargz.WithCompression(&zstdBoth{
		Compressor:   &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: meta},
		Decompressor: new(zstdchunked.Decompressor),
	}))
	return Layer{
		Desc: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.FromBytes(data), Size: int64(len(data)),
			Annotations: map[string]string{
				"io.github.containers.zstd-chunked.manifest-checksum": meta[zstdchunked.ManifestChecksumAnnotation],
				"io.github.containers.zstd-chunked.manifest-position": meta[zstdchunked.ManifestPositionAnnotation],
			},
		},
		Data: data, Tar: archive,
	}
}

type zstdBoth struct {
	*zstdchunked.Compressor
	*zstdchunked.Decompressor
}

// Gzip makes a plain layer.
func Gzip(t testing.TB, archive []byte) Layer {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	w.Write(archive)
	w.Close()
	return Layer{
		Desc: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b.Bytes()), Size: int64(b.Len())},
		Data: b.Bytes(), Tar: archive,
	}
}

func build(t testing.TB, archive []byte, opts ...estargz.Option) ([]byte, digest.Digest) {
	t.Helper()
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(archive), 0, int64(len(archive))),
		append(opts, estargz.WithChunkSize(ChunkSize))...)
	if err != nil {
		t.Fatal(err)
	}
	defer blob.Close()
	data, err := io.ReadAll(blob)
	if err != nil {
		t.Fatal(err)
	}
	return data, blob.TOCDigest()
}

// Labels are what containerd 2.x hands down for a layer, with the layers above it, the
// annotation that it copies from the manifest included.
func Labels(l Layer, above ...Layer) map[string]string {
	all := []string{l.Desc.Digest.String()}
	for _, a := range above {
		all = append(all, a.Desc.Digest.String())
	}
	m := map[string]string{
		snapshotters.TargetRefLabel:            Ref,
		snapshotters.TargetManifestDigestLabel: Manifest.String(),
		snapshotters.TargetLayerDigestLabel:    l.Desc.Digest.String(),
		snapshotters.TargetImageLayersLabel:    strings.Join(all, ","),
	}
	for k, v := range l.Desc.Annotations {
		if strings.HasPrefix(k, "containerd.io/snapshot/") {
			m[k] = v
		}
	}
	return m
}
