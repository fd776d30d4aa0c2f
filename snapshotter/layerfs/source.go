package layerfs

import (
	"context"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
)

// Source is where layers come from: in the daemon the fetcher, in tests memory. Its methods may
// be called from many goroutines.
type Source interface {
	// Describe looks a layer up in its image's manifest; see lazy.Layers.
	Describe(ctx context.Context, ref string, manifest, layer digest.Digest) (ocispec.Descriptor, error)

	// Blob gives the layer that desc describes. Nothing needs to be there yet. The caller closes it.
	Blob(ctx context.Context, ref string, desc ocispec.Descriptor) (Blob, error)

	// Needed is Blob for what a container waits for: a quota does not refuse it.
	Needed(ctx context.Context, ref string, desc ocispec.Descriptor) (Blob, error)

	// Index finds an index of the layer that somebody published beside the image; nil when nobody
	// did. What it says is the publisher's word until Verify has compared it.
	Index(ctx context.Context, ref string, manifest digest.Digest, desc ocispec.Descriptor) (*index.Index, error)

	// Told asks other nodes what they know of the layer, and hands what each one says to accept, until that
	// returns nil. It is their word, like an index that is published.
	Told(ctx context.Context, ref string, desc ocispec.Descriptor, accept func([]byte) error) error

	// Verify compares a published index with the whole layer. The error matches
	// published.ErrForged when they differ.
	Verify(ctx context.Context, blob io.Reader, x *index.Index) error
}

// Blob is one compressed layer, read while it may still be arriving.
type Blob interface {
	layerstore.Blob

	// Reader reads all of it from its begin. It ends with an error, not io.EOF, when the bytes
	// have not the digest.
	Reader(ctx context.Context) io.ReadCloser

	// Wait fetches all of it and returns when its digest was checked.
	Wait(ctx context.Context) error

	// Close gives the handle back. A fetch that nobody else wants stops.
	Close() error
}

// tableReader reads a table of contents as something that a container waits for.
type tableReader struct{ Blob }

func (t tableReader) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return t.Blob.ReadAt(ctx, p, off, layerstore.Demand)
}
