package published

import (
	"context"
	"errors"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// FromQuay gets the torrent that a Quay up to 3.3 makes of a layer itself. ErrNone says that the registry is none, or has none. Quay
// names its own tracker in it, with a token of short life, and a web seed that is signed for as long: it is to be used, not kept.
//
// It does not say of which layer it is; that it came from the layer's own address is the claim.
func FromQuay(ctx context.Context, repo *origin.Repository, layer ocispec.Descriptor) (*Torrent, error) {
	text, err := repo.QuayTorrent(ctx, layer.Digest, MaxSize)
	switch {
	case errors.Is(err, origin.ErrNotFound):
		return nil, fmt.Errorf("%w: %w", ErrNone, err)
	case err != nil:
		return nil, err
	}
	t, err := Parse(text)
	if err != nil {
		return nil, fmt.Errorf("the torrent that %s made of the layer %s: %w", repo.Name(), layer.Digest, err)
	}
	if t.Layer.Digest == "" {
		t.Layer.Digest = layer.Digest
	}
	if err := t.of(layer.Digest, layer.Size); err != nil {
		return nil, fmt.Errorf("the torrent that %s made of the layer %s: %w", repo.Name(), layer.Digest, err)
	}
	return t, nil
}
