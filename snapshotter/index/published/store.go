package published

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// Layer is an index to be published, encoded.
type Layer struct {
	Digest digest.Digest // of the layer that it is of
	Text   []byte
}

// Encode makes of a layer's index what is published. The error is ErrInvalid when nobody would use it:
// it is too large, or says nothing of its diff ID, as one made from a table of contents does.
func Encode(x *index.Index) (Layer, error) {
	var b bytes.Buffer
	if err := index.Encode(&b, x); err != nil {
		return Layer{}, err
	}
	switch n := int64(b.Len()); {
	case x.DiffID == "":
		return Layer{}, fmt.Errorf("%w: it has no diff ID, so it could never be verified", ErrInvalid)
	case n > MaxIndex:
		return Layer{}, fmt.Errorf("%w: it has %d MiB, more than the %d that are published", ErrInvalid, n>>20, MaxIndex>>20)
	case n > x.BlobSize+slack:
		return Layer{}, fmt.Errorf("%w: it has %d bytes, for a layer of %d", ErrInvalid, n, x.BlobSize)
	}
	if err := affordable(b.Bytes()); err != nil {
		return Layer{}, err
	}
	return Layer{Digest: x.Blob, Text: b.Bytes()}, nil
}

// Descriptor is that of the index's blob.
func (l Layer) Descriptor() ocispec.Descriptor { return l.entry().descriptor() }

// Name is the file name under which programs that fetch artifacts save it: the layer's digest, with a dash for the colon, and ".index".
func (l Layer) Name() string { return fileName(l.Digest) }

func (l Layer) entry() entry {
	return entry{layer: l.Digest, digest: digest.FromBytes(l.Text), size: int64(len(l.Text))}
}

// Pusher is a repository that indexes are put into; origin.Repository is one.
type Pusher interface {
	Repository
	// Push stores a blob or manifest, and enters a manifest with a subject among the referrers.
	Push(ctx context.Context, desc ocispec.Descriptor, body []byte) error
}

// Store puts the indexes of an image's layers beside the image, as a referrer of subject: the
// image's manifest for one platform. It returns the referrer's digest, and whether it had to be
// pushed: when one that is there says the same already, nothing is. The same indexes in the same
// order give the same digest, whoever publishes them.
func Store(ctx context.Context, repo Pusher, subject ocispec.Descriptor, layers []Layer) (referrer digest.Digest, pushed bool, err error) {
	if len(layers) == 0 || len(layers) > maxEntries {
		return "", false, fmt.Errorf("%d indexes are not those of the layers of %s@%s", len(layers), repo.Name(), subject.Digest)
	}
	var entries []entry
	for _, l := range layers {
		entries = append(entries, l.entry())
	}
	there, _, err := referrers(ctx, repo, subject.Digest, slog.New(slog.DiscardHandler))
	if err != nil {
		return "", false, err
	}
	for _, a := range there {
		if slices.Equal(a.entries, entries) {
			return a.digest, false, nil
		}
	}
	text, err := encodeManifest(subject, entries)
	if err != nil {
		return "", false, err
	}
	for i, l := range layers {
		if err := repo.Push(ctx, entries[i].descriptor(), l.Text); err != nil {
			return "", false, err
		}
	}
	if err := Try(ctx, repo); err != nil {
		return "", false, err
	}
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(text), Size: int64(len(text))}
	return d.Digest, true, repo.Push(ctx, d, text)
}

// Try finds out whether Store may push to a repository, before much was done for it. It leaves two bytes there, the empty
// configuration that Store needs anyhow.
func Try(ctx context.Context, repo Pusher) error {
	empty := ocispec.DescriptorEmptyJSON
	return repo.Push(ctx, ocispec.Descriptor{MediaType: empty.MediaType, Digest: empty.Digest, Size: empty.Size}, empty.Data)
}
