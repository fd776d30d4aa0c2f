package published

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/origin"
)

const (
	// ArtifactType of the referrer that holds the torrents of an image: an OCI image manifest whose subject is the image's manifest for one
	// platform, with an empty config, and one .torrent file a layer.
	ArtifactType = "application/vnd.docker-quay.torrents.v1"
	// LayerAnnotation is on each of its entries: the digest of the image's layer that the .torrent file is of.
	LayerAnnotation = "com.github.docker-quay.torrent.layer"
)

const (
	// maxReferrers bounds how many lists of torrents are read for one image: one a publisher, and one for each time that a publisher
	// changed the trackers.
	maxReferrers = 8
	// maxEntries bounds the entries that are looked at in one. The kernel stacks 500 layers at most.
	maxEntries = 512
	// maxTorrents bounds how much is read of all .torrent files of an image, in bytes: those of 1.6 TiB of layers.
	maxTorrents = 64 << 20
	// maxPerLayer bounds the different torrents of one layer. Each is a swarm of its own to join.
	maxPerLayer = 4
)

// Store puts the torrents of an image's layers beside the image, as a referrer of subject: the image's manifest for one platform. Who
// may push to the repository may do so, and who may pull the image can read them. Storing the same again changes nothing.
func Store(ctx context.Context, repo *origin.Repository, subject ocispec.Descriptor, torrents []*Torrent) error {
	m, err := manifest(subject, torrents)
	if err != nil {
		return fmt.Errorf("cannot publish the torrents of %s@%s: %w", repo.Name(), subject.Digest, err)
	}
	for i, t := range torrents {
		if err := repo.Push(ctx, m.Layers[i], t.Encode()); err != nil {
			return err
		}
	}
	if err := repo.Push(ctx, m.Config, ocispec.DescriptorEmptyJSON.Data); err != nil {
		return err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return repo.Push(ctx, describe(ocispec.MediaTypeImageManifest, text), text)
}

// manifest is the referrer.
func manifest(subject ocispec.Descriptor, torrents []*Torrent) (ocispec.Manifest, error) {
	if len(torrents) == 0 || len(torrents) > maxEntries {
		return ocispec.Manifest{}, fmt.Errorf("%d torrents are not those of an image's layers", len(torrents))
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactType,
		Config:  ocispec.Descriptor{MediaType: ocispec.MediaTypeEmptyJSON, Digest: ocispec.DescriptorEmptyJSON.Digest, Size: ocispec.DescriptorEmptyJSON.Size},
		Subject: &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	}
	for _, t := range torrents {
		if t.Layer.Digest == "" {
			return ocispec.Manifest{}, fmt.Errorf("the torrent %s does not say of which layer it is", t.InfoHash.HexString())
		}
		text := t.Encode()
		if len(text) > MaxSize {
			return ocispec.Manifest{}, fmt.Errorf("the torrent of the layer %s has more than %d MiB", t.Layer.Digest, MaxSize>>20)
		}
		d := describe(MediaType, text)
		d.Annotations = map[string]string{
			LayerAnnotation: t.Layer.Digest.String(),
			// By this name other programs that fetch artifacts save it.
			ocispec.AnnotationTitle: LayerName(t.Layer.Digest) + ".torrent",
		}
		m.Layers = append(m.Layers, d)
	}
	return m, nil
}

func describe(mediaType string, text []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
}

// Query says of what image torrents are looked for.
type Query struct {
	// Subject is the image's manifest for one platform.
	Subject digest.Digest
	// Layers are those that torrents are wanted of, with digest and size.
	Layers []ocispec.Descriptor
	// Log is told what was found and not taken; nil is silence.
	Log *slog.Logger
}

// Find gets the torrents that are published for layers of an image, at most four a layer, in the order of the registry's list. Each
// says that it is of its layer and has its size; torrents with the same infohash come as one, with the trackers and web seeds of all.
// That the layer's bytes are in it shows when they were downloaded, not before.
//
// ErrNone says that there are none. What cannot be used is left out; it becomes an error when nothing can be.
func Find(ctx context.Context, repo *origin.Repository, q Query) ([]*Torrent, error) {
	list, err := repo.Referrers(ctx, q.Subject, ArtifactType)
	if err != nil {
		return nil, err
	}
	f := finder{repo: repo, log: q.Log, wanted: map[digest.Digest]int64{}, left: maxTorrents}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	for _, l := range q.Layers {
		f.wanted[l.Digest] = l.Size
	}
	read := 0
	for _, d := range list {
		if read == maxReferrers {
			f.log.Warn("more lists of torrents are published than are read", "subject", q.Subject, "read", read)
			break
		}
		if d.MediaType != ocispec.MediaTypeImageManifest {
			continue
		}
		read++
		if err := f.referrer(ctx, q.Subject, d.Digest); err != nil {
			if ctx.Err() != nil {
				return nil, err
			}
			f.skip(err, "referrer", d.Digest)
		}
	}
	switch {
	case len(f.found) > 0:
		return f.found, nil
	case f.trouble != nil:
		return nil, f.trouble
	}
	return nil, fmt.Errorf("%s@%s: %w", repo.Name(), q.Subject, ErrNone)
}

// finder gathers torrents from referrers.
type finder struct {
	repo    *origin.Repository
	log     *slog.Logger
	wanted  map[digest.Digest]int64 // size by layer
	left    int64                   // how many bytes of .torrent files may still be read
	found   []*Torrent
	trouble error // the first
}

func (f *finder) skip(err error, attrs ...any) {
	f.log.Warn("a published torrent is not used", append(attrs, "error", err)...)
	if f.trouble == nil {
		f.trouble = err
	}
}

// referrer reads one list of torrents.
func (f *finder) referrer(ctx context.Context, subject, d digest.Digest) error {
	_, text, err := f.repo.Manifest(ctx, d.String())
	if err != nil {
		return err
	}
	entries, err := parseReferrer(text, subject)
	if err != nil {
		return fmt.Errorf("%s@%s: %w", f.repo.Name(), d, err)
	}
	for _, e := range entries {
		layer := digest.Digest(e.Annotations[LayerAnnotation])
		size, ok := f.wanted[layer]
		if !ok {
			continue
		}
		t, err := f.torrent(ctx, e, layer, size)
		switch {
		case ctx.Err() != nil:
			return err
		case err != nil:
			f.skip(err, "layer", layer)
		default:
			f.add(t)
		}
	}
	return nil
}

// parseReferrer reads a manifest that a registry listed as one with torrents of subject. nil is one of another kind.
func parseReferrer(text []byte, subject digest.Digest) ([]ocispec.Descriptor, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("the list of torrents: %w: %w", ErrInvalid, err)
	}
	switch {
	case m.ArtifactType != ArtifactType:
		return nil, nil
	case m.Subject == nil || m.Subject.Digest != subject:
		return nil, fmt.Errorf("the list of torrents: %w: it is of another image", ErrInvalid)
	case len(m.Layers) > maxEntries:
		return nil, fmt.Errorf("the list of torrents: %w: it has %d entries", ErrInvalid, len(m.Layers))
	}
	var entries []ocispec.Descriptor
	for _, e := range m.Layers {
		if e.MediaType == MediaType && e.Size > 0 && e.Size <= MaxSize && e.Digest.Validate() == nil {
			entries = append(entries, e)
		}
	}
	return entries, nil
}

// torrent reads one .torrent file.
func (f *finder) torrent(ctx context.Context, e ocispec.Descriptor, layer digest.Digest, size int64) (*Torrent, error) {
	if e.Size > f.left {
		return nil, fmt.Errorf("the torrents of this image have more than %d MiB in all", maxTorrents>>20)
	}
	f.left -= e.Size
	s, err := f.repo.Open(ctx, e, 0, -1)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	text, err := io.ReadAll(io.LimitReader(s, e.Size+1))
	if err != nil {
		return nil, err
	}
	if e.Digest.Algorithm().FromBytes(text) != e.Digest {
		return nil, fmt.Errorf("%s@%s: %w", f.repo.Name(), e.Digest, origin.ErrMismatch)
	}
	t, err := Parse(text)
	if err != nil {
		return nil, err
	}
	return t, t.of(layer, size)
}

// of says what keeps t from being a torrent of a layer.
func (t *Torrent) of(layer digest.Digest, size int64) error {
	if t.Layer.Digest != layer || t.Layer.Size != size {
		return fmt.Errorf("%w: it is of %q with %d bytes, not of the layer %s with %d", ErrInvalid, t.Layer.Digest, t.Layer.Size, layer, size)
	}
	return nil
}

// add takes a torrent, or its trackers and web seeds when the same was found before.
func (f *finder) add(t *Torrent) {
	same := 0
	for i, other := range f.found {
		if other.InfoHash == t.InfoHash {
			var trackers []string
			for _, tier := range t.Trackers {
				trackers = append(trackers, tier...)
			}
			f.found[i] = other.With(trackers, t.WebSeeds)
			return
		}
		if other.Layer.Digest == t.Layer.Digest {
			same++
		}
	}
	if same == maxPerLayer {
		f.skip(errors.New("there are too many for one layer"), "layer", t.Layer.Digest)
		return
	}
	f.found = append(f.found, t)
}
