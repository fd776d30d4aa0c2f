package layerfs

import (
	"context"
	"errors"
	"fmt"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// orderWithin is how long a layer whose index is here waits to hear from other nodes what is read of it first: they
// are near, the registry that was asked at the same time is not.
const orderWithin = 100 * time.Millisecond

// Where an index is from, for the log.
const (
	ownTable    = "its own table of contents"
	fromMember  = "index of another node"
	isPublished = "published index"
)

// get gets a layer into the store.
func (f *FileSystem) get(ctx context.Context, t lazy.Target) (served, why string, err error) {
	if h, err := f.store.Get(t.Layer); err == nil {
		served := "lazy"
		if h.Completed() {
			served = "eager"
		}
		return served, "it is here", h.Close()
	}
	desc, why, err := f.find(ctx, t)
	if err != nil || why != "" {
		return "lazy", why, err
	}
	return "eager", "nobody has an index of it", f.unpackAll(ctx, t, desc)
}

// find makes a layer of an index that somebody has; why is empty when there is none.
func (f *FileSystem) find(ctx context.Context, t lazy.Target) (desc ocispec.Descriptor, why string, err error) {
	if err := enter(ctx, f.look); err != nil {
		return desc, "", err
	}
	defer func() { <-f.look }()
	desc, err = f.o.Source.Describe(ctx, t.Ref, t.Manifest, t.Layer)
	if err != nil {
		return desc, "", fmt.Errorf("the image's manifest could not be looked up: %w", err)
	}
	if desc.Digest != t.Layer {
		return desc, "", fmt.Errorf("the image's manifest has no layer %s", t.Layer)
	}
	x, order, why, err := f.indexOf(ctx, t, desc)
	if err != nil || x == nil {
		return desc, "", err
	}
	if why != ownTable {
		if err := f.claim(t.Layer, ""); err != nil {
			return desc, "", fmt.Errorf("that an index has to be checked cannot be noted: %w", err)
		}
	}
	h, err := f.store.Create(ctx, x)
	switch {
	case err == nil:
		if len(order) > 0 && len(x.First) == 0 {
			if err := h.SetOrder(order); err != nil {
				f.log.Debug("another node's word of what is read first is not used", "digest", t.Layer, "error", err)
			}
		}
		return desc, why, h.Close()
	case ctx.Err() != nil, errors.Is(err, layerstore.ErrNoSpace):
		return desc, "", err
	}
	f.log.Warn("the layer's index is not used", "digest", t.Layer, "image", t.Ref, "source", why, "error", err)
	f.unclaim(t.Layer)
	return desc, "", nil
}

// indexOf asks all who may have an index of a layer at once, for a container waits. It is nil when there is none.
func (f *FileSystem) indexOf(ctx context.Context, t lazy.Target, desc ocispec.Descriptor) (x *index.Index, order []layerstore.Range, why string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	forged := f.forged(t.Layer) != nil // then only the layer itself is believed
	told := make(chan word, 1)
	go func() { told <- f.fromOthers(ctx, t, desc, !forged && !f.o.NoMembers) }()
	if lazy.HasTable(desc, t) {
		if x, err = f.ownIndex(ctx, t, desc); err != nil {
			return nil, nil, "", err
		}
		if x != nil {
			why = ownTable
		}
	}
	var published chan *index.Index
	if x == nil && !forged && !f.o.NoPublished {
		published = make(chan *index.Index, 1)
		go func() { published <- f.published(ctx, t, desc) }()
	}
	var soon <-chan time.Time
	for told != nil || published != nil {
		if x != nil && soon == nil {
			timer := time.NewTimer(orderWithin)
			defer timer.Stop()
			soon = timer.C
		}
		select {
		case w := <-told:
			if told, order = nil, w.order; w.index != nil && why != ownTable {
				return w.index, order, fromMember, nil // somebody has compared it with the layer
			}
		case y := <-published:
			if published = nil; y != nil {
				x, why = y, isPublished
			}
		case <-soon:
			return x, order, why, nil
		case <-ctx.Done():
			return nil, nil, "", context.Cause(ctx)
		}
	}
	return x, order, why, nil
}

// published is the index that somebody published, nil when there is none.
func (f *FileSystem) published(ctx context.Context, t lazy.Target, desc ocispec.Descriptor) *index.Index {
	x, err := f.o.Source.Index(ctx, t.Ref, t.Manifest, desc)
	if err != nil {
		// All of the layer is fetched anyhow, if the registry is there at all.
		f.log.Debug("whether an index of a layer is published could not be found out", "digest", t.Layer, "image", t.Ref, "error", err)
		return nil
	}
	return x
}

// ownIndex makes an index of the layer's own table of contents; nil when that cannot be used.
func (f *FileSystem) ownIndex(ctx context.Context, t lazy.Target, desc ocispec.Descriptor) (*index.Index, error) {
	blob, err := f.o.Source.Blob(ctx, t.Ref, desc)
	if err != nil {
		return nil, fmt.Errorf("the layer could not be opened: %w", err)
	}
	defer blob.Close()
	x, _, err := lazy.OwnIndex(ctx, tableReader{blob}, desc, t)
	if err == nil {
		return x, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	// A table that is not what the manifest says, or cannot be used: the layer itself can still be.
	f.log.Warn("the layer's table of contents is not used", "digest", t.Layer, "image", t.Ref, "error", err)
	return nil, nil
}

// unpackAll fetches a layer and unpacks it into the store.
func (f *FileSystem) unpackAll(ctx context.Context, t lazy.Target, desc ocispec.Descriptor) error {
	if err := enter(ctx, f.unpack); err != nil {
		return err
	}
	defer func() { <-f.unpack }()
	blob, err := f.o.Source.Blob(ctx, t.Ref, desc)
	if err != nil {
		return fmt.Errorf("the layer could not be opened: %w", err)
	}
	defer blob.Close()
	r := blob.Reader(ctx)
	defer r.Close()
	var h *layerstore.Layer
	if h, err = f.store.Unpack(ctx, desc, r); err != nil {
		return err
	}
	// Only what was synced is mounted past the daemon.
	return errors.Join(h.Complete(ctx), h.Close())
}
