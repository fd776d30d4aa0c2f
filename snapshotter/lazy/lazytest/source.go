package lazytest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/index/published"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
)

var _ layerfs.Source = (*Image)(nil)

// Publish has Index find x for its layer.
func (i *Image) Publish(x *index.Index) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.indexes[x.Blob] = x
}

// Index implements layerfs.Source.
func (i *Image) Index(_ context.Context, _ string, _ digest.Digest, desc ocispec.Descriptor) (*index.Index, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.indexes[desc.Digest], i.down
}

// Tell has Told answer with what a node says of a layer.
func (i *Image) Tell(layer digest.Digest, said []byte) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.told[layer] = said
}

// Told implements layerfs.Source.
func (i *Image) Told(_ context.Context, _ string, desc ocispec.Descriptor, accept func([]byte) error) error {
	i.mu.Lock()
	said := i.told[desc.Digest]
	i.mu.Unlock()
	if said == nil {
		return errors.New("no other node knows the layer")
	}
	return accept(said)
}

// Verify implements layerfs.Source.
func (i *Image) Verify(ctx context.Context, blob io.Reader, x *index.Index) error {
	return published.Verify(ctx, blob, x)
}

// Blob implements layerfs.Source.
func (i *Image) Blob(ctx context.Context, ref string, desc ocispec.Descriptor) (layerfs.Blob, error) {
	h, err := i.Open(ctx, ref, desc)
	if err != nil {
		return nil, err
	}
	return &blob{h.(*handle), desc}, nil
}

// Needed implements layerfs.Source.
func (i *Image) Needed(ctx context.Context, ref string, desc ocispec.Descriptor) (layerfs.Blob, error) {
	return i.Blob(ctx, ref, desc)
}

// blob is a handle as layerfs wants it.
type blob struct {
	*handle
	desc ocispec.Descriptor
}

func (b *blob) Size() int64 { return b.desc.Size }

func (b *blob) ReadAt(ctx context.Context, p []byte, off int64, prio layerstore.Priority) (int, error) {
	if prio < layerstore.Demand {
		if err := b.image.calm(ctx); err != nil {
			return 0, err
		}
	}
	return b.handle.ReadAt(ctx, p, off)
}

// Reader gives all of the layer, to somebody who waits for that.
func (b *blob) Reader(ctx context.Context) io.ReadCloser {
	r, w := io.Pipe()
	b.Fetch()
	go func() {
		_, err := b.handle.ReadAt(ctx, make([]byte, 1), 0)
		if err == nil {
			b.image.mu.Lock()
			s := b.image.layers[b.digest]
			b.image.mu.Unlock()
			if s == nil {
				err = fmt.Errorf("layer %s is gone", b.digest)
			} else {
				_, err = io.Copy(w, bytes.NewReader(s.data))
			}
		}
		w.CloseWithError(err)
	}()
	return r
}

func (b *blob) Wait(ctx context.Context) error {
	b.Fetch()
	if err := b.image.calm(ctx); err != nil {
		return err
	}
	_, err := b.handle.ReadAt(ctx, make([]byte, 1), 0)
	return err
}

// Hold has everything that nobody waits for wait until the function returned is called.
func (i *Image) Hold() (let func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	ch := make(chan struct{})
	i.held = ch
	return func() { i.mu.Lock(); i.held = nil; i.mu.Unlock(); close(ch) }
}

func (i *Image) calm(ctx context.Context) error {
	i.mu.Lock()
	held := i.held
	i.mu.Unlock()
	if held == nil {
		return nil
	}
	select {
	case <-held:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
