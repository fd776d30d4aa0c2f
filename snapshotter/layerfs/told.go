package layerfs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/index/published"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// What nodes tell each other of a layer is one line of JSON, and after it the index as it is published; nothing when
// there is none.
const (
	toldVersion = 1
	// maxTold bounds the line: the longest order, and the words around it.
	maxTold = layerstore.MaxOrder + 1<<10
)

// told is the line.
type told struct {
	Version int                `json:"version"`
	Order   []layerstore.Range `json:"order,omitempty"`
}

// errUnknown says that this node can tell nothing of a layer.
var errUnknown = errors.New("no container has read the layer here, and this node has not got all of it or has not checked it")

// Tell says what this node knows of a layer, for others: what its containers read first, which is but a hint, and
// its index when the layer is complete, and the index was made of the layer's own bytes or compared with them.
func (f *FileSystem) Tell(ctx context.Context, d digest.Digest) ([]byte, error) {
	h, err := f.store.Get(d)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	if err := enter(ctx, f.words); err != nil {
		return nil, err
	}
	defer func() { <-f.words }()
	line := told{Version: toldVersion}
	if line.Order, err = h.Order(); err != nil {
		f.log.Debug("what a layer's containers read first is not told", "digest", d, "error", err)
	}
	sure := h.Completed() && !f.claimed(d)
	if !sure && len(line.Order) == 0 {
		return nil, errUnknown
	}
	b, err := json.Marshal(line)
	if err != nil {
		return nil, err
	}
	b = append(b, '\n')
	if !sure || h.DiffID() == "" { // without a diff ID it was made of a table of contents, which the other node has as well
		return b, nil
	}
	text, err := h.IndexText()
	if err != nil {
		return nil, err
	}
	return append(b, text...), nil
}

// toldOf takes apart what another node says of a layer. The index is nil when it says none.
func toldOf(b []byte, t lazy.Target, desc ocispec.Descriptor) (*index.Index, []layerstore.Range, error) {
	end := bytes.IndexByte(b[:min(len(b), maxTold)], '\n')
	if end < 0 {
		return nil, nil, fmt.Errorf("its first line has more than %d bytes, or no end", maxTold)
	}
	line, text := b[:end], b[end+1:]
	var says told
	if err := json.Unmarshal(line, &says); err != nil {
		return nil, nil, fmt.Errorf("its first line: %w", err)
	}
	if says.Version != toldVersion {
		return nil, nil, fmt.Errorf("its version is %d, this node knows %d", says.Version, toldVersion)
	}
	if len(text) == 0 {
		return nil, says.Order, nil
	}
	x, err := published.Decode(text, desc, t.DiffID)
	return x, says.Order, err
}

// word is what other nodes said of a layer.
type word struct {
	index *index.Index // nil: nobody said, or it was not wanted
	order []layerstore.Range
}

// fromOthers asks other nodes for a layer's index, when it is wanted, and for what its containers read first.
func (f *FileSystem) fromOthers(ctx context.Context, t lazy.Target, desc ocispec.Descriptor, wanted bool) (w word) {
	err := f.o.Source.Told(ctx, t.Ref, desc, func(b []byte) error {
		if err := enter(ctx, f.words); err != nil {
			return err
		}
		defer func() { <-f.words }()
		x, order, err := toldOf(b, t, desc)
		switch {
		case err != nil:
			return err
		case len(order) > 0:
			w.order = order // of use, whoever has the index
		}
		if wanted && x == nil {
			return errors.New("there is no index in it")
		}
		if wanted {
			w.index = x
		}
		return nil
	})
	if err != nil {
		f.log.Debug("no other node told all of the layer", "digest", t.Layer, "image", t.Ref, "error", err)
	}
	return w
}
