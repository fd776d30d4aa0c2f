package lazy

import (
	"context"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Layers is where layers come from: in the daemon the fetcher, in tests memory.
// Its methods may be called from many goroutines.
type Layers interface {
	// Describe looks a layer up in its image's manifest, and returns its descriptor
	// as written there: media type, size and annotations. ref is the name the image was
	// pulled by, as containerd gave it ("docker.io/library/debian:12"). manifest is
	// empty when containerd did not say (before 1.7): then the manifest ref names is meant.
	Describe(ctx context.Context, ref string, manifest, layer digest.Digest) (ocispec.Descriptor, error)

	// Open gives random access to the layer that desc describes. Nothing needs to
	// be there yet. The caller closes it.
	Open(ctx context.Context, ref string, desc ocispec.Descriptor) (Layer, error)
}

// Layer is one compressed layer blob, read while it may still be arriving. Its
// methods may be called from many goroutines.
type Layer interface {
	// ReadAt fills p with the compressed bytes at off, fetching what is not there
	// yet before anything else, as somebody waits for it. It returns len(p) or an error.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)

	// Fetch starts to fetch the whole layer in the background and returns at once.
	// What it fetches stays when the layer is closed.
	Fetch()

	// Close gives the handle back. Reads in flight fail.
	Close() error
}
