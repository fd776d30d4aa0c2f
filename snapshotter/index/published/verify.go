package published

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// ErrForged: an index shows another tree, or other contents, than its layer has.
var ErrForged = errors.New("the index is not that of its layer")

// verifySpacing keeps the index that is made for the comparison from having windows: where decoding
// may begin needs no comparing, because a wrong Point leads to chunks with wrong sums.
const verifySpacing = 1 << 40

// Verify reads a whole layer and compares its tree, its diff ID and the sum of each chunk with those
// of an index that somebody else made. The error is ErrForged when they differ; another one is of
// reading the layer, which must have the index's digest and size. It takes one core for as
// long as the layer takes to unpack without writing, and memory as [index.Build] does.
//
// A layer that cannot be indexed here, although it was elsewhere, counts as forged.
func Verify(ctx context.Context, blob io.Reader, x *index.Index) error {
	o := index.Options{Spacing: verifySpacing, ChunkSize: index.DefaultChunkSize}
	if len(x.Chunks) > 0 && (len(x.Chunks) > 1 || x.Chunks[0].Len > o.ChunkSize) {
		o.ChunkSize = x.Chunks[0].Len
	}
	forged := func(format string, args ...any) error {
		return fmt.Errorf("%w %s: %s", ErrForged, x.Blob, fmt.Sprintf(format, args...))
	}
	if o.ChunkSize%index.Align != 0 {
		return forged("its chunks have a length that none is made with")
	}
	own, err := index.Build(ctx, blob, ocispec.Descriptor{Digest: x.Blob, Size: x.BlobSize}, nil, o)
	var not index.ErrNotIndexable
	switch {
	case errors.As(err, &not):
		return forged("%v", err)
	case err != nil:
		return err
	case own.DiffID != x.DiffID:
		return forged("the diff ID is %s, not %s", own.DiffID, x.DiffID)
	case own.Compression != x.Compression:
		return forged("the layer is %s, not %s", own.Compression, x.Compression)
	case own.DataSize != x.DataSize:
		return forged("its files take %d bytes, not %d", own.DataSize, x.DataSize)
	}
	for i := range min(len(own.Entries), len(x.Entries)) {
		if !same(&own.Entries[i], &x.Entries[i]) {
			return forged("%q differs", own.Entries[i].Path)
		}
	}
	switch {
	case len(own.Entries) != len(x.Entries):
		return forged("the layer has %d entries, not %d", len(own.Entries), len(x.Entries))
	case !slices.Equal(own.Chunks, x.Chunks):
		return forged("the contents of files differ")
	case !slices.Equal(own.Extents, x.Extents):
		return forged("the contents of files are elsewhere")
	}
	return nil
}

// same reports whether two entries are.
func same(a, b *index.Entry) bool {
	return slices.Equal(a.Xattrs, b.Xattrs) &&
		a.Path == b.Path && a.Mode == b.Mode && a.UID == b.UID && a.GID == b.GID && a.Size == b.Size &&
		a.Sec == b.Sec && a.Nsec == b.Nsec && a.Major == b.Major && a.Minor == b.Minor &&
		a.Link == b.Link && a.HardLink == b.HardLink && a.Implicit == b.Implicit && a.Data == b.Data
}
