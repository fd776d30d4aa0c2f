package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// maxIndexJSON bounds a table of contents that becomes an index, in bytes: it is held in
// memory as a whole, beside the index. A file takes some 400 bytes of it.
const maxIndexJSON = 128 << 20

// ErrPlain is matched by the error of OwnIndex for a layer that has no table of contents.
var ErrPlain = errPlain

// OwnIndex makes the index of a layer from the table of contents that it brings along, once that
// was found to be the one that the image's manifest names. Without one the error matches ErrPlain;
// one that is right and yet cannot be used matches index.ErrNotIndexable. source says which
// format it was.
func OwnIndex(ctx context.Context, blob ranged, desc ocispec.Descriptor, t Target) (x *index.Index, source string, err error) {
	ref, err := tocRefOf(desc, t)
	if err != nil {
		return nil, "", err
	}
	tail, r, err := readTail(ctx, blob, desc.Size, ref)
	if err != nil {
		return nil, "", err
	}
	defer r.Close()
	json, err := io.ReadAll(io.LimitReader(r, maxIndexJSON+1))
	if err != nil {
		return nil, "", fmt.Errorf("the table of contents does not decompress: %w", err)
	}
	if len(json) > maxIndexJSON {
		return nil, "", index.ErrNotIndexable{Err: errors.New("its table of contents is too large")}
	}
	if got := digest.FromBytes(json); ref.json != "" && got != ref.json {
		return nil, "", fmt.Errorf("the table of contents is not the one in the manifest: its digest is %s, not %s", got, ref.json)
	}
	if tail.format == formatZstdChunked {
		x, err = index.FromZstdChunked(json, desc)
	} else {
		x, err = index.FromEStargz(json, desc)
	}
	if err != nil {
		return nil, "", err
	}
	return withoutLandmarks(x), string(tail.format), nil
}

// withoutLandmarks takes out of a new index the files that mark what to prefetch, which are none of the image's.
func withoutLandmarks(x *index.Index) *index.Index {
	landmark := func(e index.Entry) bool {
		return e.Path == estargz.PrefetchLandmark || e.Path == estargz.NoPrefetchLandmark
	}
	for _, e := range x.Entries {
		if e.HardLink >= 0 && landmark(x.Entries[e.HardLink]) {
			return x // somebody's own file after all
		}
	}
	moved := make([]int, len(x.Entries)) // new places
	kept := x.Entries[:0]
	for i, e := range x.Entries {
		moved[i] = len(kept)
		if !landmark(e) {
			kept = append(kept, e)
		}
	}
	for i := range kept {
		if l := kept[i].HardLink; l >= 0 {
			kept[i].HardLink = moved[l]
		}
	}
	x.Entries = kept
	return x
}

// HasTable tells whether the image's manifest vouches for a table of contents of the layer.
func HasTable(desc ocispec.Descriptor, t Target) bool {
	_, err := tocRefOf(desc, t)
	return err == nil
}
