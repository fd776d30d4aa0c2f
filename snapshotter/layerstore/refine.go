package layerstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// maxRefined bounds what Refine stores, by what the layer's own index has: points of the same size are added to it, at
// most for 1/32 of the blob.
func (l *layer) maxRefined() int64 { return l.info.IndexSize + l.info.BlobSize/16 + 1<<20 }

// Refine makes the index that others are told: with the order of what was read first here, and with further points before it,
// so that they fetch little else. Blob has all of the layer's blob. This node goes on with its own index: the data is here.
// Without an order it does nothing.
func (h *Layer) Refine(ctx context.Context, blob Blob) error {
	order, err := h.Order()
	if err != nil || len(order) == 0 {
		return err
	}
	x, err := h.Index()
	if err != nil {
		return err
	}
	first := make([]index.Range, len(order))
	for i, r := range order {
		first[i] = index.Range{Off: r.Off, Len: r.Len}
	}
	y, err := x.Refine(ctx, first, func(off int64) (io.ReadCloser, error) {
		if blob.Size() != h.l.info.BlobSize {
			return nil, fmt.Errorf("the blob has %d bytes, the layer's has %d", blob.Size(), h.l.info.BlobSize)
		}
		return io.NopCloser(&blobPart{ctx: ctx, blob: blob, off: off}), nil
	})
	if err != nil {
		return fmt.Errorf("refine the index of layer %s: %w", h.l.info.Blob, err)
	}
	var text bytes.Buffer
	if err := index.Encode(&text, y); err != nil {
		return err
	}
	if int64(text.Len()) > h.l.maxRefined() {
		return fmt.Errorf("the refined index of layer %s has %d bytes", h.l.info.Blob, text.Len())
	}
	if err := replaceFile(h.l.path(fileRefined), text.Bytes()); err != nil {
		return fmt.Errorf("refine the index of layer %s: %w", h.l.info.Blob, full(err))
	}
	return nil
}

// IndexText is the layer's index as index.Encode wrote it, for others: the refined one when there is one.
func (h *Layer) IndexText() ([]byte, error) {
	h.l.mu.Lock()
	dir := h.l.dir
	h.l.mu.Unlock()
	b, err := readBounded(filepath.Join(dir, fileRefined), h.l.maxRefined())
	if err == nil && index.Sound(b) {
		return b, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.l.s.log.Warn("The refined index of a layer cannot be read; others get the plain one.", "layer", h.l.info.Blob, "error", err)
	}
	return h.l.readIndexText(dir)
}

// blobPart reads a blob forward.
type blobPart struct {
	ctx  context.Context
	blob Blob
	off  int64
}

func (r *blobPart) Read(p []byte) (int, error) {
	n := int(min(int64(len(p)), blockSize, r.blob.Size()-r.off))
	if n <= 0 {
		return 0, io.EOF
	}
	n, err := r.blob.ReadAt(r.ctx, p[:n], r.off, Background)
	r.off += int64(n)
	return n, err
}
