package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// maxRepositories bounds how many repositories are remembered, with the tokens that
// opened them. A node runs tens of images; when a thousand are passed all are
// forgotten, which costs each a token.
const maxRepositories = 1000

// Layers is lazy.Layers over the fetcher.
type Layers struct {
	f *fetcher.Fetcher
	// own returns the client with the node's own credentials, for a registry's host.
	own func(host string) *origin.Client

	mu    sync.Mutex // guards following
	repos map[string]*repository
}

// repository is one repository on one registry, and how to get at it.
type repository struct {
	client *origin.Client
	origin *origin.Repository
}

var _ lazy.Layers = (*Layers)(nil)

// NewLayers returns the layers that f can fetch. own gives the client to use for
// a registry, by its host.
func NewLayers(f *fetcher.Fetcher, own func(host string) *origin.Client) *Layers {
	return &Layers{f: f, own: own, repos: make(map[string]*repository)}
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
	name, repo, err := l.repository(ref)
	if err != nil {
		return nil, err
	}
	b, err := l.f.Layer(ctx, name, desc, fetcher.Way{Repository: repo.origin, Client: repo.client})
	if err != nil {
		return nil, err
	}
	return demandBlob{b}, nil
}

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

// demandBlob reads a blob as one that a container waits for.
type demandBlob struct{ *fetcher.Blob }

func (b demandBlob) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return b.Blob.ReadAt(ctx, p, off, fetcher.Demand)
}
