package fetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

const (
	// indexAsks is how many members are asked what is in a blob, one after another.
	indexAsks = 3
	// indexWithin bounds all of that: a layer that nobody knows the content of can be
	// fetched and unpacked meanwhile.
	indexWithin = 10 * time.Second
	// indexJoin bounds the part of it that goes by before it is known whom to ask: where
	// the members that should know are dead, the layer must not wait for them.
	indexJoin = 2 * time.Second
)

// ErrNoIndex says that no member knows what is in a blob.
var ErrNoIndex = errors.New("no member knows what is in the blob")

// IndexFunc returns what this node knows of the content of a blob, at most
// cluster.MaxIndex bytes in a form that the fetcher does not look into; an error when
// it knows nothing that it has checked itself.
type IndexFunc func(ctx context.Context, d digest.Digest) ([]byte, error)

// OfferIndexes has members that ask for it told what is in blobs; nil ends that.
func (f *Fetcher) OfferIndexes(get IndexFunc) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.index = get
}

// Known is what this node itself knows of the content of a blob, as OfferIndexes has it; ErrNoIndex when that is nothing.
func (f *Fetcher) Known(ctx context.Context, d digest.Digest) ([]byte, error) {
	f.mu.Lock()
	get := f.index
	f.mu.Unlock()
	if get == nil {
		return nil, ErrNoIndex
	}
	b, err := get(ctx, d)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoIndex, err)
	}
	return b, nil
}

// Index asks members that hold the blob what is in it, and hands what they say to
// accept, until accept returns nil. They may lie: accept must bound what it does, and
// what it takes is a claim until the blob's own bytes were looked at. ErrNoIndex when
// nobody says anything, else the last error of accept.
func (b *Blob) Index(ctx context.Context, accept func([]byte) error) error {
	d := b.d
	if d.noPeers {
		return ErrNoIndex
	}
	ctx, cancel := context.WithTimeout(ctx, indexWithin)
	defer cancel()
	d.mu.Lock()
	joined := d.joined
	d.mu.Unlock()
	if !joined {
		jctx, cancel := context.WithTimeout(ctx, indexJoin)
		d.join(jctx)
		cancel()
	}
	refused := ErrNoIndex
	for _, m := range d.whole() {
		x, err := d.f.cluster.Index(ctx, m, d.desc.Digest)
		if err != nil {
			if ctx.Err() != nil {
				return errors.Join(refused, ctx.Err())
			}
			d.log.Debug("no index from a peer", "peer", m.ID, "err", err)
			continue
		}
		if err = accept(x); err == nil {
			return nil
		}
		d.log.Warn("what a peer says is in the blob is not used", "peer", m.ID, "err", err)
		refused = err
	}
	return refused
}

// whole returns up to indexAsks members that have all of the blob, those of this
// node's zone first and else in random order.
func (d *download) whole() []cluster.Member {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ms []cluster.Member
	for _, p := range d.parts {
		if p.Complete() && !d.banned[p.ID] && d.doubts[p.ID].IsZero() {
			ms = append(ms, p.Member)
		}
	}
	rand.Shuffle(len(ms), func(a, b int) { ms[a], ms[b] = ms[b], ms[a] })
	slices.SortStableFunc(ms, func(a, b cluster.Member) int { return away(a, d.f.o.Zone) - away(b, d.f.o.Zone) })
	return ms[:min(len(ms), indexAsks)]
}

// Index implements cluster.Indexer.
func (h holder) Index(ctx context.Context, d digest.Digest) ([]byte, error) {
	h.f.mu.Lock()
	get := h.f.index
	h.f.mu.Unlock()
	if get == nil || h.f.o.NoSeed {
		return nil, cluster.ErrNotHeld
	}
	return get(ctx, d)
}

// Pay implements cluster.Indexer.
func (h holder) Pay(ctx context.Context, n int) error { return pay(ctx, h.f.up, n) }
