package api

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// What the node knows of a layer is told to who has the image open, and nobody else.
func TestIndex(t *testing.T) {
	w := newWorld(t)
	s := w.open()
	layer, other := s.Image.Layers[0], ocispec.Descriptor{Digest: digest.FromString("another's")}
	nothing := func(what string, d ocispec.Descriptor) {
		t.Helper()
		if b, err := s.Index(t.Context(), d); !errors.Is(err, origin.ErrNotFound) {
			t.Errorf("%s: %q, %v", what, b, err)
		}
	}
	nothing("before anything is known", layer)
	know := func(text []byte) {
		w.fetcher.OfferIndexes(func(_ context.Context, d digest.Digest) ([]byte, error) {
			if d == s.Image.Layers[1].Digest {
				return nil, errors.New("not of this one")
			}
			return text, nil
		})
	}
	know([]byte("what is in it"))
	if b, err := s.Index(t.Context(), layer); err != nil || string(b) != "what is in it" {
		t.Errorf("%q, %v", b, err)
	}
	nothing("of a layer that the node does not know", s.Image.Layers[1])
	nothing("of another's layer", other)
	know(bytes.Repeat([]byte{1}, cluster.MaxIndex+1))
	if b, err := s.Index(t.Context(), layer); err == nil {
		t.Errorf("%d bytes were taken", len(b))
	}
}
