package fetcher

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/swarm"
)

// holder answers other members for this node's blobs.
type holder struct{ f *Fetcher }

var (
	_ cluster.Holder  = holder{}
	_ cluster.Indexer = holder{}
)

// Complete implements cluster.Holder. What is complete here is what the node
// seeds to whoever asks, see Fetcher.connects.
func (h holder) Complete() []cluster.Hold {
	if h.f.o.NoSeed {
		return nil
	}
	all, err := h.f.o.Store.List()
	if err != nil {
		h.f.log.Warn("cannot list the store for other nodes", "err", err)
		return nil
	}
	hashes := make(map[metainfo.Hash]cluster.Hold, len(all))
	holds := make([]cluster.Hold, 0, len(all))
	for _, i := range all {
		if !i.Complete || i.Size == 0 {
			continue
		}
		hold := cluster.Hold{Digest: i.Digest, Size: i.Size}
		holds = append(holds, hold)
		hashes[swarm.Infohash(i.Digest, i.Size, store.PieceSize(i.Size))] = hold
	}
	h.f.mu.Lock()
	h.f.hashes = hashes
	h.f.mu.Unlock()
	return holds
}

// holds notes a blob that has just become complete.
func (f *Fetcher) holds(d *download) {
	if f.cluster == nil || f.o.NoSeed || d.desc.Size == 0 {
		return
	}
	hash := swarm.Infohash(d.desc.Digest, d.desc.Size, d.st.PieceSize())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hashes[hash] = cluster.Hold{Digest: d.desc.Digest, Size: d.desc.Size}
}

// connects is asked when a member connects for a blob that is not in the swarm. A
// blob that lies complete in the store is put there by that.
func (f *Fetcher) connects(hash metainfo.Hash) bool {
	f.mu.Lock()
	hold, ok := f.hashes[hash]
	f.mu.Unlock()
	return ok && f.seed(f.ctx, hold.Digest, hold.Size) != nil
}

// seed returns the download of a blob that this node fetches or holds; nil when
// it does neither or gives nothing.
func (f *Fetcher) seed(ctx context.Context, dg digest.Digest, size int64) *download {
	f.mu.Lock()
	d := f.downloads[dg]
	full := len(f.downloads) >= maxIdleSeeds
	closed := f.closed
	f.mu.Unlock()
	if closed {
		return nil
	}
	if d != nil && !d.dead() {
		if d.desc.Size != size {
			return nil
		}
		if !f.o.NoSeed {
			d.enter() // a blob that was opened complete has not been fetched, so not entered
		}
		return d
	}
	if f.o.NoSeed || full {
		return nil
	}
	info, err := f.o.Store.Stat(dg)
	if err != nil || !info.Complete || info.Size != size {
		return nil
	}
	d, err = f.download(ctx, ocispec.Descriptor{Digest: dg, Size: size}, false)
	if err != nil {
		f.log.Warn("cannot seed", "blob", dg, "err", err)
		return nil
	}
	d.enter()
	d.release()
	return d
}

// ReadHeld implements cluster.Holder.
func (h holder) ReadHeld(ctx context.Context, w io.Writer, vouch func([]cluster.Statement), dg digest.Digest, off, size int64, through bool) error {
	d := h.f.serving(ctx, dg)
	if d == nil {
		return cluster.ErrNotHeld
	}
	defer d.release()
	if off < 0 || size <= 0 || off+size > d.desc.Size {
		return cluster.ErrNotHeld
	}
	first, last := d.piecesOf(off, size)
	d.mu.Lock()
	vouched := d.vouched(first, last+1)
	d.mu.Unlock()
	if !vouched {
		return cluster.ErrNotHeld
	}
	if !d.holds(first, last) {
		if !through {
			return cluster.ErrNotHeld
		}
		if err := d.readThrough(ctx, first, last); err != nil {
			return fmt.Errorf("%w: %w", cluster.ErrNotHeld, err)
		}
	}
	if vouch != nil {
		pieces := make([]int, 0, last-first+1)
		for i := first; i <= last; i++ {
			pieces = append(pieces, i)
		}
		vouch(d.table.statements(pieces))
	}
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	for size > 0 {
		p := (*bp)[:min(size, burst)]
		if _, err := d.st.ReadAt(p, off); err != nil {
			return err
		}
		for _, l := range []*rate.Limiter{h.f.up, d.up} {
			if err := pay(ctx, l, len(p)); err != nil {
				return err
			}
		}
		n, err := w.Write(p)
		d.readUp.Add(int64(n))
		d.upRate.add(time.Now(), int64(n))
		h.f.count.uploaded.Add(int64(n))
		if err != nil {
			return err
		}
		off, size = off+int64(n), size-int64(n)
	}
	return nil
}

// Statements implements cluster.Holder.
func (h holder) Statements(ctx context.Context, dg digest.Digest, size int64, pieces []int) []cluster.Statement {
	d := h.f.serving(ctx, dg)
	if d == nil {
		return nil
	}
	defer d.release()
	if d.desc.Size != size {
		return nil
	}
	return d.table.statements(pieces)
}

// serving returns the download of a blob that this node has a part of, with one
// more reference; nil when it has none, or gives nothing.
func (f *Fetcher) serving(ctx context.Context, dg digest.Digest) *download {
	if f.o.NoSeed {
		return nil
	}
	f.mu.Lock()
	d := f.downloads[dg]
	f.mu.Unlock()
	if d == nil {
		info, err := f.o.Store.Stat(dg)
		if err != nil || !info.Complete {
			return nil
		}
		if d = f.seed(ctx, dg, info.Size); d == nil {
			return nil
		}
	}
	if d.noPeers || !d.retain() {
		return nil
	}
	return d
}
