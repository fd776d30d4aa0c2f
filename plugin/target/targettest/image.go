// Package targettest has an image that lives in memory: the fake beside target.Image, for tests that want real engines
// and no network.
package targettest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/plugin/progress"
	"github.com/docker-quay/docker-quay/plugin/target"
)

// File is an entry of a layer. A nil Body with a name that ends in "/" is a directory.
type File struct {
	Name string
	Mode int64
	Body []byte
	Link string // target of a symbolic link
}

// Spec describes an image.
type Spec struct {
	Ref    string // as the user gives it
	Layers [][]File
	Config ocispec.ImageConfig
	// Index wraps the manifest in an index, beside a manifest of another platform whose content nobody has.
	Index bool
}

// Image is a target.Image in memory.
type Image struct {
	ref      reference.Named
	target   ocispec.Descriptor
	manifest ocispec.Descriptor
	config   ocispec.Descriptor
	layers   []ocispec.Descriptor
	blobs    map[digest.Digest][]byte

	mu     sync.Mutex
	opened map[digest.Digest]int // guarded by mu
	fail   map[digest.Digest]error
}

var _ target.Image = (*Image)(nil)

// New builds the image.
func New(s Spec) (*Image, error) {
	ref, err := reference.ParseNormalizedNamed(s.Ref)
	if err != nil {
		return nil, err
	}
	i := &Image{ref: reference.TagNameOnly(ref), blobs: map[digest.Digest][]byte{}, opened: map[digest.Digest]int{}, fail: map[digest.Digest]error{}}
	config := ocispec.Image{
		Platform: platforms.DefaultSpec(), Config: s.Config,
		RootFS: ocispec.RootFS{Type: "layers"},
	}
	config.Platform.OSVersion, config.Platform.Variant = "", ""
	for n, files := range s.Layers {
		raw, err := layerTar(files)
		if err != nil {
			return nil, err
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(raw))
		created := time.Unix(int64(1700000000+n), 0).UTC()
		config.History = append(config.History, ocispec.History{Created: &created, CreatedBy: fmt.Sprintf("layer %d", n)})
		i.layers = append(i.layers, i.add(ocispec.MediaTypeImageLayerGzip, compress(raw)))
	}
	i.config = i.addJSON(ocispec.MediaTypeImageConfig, config)
	i.manifest = i.addJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: i.config, Layers: i.layers,
	})
	i.target = i.manifest
	if s.Index {
		p := config.Platform
		i.manifest.Platform = &p
		absent := ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("elsewhere"), Size: 500,
			Platform: &ocispec.Platform{OS: "linux", Architecture: "s390x"},
		}
		i.target = i.addJSON(ocispec.MediaTypeImageIndex, ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
			Manifests: []ocispec.Descriptor{absent, i.manifest},
		})
	}
	return i, nil
}

func (i *Image) add(mediaType string, b []byte) ocispec.Descriptor {
	d := digest.FromBytes(b)
	i.blobs[d] = b
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(b))}
}

func (i *Image) addJSON(mediaType string, v any) ocispec.Descriptor {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // only types of this file
	}
	return i.add(mediaType, b)
}

// Ref is the normalized name.
func (i *Image) Ref() reference.Named { return i.ref }

// Target is the index when there is one, else the manifest.
func (i *Image) Target() ocispec.Descriptor { return i.target }

// Manifest is that of our platform.
func (i *Image) Manifest() ocispec.Descriptor { return i.manifest }

// Config is the image's configuration.
func (i *Image) Config() ocispec.Descriptor { return i.config }

// Layers are those of the manifest.
func (i *Image) Layers() []ocispec.Descriptor { return slices.Clone(i.layers) }

// FailOpen lets Open of a blob answer err; nil heals it.
func (i *Image) FailOpen(d digest.Digest, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.fail[d] = err
}

// Opened tells how often a blob was opened.
func (i *Image) Opened(d digest.Digest) int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.opened[d]
}

// Open reads a blob; errdefs.ErrNotFound for what the image lacks.
func (i *Image) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.fail[desc.Digest]; err != nil {
		return nil, err
	}
	i.opened[desc.Digest]++
	b, ok := i.blobs[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("%s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(b)), ctx.Err()
}

// Fetch fails as Open would.
func (i *Image) Fetch(ctx context.Context) error {
	for _, d := range append([]ocispec.Descriptor{i.config}, i.layers...) {
		rc, err := i.Open(ctx, d)
		if err != nil {
			return err
		}
		rc.Close()
	}
	return nil
}

// Progress tells that all layers came from the registry.
func (i *Image) Progress() []progress.Blob {
	var out []progress.Blob
	for _, l := range i.layers {
		out = append(out, progress.Blob{
			Digest: l.Digest, MediaType: l.MediaType, Size: l.Size, Have: l.Size, FromOrigin: l.Size, State: progress.Complete,
		})
	}
	return out
}

// Close does nothing.
func (i *Image) Close() error { return nil }

func layerTar(files []File) ([]byte, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.Name, Mode: f.Mode, Size: int64(len(f.Body)), Typeflag: tar.TypeReg, ModTime: time.Unix(1700000000, 0)}
		switch {
		case f.Link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
		case strings.HasSuffix(f.Name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(f.Body); err != nil {
			return nil, err
		}
	}
	err := tw.Close()
	return buf.Bytes(), err
}

func compress(b []byte) []byte {
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	_, _ = w.Write(b) // a bytes.Buffer takes all
	_ = w.Close()
	return buf.Bytes()
}
