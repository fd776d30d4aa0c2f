package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"

	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/index/published"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// maxRepositories bounds how many repositories are remembered, with the tokens that
// opened them. A node runs tens of images; when a thousand are passed all are
// forgotten, which costs each a token.
const maxRepositories = 1000

// Layers are the layers that the fetcher can get: lazy.Layers and layerfs.Source.
type Layers struct {
	f *fetcher.Fetcher
	// own returns the client with the node's own credentials, for a registry's host.
	own    func(host string) *origin.Client
	finder *published.Finder

	mu    sync.Mutex // guards following
	repos map[string]*repository
}

// repository is one repository on one registry, and how to get at it.
type repository struct {
	client *origin.Client
	origin *origin.Repository
}

var _ LayerSource = (*Layers)(nil)

// NewLayers returns the layers that f can fetch. own gives the client to use for
// a registry, by its host.
func NewLayers(f *fetcher.Fetcher, own func(host string) *origin.Client, log *slog.Logger) *Layers {
	return &Layers{
		f: f, own: own, repos: make(map[string]*repository),
		finder: published.NewFinder(published.FinderOptions{Log: log}),
	}
}

// Opened tells of a client that may read the image ref. Its repository is read with it
// from then on: containerd's labels carry no credentials, and the node may have none.
func (l *Layers) Opened(ref reference.Named, c *origin.Client) {
	r, err := c.Repository(ref)
	if err != nil {
		return
	}
	l.remember(ref, &repository{client: c, origin: r})
}

// Describe implements lazy.Layers. A manifest that the store has is not asked for.
func (l *Layers) Describe(ctx context.Context, ref string, manifest, layer digest.Digest) (ocispec.Descriptor, error) {
	name, repo, err := l.repository(ref)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	blobs, err := l.blobs(ctx, name, repo, manifest)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	i := slices.IndexFunc(blobs, func(d ocispec.Descriptor) bool { return d.Digest == layer })
	if i < 0 {
		return ocispec.Descriptor{}, fmt.Errorf("the manifest of %s names no layer %s", ref, layer)
	}
	return blobs[i], nil
}

// blobs returns the descriptors in a manifest, or in the one that name stands for on this platform.
func (l *Layers) blobs(ctx context.Context, name reference.Named, repo *repository, manifest digest.Digest) ([]ocispec.Descriptor, error) {
	o := fetcher.ImageOptions{Origin: repo.client}
	if manifest == "" {
		img, err := l.f.Image(ctx, name, o)
		if err != nil {
			return nil, err
		}
		defer img.Close()
		return img.Layers, nil
	}
	if body, err := l.f.Store().Content(manifest); err == nil {
		return fetcher.BlobsOf(body)
	}
	byDigest, err := reference.WithDigest(reference.TrimNamed(name), manifest)
	if err != nil {
		return nil, err
	}
	_, body, err := l.f.Manifest(ctx, byDigest, o)
	if err != nil {
		return nil, err
	}
	return fetcher.BlobsOf(body)
}

// Open implements lazy.Layers.
func (l *Layers) Open(ctx context.Context, ref string, desc ocispec.Descriptor) (lazy.Layer, error) {
	b, err := l.blob(ctx, ref, desc, false) // at the mount: refused, containerd unpacks the layer
	if err != nil {
		return nil, err
	}
	return demandBlob{b}, nil
}

// Blob implements layerfs.Source.
func (l *Layers) Blob(ctx context.Context, ref string, desc ocispec.Descriptor) (layerfs.Blob, error) {
	b, err := l.blob(ctx, ref, desc, false)
	if err != nil {
		return nil, err
	}
	return sharedBlob{b}, nil
}

// Needed implements layerfs.Source.
func (l *Layers) Needed(ctx context.Context, ref string, desc ocispec.Descriptor) (layerfs.Blob, error) {
	b, err := l.blob(ctx, ref, desc, true)
	if err != nil {
		return nil, err
	}
	return sharedBlob{b}, nil
}

func (l *Layers) blob(ctx context.Context, ref string, desc ocispec.Descriptor, needed bool) (*fetcher.Blob, error) {
	name, repo, err := l.repository(ref)
	if err != nil {
		return nil, err
	}
	return l.f.Layer(ctx, name, desc, fetcher.Way{Repository: repo.origin, Client: repo.client, Needed: needed})
}

// Index implements layerfs.Source.
func (l *Layers) Index(ctx context.Context, ref string, manifest digest.Digest, desc ocispec.Descriptor) (*index.Index, error) {
	name, repo, err := l.repository(ref)
	if err != nil {
		return nil, err
	}
	way := fetcher.Way{Repository: repo.origin, Client: repo.client}
	x, err := l.finder.Find(ctx, published.Query{
		Repository: repo.origin, Manifest: manifest, Layer: desc,
		Open: func(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
			b, err := l.f.Layer(ctx, name, d, way)
			if err != nil {
				return nil, err
			}
			return wholeBlob{b.Reader(ctx), b}, nil
		},
	})
	if errors.Is(err, published.ErrNone) {
		return nil, nil
	}
	return x, err
}

// Told implements layerfs.Source.
func (l *Layers) Told(ctx context.Context, ref string, desc ocispec.Descriptor, accept func([]byte) error) error {
	b, err := l.blob(ctx, ref, desc, false)
	if err != nil {
		return err
	}
	defer b.Close()
	return b.Index(ctx, accept)
}

// Verify implements layerfs.Source.
func (l *Layers) Verify(ctx context.Context, blob io.Reader, x *index.Index) error {
	return published.Verify(ctx, blob, x)
}

// wholeBlob is a reader that closes its blob, too.
type wholeBlob struct {
	io.ReadCloser
	blob *fetcher.Blob
}

func (w wholeBlob) Close() error { return errors.Join(w.ReadCloser.Close(), w.blob.Close()) }

// repository returns how to get at the repository of an image.
func (l *Layers) repository(ref string) (reference.Named, *repository, error) {
	name, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, nil, fmt.Errorf("the image's name %q is malformed: %w", ref, err)
	}
	l.mu.Lock()
	r := l.repos[name.Name()]
	l.mu.Unlock()
	if r != nil {
		return name, r, nil
	}
	c := l.own(reference.Domain(name))
	o, err := c.Repository(name)
	if err != nil {
		return nil, nil, err
	}
	r = &repository{client: c, origin: o}
	l.remember(name, r)
	return name, r, nil
}

func (l *Layers) remember(name reference.Named, r *repository) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.repos) >= maxRepositories {
		clear(l.repos)
	}
	l.repos[name.Name()] = r
}

// sharedBlob reads a blob as the layer store wants it.
type sharedBlob struct{ *fetcher.Blob }

func (b sharedBlob) ReadAt(ctx context.Context, p []byte, off int64, prio layerstore.Priority) (int, error) {
	return b.Blob.ReadAt(ctx, p, off, fetcher.Priority(prio))
}

// Doubt hears that bytes were not what the layer's index says. A piece on disk is dropped when the whole
// does not have its digest: so the whole is fetched.
func (b sharedBlob) Doubt(_, _ int64) { b.Blob.Fetch() }

// demandBlob reads a blob as one that a container waits for.
type demandBlob struct{ *fetcher.Blob }

func (b demandBlob) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return b.Blob.ReadAt(ctx, p, off, fetcher.Demand)
}
