package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is an image of one platform in an OCI layout.
type Image struct {
	Dir      string // the layout
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	Layers   []ocispec.Descriptor
}

// Size is what a node without anything must fetch: manifest, configuration and layers, in bytes.
func (i *Image) Size() int64 {
	n := i.Manifest.Size + i.Config.Size
	for _, l := range i.Layers {
		n += l.Size
	}
	return n
}

// Path is the file of a blob.
func (i *Image) Path(d digest.Digest) string { return blobPath(i.Dir, d) }

func blobPath(dir string, d digest.Digest) string {
	return filepath.Join(dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// Load opens a layout with one image.
func Load(dir string) (*Image, error) {
	var index ocispec.Index
	if err := readJSON(filepath.Join(dir, ocispec.ImageIndexFile), &index); err != nil {
		return nil, err
	}
	if len(index.Manifests) != 1 {
		return nil, fmt.Errorf("the layout %s has %d images, not 1", dir, len(index.Manifests))
	}
	var manifest ocispec.Manifest
	if err := readJSON(blobPath(dir, index.Manifests[0].Digest), &manifest); err != nil {
		return nil, err
	}
	return &Image{Dir: dir, Manifest: index.Manifests[0], Config: manifest.Config, Layers: manifest.Layers}, nil
}

func readJSON(path string, v any) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("open an image layout: %w", err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("open an image layout: %s: %w", path, err)
	}
	return nil
}

// layout is an image in the making.
type layout struct {
	dir     string
	layers  []ocispec.Descriptor
	diffIDs []digest.Digest
	history []ocispec.History
}

// cached returns the layout NAME below cache, made by build when it is not there. Other processes wait meanwhile; one that
// dies leaves nothing that looks finished.
func cached(ctx context.Context, cache, name string, build func(ctx context.Context, dir string) error) (string, error) {
	dir := filepath.Join(cache, name)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("make the image cache: %w", err)
	}
	if done(dir) {
		return dir, nil
	}
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", fmt.Errorf("lock the image cache: %w", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock the image cache: %w", err)
	}
	if done(dir) {
		return dir, nil
	}
	making := dir + ".making"
	if err := os.RemoveAll(making); err != nil {
		return "", fmt.Errorf("clear a half-made image: %w", err)
	}
	if err := os.MkdirAll(making, 0o755); err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	if err := build(ctx, making); err != nil {
		return "", errors.Join(fmt.Errorf("make the image %s: %w", name, err), os.RemoveAll(making))
	}
	if err := os.Rename(making, dir); err != nil {
		return "", fmt.Errorf("make %s: %w", name, err)
	}
	return dir, nil
}

func done(dir string) bool {
	_, err := os.Stat(dir)
	return err == nil
}

// addBlob writes a blob of the layout from what write produces.
func (l *layout) addBlob(write func(io.Writer) error) (digest.Digest, int64, error) {
	blobs := filepath.Join(l.dir, ocispec.ImageBlobsDir, digest.Canonical.String())
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return "", 0, err
	}
	f, err := os.CreateTemp(blobs, "new-")
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	digester := digest.Canonical.Digester()
	counter := &countWriter{w: io.MultiWriter(f, digester.Hash())}
	if err := write(counter); err != nil {
		return "", 0, err
	}
	if err := f.Chmod(0o644); err != nil {
		return "", 0, err
	}
	if err := f.Close(); err != nil {
		return "", 0, err
	}
	return digester.Digest(), counter.n, os.Rename(f.Name(), blobPath(l.dir, digester.Digest()))
}

func (l *layout) addJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	d, n, err := l.addBlob(func(w io.Writer) error {
		raw, err := json.Marshal(v)
		if err == nil {
			_, err = w.Write(raw)
		}
		return err
	})
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: n}, err
}

// finish writes configuration, manifest and index.
func (l *layout) finish(config ocispec.ImageConfig) error {
	epoch := Epoch
	c, err := l.addJSON(ocispec.MediaTypeImageConfig, ocispec.Image{
		Created:  &epoch,
		Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: l.diffIDs},
		History:  l.history,
	})
	if err != nil {
		return err
	}
	m, err := l.addJSON(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: c, Layers: l.layers,
	})
	if err != nil {
		return err
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m},
	})
	if err != nil {
		return err
	}
	version, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(l.dir, ocispec.ImageLayoutFile), version, 0o644),
		os.WriteFile(filepath.Join(l.dir, ocispec.ImageIndexFile), index, 0o644))
}

// recipe names what goes into an image: its parts hashed, short enough for a file name.
func recipe(parts ...string) string {
	return digest.FromString(strings.Join(parts, "\x00")).Encoded()[:12]
}
