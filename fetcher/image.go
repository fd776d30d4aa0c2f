package fetcher

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

const (
	// maxLayers bounds the layers of an image. The kernel stacks 500 at most.
	maxLayers = 512
	// maxManifests bounds the entries of an index.
	maxManifests = 1024
	// parallelBlobs is how many layers of an image are fetched at once: enough
	// that small ones do not queue behind a large one.
	parallelBlobs = 4
)

// Errors of image resolution.
var (
	// ErrNoPlatform: the image exists, but not for the platform asked for.
	ErrNoPlatform = errors.New("no image for that platform")
	// ErrUnsupported: what the reference names is no image this program knows.
	ErrUnsupported = errors.New("not a container image")
)

// ImageOptions says how an image is resolved and where it may come from.
type ImageOptions struct {
	// Origin is the registry client to use, with the credentials of who asks.
	Origin *origin.Client
	// Platform picks from an index; the zero value is this machine's.
	Platform ocispec.Platform
	// SkipOrigin takes the blobs from peers only. Manifests still come from the
	// registry, which is asked whether the caller may have the image.
	SkipOrigin bool
	// Offline accepts, when no registry and no member that reaches it answers,
	// the newest digest that members saw under the name; without it only what this
	// node saw itself.
	Offline bool
	// AllowCached decides whether an image whose registry cannot be reached may
	// be served from what the store saw; nil allows it. It is where a node that
	// serves several users asks whether this one has had access.
	AllowCached func(store.Ref) bool
	// Torrents says whether torrents that were published for the layers are looked for and used; "" is TorrentsAuto.
	Torrents TorrentPolicy
	// Trackers, announce URLs, replace those of published torrents when there are any: see CheckTrackers.
	Trackers []string
}

// Image is a resolved image: a manifest for one platform and the way to its
// blobs. Close it when done.
type Image struct {
	f    *Fetcher
	o    ImageOptions
	repo *origin.Repository

	// Ref is the reference asked for, with its tag or digest.
	Ref reference.Named
	// Target is what the reference names: an index or a manifest. Manifest is
	// the one of the platform, the same when there is no index.
	Target, Manifest, Config ocispec.Descriptor
	// Layers are in the order of the manifest, lowest first.
	Layers []ocispec.Descriptor
	// Note says where the answer came from when that was not the registry.
	Note string

	access string // as the registry let it be read, through whomever
	remote bool   // a member told what the image is: this node does not reach the registry

	torrents *torrentSearch // nil when none are looked for

	mu    sync.Mutex // guards following
	blobs map[digest.Digest]*Blob
	seen  map[digest.Digest]int64 // bytes on disk before a blob was opened
}

// Image resolves a reference: its tag to an index or manifest, that to the
// manifest of one platform. The registry is asked first; when it cannot be
// reached, or is not to be asked, members of the trust domain that reach it are
// asked, with the credentials of o.Origin. When there are none, what this store
// saw last under the same name is used, or what members saw, and Note says so. A
// registry that refuses is never overruled.
func (f *Fetcher) Image(ctx context.Context, ref reference.Named, o ImageOptions) (*Image, error) {
	img, body, err := f.find(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	if err := img.resolve(ctx, body); err != nil {
		return nil, err
	}
	for _, d := range img.all() {
		if info, err := f.o.Store.Stat(d.Digest); err == nil {
			img.seen[d.Digest] = info.Have
		}
	}
	return img, img.searchTorrents()
}

// resolve walks from the target's body to the platform's manifest.
func (i *Image) resolve(ctx context.Context, body []byte) (err error) {
	i.Manifest = i.Target
	if images.IsIndexType(i.Target.MediaType) {
		var index ocispec.Index
		if err := json.Unmarshal(body, &index); err != nil {
			return fmt.Errorf("%s: index: %w", i.Ref, err)
		}
		if i.Manifest, err = i.pick(index.Manifests); err != nil {
			return err
		}
		if body, err = i.manifest(ctx, i.Manifest); err != nil {
			return err
		}
	}
	if !images.IsManifestType(i.Manifest.MediaType) {
		return fmt.Errorf("%s has media type %q: %w", i.Ref, i.Manifest.MediaType, ErrUnsupported)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(body, &m); err != nil {
		return fmt.Errorf("%s: manifest: %w", i.Ref, err)
	}
	if len(m.Layers) > maxLayers {
		return fmt.Errorf("%s has %d layers, more than the %d that are allowed: %w", i.Ref, len(m.Layers), maxLayers, ErrUnsupported)
	}
	i.Config, i.Layers = m.Config, m.Layers
	for _, d := range i.all() {
		if err := d.Digest.Validate(); err != nil {
			return fmt.Errorf("%s: manifest names %q: %w", i.Ref, d.Digest, err)
		}
		if d.Size < 0 {
			return fmt.Errorf("%s: manifest gives %s a size of %d: %w", i.Ref, d.Digest, d.Size, ErrUnsupported)
		}
	}
	return nil
}

// pick chooses the manifest of the platform.
func (i *Image) pick(manifests []ocispec.Descriptor) (ocispec.Descriptor, error) {
	if len(manifests) > maxManifests {
		return ocispec.Descriptor{}, fmt.Errorf("%s lists %d manifests: %w", i.Ref, len(manifests), ErrUnsupported)
	}
	want := i.o.Platform
	if want.OS == "" {
		want = platforms.DefaultSpec()
	}
	match := platforms.Only(want)
	var best *ocispec.Descriptor
	var have []string
	for k := range manifests {
		m := &manifests[k]
		if !images.IsManifestType(m.MediaType) || m.Platform == nil {
			continue
		}
		have = append(have, platforms.Format(*m.Platform))
		if match.Match(*m.Platform) && (best == nil || match.Less(*m.Platform, *best.Platform)) {
			best = m
		}
	}
	if best == nil {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %w: %s is not among %v", i.Ref, ErrNoPlatform, platforms.Format(want), have)
	}
	return *best, nil
}

// all returns config and layers, each digest once.
func (i *Image) all() []ocispec.Descriptor {
	seen := map[digest.Digest]bool{}
	var all []ocispec.Descriptor
	for _, d := range append([]ocispec.Descriptor{i.Config}, i.Layers...) {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			all = append(all, d)
		}
	}
	return all
}

// Content returns the body of the image's index or manifest.
func (i *Image) Content(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	return i.manifest(ctx, desc)
}

// Blob returns a handle on the config or a layer. The image owns it: do not
// close it.
func (i *Image) Blob(ctx context.Context, desc ocispec.Descriptor) (*Blob, error) {
	i.mu.Lock()
	b := i.blobs[desc.Digest]
	i.mu.Unlock()
	if b != nil {
		return b, nil
	}
	b, err := i.f.Layer(ctx, i.Ref, desc, Way{Repository: i.repo, Client: i.o.Origin, PeersOnly: i.peersOnly(desc), Remote: i.remote})
	if err != nil {
		return nil, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if other := i.blobs[desc.Digest]; other != nil {
		_ = b.Close()
		return other, nil
	}
	i.blobs[desc.Digest] = b
	i.torrents.expect(b.d)
	return b, nil
}

// Open streams any part of the image: index, manifest, config or layer. The end
// of a layer's stream means that its digest was checked.
func (i *Image) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if images.IsIndexType(desc.MediaType) || images.IsManifestType(desc.MediaType) || desc.Digest == i.Target.Digest || desc.Digest == i.Manifest.Digest {
		b, err := i.manifest(ctx, desc)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(bytes.NewReader(b)), nil
	}
	b, err := i.Blob(ctx, desc)
	if err != nil {
		return nil, err
	}
	return b.Reader(ctx), nil
}

// Fetch gets config and layers, and returns when all digests were checked.
func (i *Image) Fetch(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelBlobs)
	for _, d := range i.all() {
		g.Go(func() error {
			b, err := i.Blob(ctx, d)
			if err != nil {
				return err
			}
			return b.Wait(ctx)
		})
	}
	return g.Wait()
}

// Progress returns how far each blob is, config first, then the layers in order.
func (i *Image) Progress() []Progress {
	all := i.all()
	ps := make([]Progress, 0, len(all))
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, d := range all {
		if b := i.blobs[d.Digest]; b != nil {
			ps = append(ps, b.d.progress(d))
			continue
		}
		// Somebody else may be at it: another pull, a lazy mount.
		i.f.mu.Lock()
		other := i.f.downloads[d.Digest]
		i.f.mu.Unlock()
		if other != nil && other.desc.Size == d.Size {
			ps = append(ps, other.progress(d))
			continue
		}
		have := i.seen[d.Digest]
		ps = append(ps, Progress{Digest: d.Digest, MediaType: d.MediaType, Size: d.Size, State: Waiting, Have: have, FromCache: have})
	}
	return ps
}

// Access is how the registry let this image be read: see origin.Repository.
func (i *Image) Access() string { return i.access }

// Close gives the blobs back. What was not complete stops where it is.
func (i *Image) Close() error {
	i.torrents.end()
	i.mu.Lock()
	defer i.mu.Unlock()
	for _, b := range i.blobs {
		_ = b.Close()
	}
	clear(i.blobs)
	return nil
}

// BlobsOf returns the descriptors of config and layers that a manifest's body
// names.
func BlobsOf(manifest []byte) ([]ocispec.Descriptor, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(manifest, &m); err != nil {
		return nil, err
	}
	if len(m.Layers) > maxLayers {
		return nil, fmt.Errorf("%d layers: %w", len(m.Layers), ErrUnsupported)
	}
	return append([]ocispec.Descriptor{m.Config}, m.Layers...), nil
}
