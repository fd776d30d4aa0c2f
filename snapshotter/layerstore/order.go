package layerstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

const (
	// recordFor is how long after a layer's first read its reads are recorded: the
	// slowest of the images that were measured answers within it when it is cold.
	recordFor = 30 * time.Second
	// recordMost bounds the ranges of a recorded order, and so what a stranger's order
	// can ask for.
	recordMost = index.MaxFirst
	// MaxOrder bounds an order of recordMost ranges in JSON, in bytes.
	MaxOrder = recordMost * 100
)

// Range is a part of a layer's data file, and when it was first read, counted from the
// layer's first read.
type Range struct {
	Off int64         `json:"off"`
	Len int64         `json:"len"`
	At  time.Duration `json:"at"` // ns
}

// recorder notes which chunks a layer's first readers read, in order.
type recorder struct {
	on atomic.Bool

	mu    sync.Mutex // guards following
	begun time.Time  // of the first read, zero before it
	seen  bitset
	order []Range
}

// begin starts recording, unless an order is known already.
func (r *recorder) begin(l *layer) {
	_, err := readBounded(l.path(fileOrder), MaxOrder)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.order, r.begun = nil, time.Time{}
	on := errors.Is(err, fs.ErrNotExist) && l.chunks.len() > 0
	if on {
		r.seen = newBitset(l.chunks.len())
	}
	r.on.Store(on)
}

func (r *recorder) note(l *layer, first, last int) {
	if r.seen.all(first, last) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.on.Load() {
		return
	}
	now := time.Now()
	if r.begun.IsZero() {
		r.begun = now
	}
	if now.Sub(r.begun) > recordFor {
		return // idle ends it
	}
	for c := first; c <= last; c++ {
		if !r.seen.set(c) {
			continue
		}
		off, n := l.chunks.start(c), l.chunks.size(c)
		if k := len(r.order) - 1; k >= 0 && r.order[k].Off+r.order[k].Len == off {
			r.order[k].Len += n
		} else if len(r.order) < recordMost {
			r.order = append(r.order, Range{Off: off, Len: n, At: now.Sub(r.begun)})
		}
	}
}

// over tells that there is nothing more to record.
func (r *recorder) over() bool {
	if !r.on.Load() {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.order) >= recordMost || !r.begun.IsZero() && time.Since(r.begun) > recordFor
}

// end stops recording and stores what was recorded.
func (r *recorder) end(l *layer) error {
	if !r.on.Load() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.on.Swap(false) || len(r.order) == 0 {
		return nil
	}
	order := r.order
	r.order = nil
	return l.storeOrder(order)
}

func (l *layer) storeOrder(order []Range) error {
	b, err := json.Marshal(order)
	if err != nil {
		return err
	}
	return replaceFile(l.path(fileOrder), b)
}

// firstOf is the order that an index brings along.
func firstOf(x *index.Index) []Range {
	var order []Range
	for _, r := range x.First {
		order = append(order, Range{Off: r.Off, Len: r.Len})
	}
	return order
}

// Order is what the first readers of the layer read, in order and without repeats: as
// far as it was recorded while that is still going on. It is empty when nobody has
// read the layer.
func (h *Layer) Order() ([]Range, error) {
	l := h.l
	l.rec.mu.Lock()
	if l.rec.on.Load() {
		defer l.rec.mu.Unlock()
		return slices.Clone(l.rec.order), nil
	}
	l.rec.mu.Unlock()
	b, err := readBounded(l.path(fileOrder), MaxOrder)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the read order of layer %s: %w", l.info.Blob, err)
	}
	var order []Range
	if err := json.Unmarshal(b, &order); err != nil {
		return nil, fmt.Errorf("the read order of layer %s: %w", l.info.Blob, err)
	}
	return order, l.checkOrder(order)
}

// SetOrder stores an order that was recorded elsewhere, and ends the recording of one
// here.
func (h *Layer) SetOrder(order []Range) error {
	if err := h.l.checkOrder(order); err != nil {
		return err
	}
	r := &h.l.rec
	r.mu.Lock()
	defer r.mu.Unlock()
	r.on.Store(false)
	r.order = nil
	return h.l.storeOrder(order)
}

func (l *layer) checkOrder(order []Range) error {
	if len(order) > recordMost {
		return fmt.Errorf("a read order of %d ranges is longer than %d", len(order), recordMost)
	}
	for _, r := range order {
		if r.Off < 0 || r.Len <= 0 || r.Len > l.info.DataSize-r.Off {
			return fmt.Errorf("the read order has %d bytes from %d, layer %s has %d in all", r.Len, r.Off, l.info.Blob, l.info.DataSize)
		}
	}
	return nil
}
