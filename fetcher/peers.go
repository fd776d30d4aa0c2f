package fetcher

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// readyWithin bounds the wait for the first hellos before a fetch begins
	// without peers. A member on the same continent answers in a tenth of it.
	readyWithin = time.Second
	// maxParticipants bounds what is kept of one blob's swarm.
	maxParticipants = 256
	// maxSwarmPeers bounds the members a blob's swarm dials; the swarm's own
	// gossip of pieces does the rest.
	maxSwarmPeers = 32
)

// join enters the blob's swarm and learns who takes part. The order matters: we
// answer for the blob before we announce it (see package cluster).
func (d *download) join(ctx context.Context) {
	if d.noPeers {
		return
	}
	ready, cancel := context.WithTimeout(ctx, readyWithin)
	d.f.cluster.Ready(ready)
	cancel()
	d.enter()
	d.announceNow(ctx)
}

// enter adds the blob to the swarm once.
func (d *download) enter() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.noPeers || d.joined || d.stopped || d.desc.Size == 0 {
		return
	}
	d.joined = true
	tor, err := d.f.swarm.Add(d.desc.Digest, d.desc.Size, d.st.PieceSize(), swarmStore{d})
	if err != nil {
		d.log.Warn("no swarm for this blob", "err", err)
		return
	}
	d.tor = tor
	d.addPeers()
}

// addPeers tells the swarm the participants' addresses. Called with d.mu.
func (d *download) addPeers() {
	if d.tor == nil {
		return
	}
	addrs := make([]netip.AddrPort, 0, len(d.parts))
	for _, p := range d.parts {
		if !d.banned[p.ID] && len(addrs) < maxSwarmPeers {
			addrs = append(addrs, p.Addr)
		}
	}
	d.tor.AddPeers(addrs)
}

// announcement says this node's part. Called with d.mu held.
func (d *download) announcement() cluster.Announcement {
	a := cluster.Announcement{
		Digest: d.desc.Digest, Size: d.desc.Size, Have: d.st.Have(),
		Active:  d.run != nil && d.state != Complete,
		Origin:  d.origin != nil && d.originErr == nil,
		Held:    cluster.NewBitmap(d.segs),
		Claimed: cluster.NewBitmap(d.segs),
	}
	for s := range d.segs {
		if d.segmentHeld(s) {
			a.Held.Set(s)
		} else if d.claims[s] {
			a.Claimed.Set(s)
		}
	}
	return a
}

// announceNow tells all members and takes in their answers.
func (d *download) announceNow(ctx context.Context) {
	if d.noPeers {
		return
	}
	d.mu.Lock()
	a := d.announcement()
	d.mu.Unlock()
	for _, s := range d.f.cluster.Announce(ctx, a) {
		d.heard(s.Member, s.Announcement)
	}
}

// announceSoon does the same in the background, one at a time.
func (d *download) announceSoon(r *run) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.noPeers || d.announce || d.run != r {
		return
	}
	d.announce = true
	d.wg.Go(func() {
		d.announceNow(r.ctx)
		d.mu.Lock()
		d.announce = false
		d.mu.Unlock()
	})
}

// heard takes in what a member said of its part.
func (d *download) heard(m cluster.Member, a cluster.Announcement) {
	if a.Absent || a.Size != d.desc.Size {
		d.mu.Lock()
		delete(d.parts, m.ID)
		d.mu.Unlock()
		return
	}
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.touched = now
	p := d.parts[m.ID]
	isNew := p == nil
	if isNew {
		if len(d.parts) >= maxParticipants {
			return
		}
		p = &participant{grew: now}
		d.parts[m.ID] = p
	}
	if a.Have > p.Have {
		p.grew = now
	}
	moved := p.Addr != m.Addr
	p.Member, p.Announcement, p.heard = m, a, now
	if isNew || moved {
		d.addPeers()
		d.poke()
	}
}

// silence says why no peer answers. It wraps trust.ErrForeign when a configured
// one has another secret.
func (f *Fetcher) silence() error {
	if f.cluster != nil {
		silent := f.cluster.Silent()
		for _, addr := range slices.Sorted(maps.Keys(silent)) {
			if trust.Foreign(silent[addr]) {
				return fmt.Errorf("the peer %s is %w", addr, trust.ErrForeign)
			}
		}
	}
	return fmt.Errorf("no peer answers (%d configured)", len(f.o.Peers))
}

// holder answers other members for this node's blobs.
type holder struct{ f *Fetcher }

var _ cluster.Holder = holder{}

// Announced implements cluster.Holder. A member that asks for a blob that lies
// complete in the store is what makes this node seed it.
func (h holder) Announced(ctx context.Context, from cluster.Member, a cluster.Announcement) cluster.Announcement {
	d := h.f.seed(ctx, a.Digest, a.Size)
	if d == nil || d.noPeers {
		return cluster.Announcement{Digest: a.Digest, Absent: true}
	}
	d.heard(from, a)
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.announcement()
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
	d, err = f.download(ctx, ocispec.Descriptor{Digest: dg, Size: size})
	if err != nil {
		f.log.Warn("cannot seed", "blob", dg, "err", err)
		return nil
	}
	d.enter()
	d.release()
	return d
}

// ReadHeld implements cluster.Holder.
func (h holder) ReadHeld(ctx context.Context, w io.Writer, dg digest.Digest, off, size int64, through bool) error {
	h.f.mu.Lock()
	d := h.f.downloads[dg]
	h.f.mu.Unlock()
	if h.f.o.NoSeed || d == nil || d.noPeers || !d.retain() {
		return cluster.ErrNotHeld
	}
	defer d.release()
	if off < 0 || size <= 0 || off+size > d.desc.Size {
		return cluster.ErrNotHeld
	}
	first, last := d.piecesOf(off, size)
	if !d.holds(first, last) {
		if !through {
			return cluster.ErrNotHeld
		}
		if err := d.readThrough(ctx, first, last); err != nil {
			return fmt.Errorf("%w: %w", cluster.ErrNotHeld, err)
		}
	}
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	for size > 0 {
		p := (*bp)[:min(size, burst)]
		if _, err := d.st.ReadAt(p, off); err != nil {
			return err
		}
		if h.f.up != nil {
			if err := h.f.up.WaitN(ctx, len(p)); err != nil {
				return err
			}
		}
		n, err := w.Write(p)
		d.readUp.Add(int64(n))
		if err != nil {
			return err
		}
		off, size = off+int64(n), size-int64(n)
	}
	return nil
}

// piecesOf returns the first and the last piece of a range that is not empty.
func (d *download) piecesOf(off, n int64) (first, last int) {
	ps := d.st.PieceSize()
	return int(off / ps), int((off + n - 1) / ps)
}

// swarmStore is the blob as the swarm sees it.
type swarmStore struct{ d *download }

func (s swarmStore) ReadAt(p []byte, off int64) (int, error)  { return s.d.st.ReadAt(p, off) }
func (s swarmStore) WriteAt(p []byte, off int64) (int, error) { return s.d.st.WriteAt(p, off) }
func (s swarmStore) Has(i int) bool                           { return s.d.st.Has(i) }

func (s swarmStore) MarkPiece(i int, peer string) error {
	d := s.d
	if d.st.Has(i) {
		return nil
	}
	d.mu.Lock()
	bad := d.banned[peer]
	d.mu.Unlock()
	if bad {
		return fmt.Errorf("piece %d came from %s, which sent wrong bytes before", i, peer)
	}
	if err := d.st.MarkPiece(i, store.Peer); err != nil {
		return err
	}
	_, n := d.st.PieceRange(i)
	d.arrived(i, int(n), store.Peer, peer)
	return nil
}
