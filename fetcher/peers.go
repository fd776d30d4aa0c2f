package fetcher

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
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
	maxSwarmPeers = 64
	// maxDoubts bounds the nodes that are doubted at a time: as many as one
	// announcement names.
	maxDoubts = 8
)

// join enters the blob's swarm and learns who takes part. The order matters:
// this node answers for the blob before its keeper names it to others.
func (d *download) join(ctx context.Context) {
	if d.noPeers {
		return
	}
	ready, cancel := context.WithTimeout(ctx, readyWithin)
	d.f.gossip.Ready(ready)
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
	has := func(i int) bool { return !d.f.o.NoSeed && d.st.Has(i) && d.vouched(i, i+1) }
	tor, err := d.f.swarm.Add(d.desc.Digest, d.desc.Size, d.st.PieceSize(), has)
	if err != nil {
		d.log.Warn("no swarm for this blob", "err", err)
		return
	}
	d.tor = tor
	d.addPeers()
}

// tell says in the swarm that this node has a piece, unless it gives none.
func (d *download) tell(i int) {
	if tor := d.torrent(); tor != nil && !d.f.o.NoSeed {
		tor.Have(i)
	}
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
func (d *download) announcement(now time.Time) cluster.Announcement {
	a := cluster.Announcement{
		Digest: d.desc.Digest, Size: d.desc.Size, Have: d.st.Have(),
		Active:   d.run != nil && d.state != Complete,
		Registry: d.origin != nil && d.originErr == nil,
		Leech:    d.f.o.NoSeed,
	}
	if a.Complete() && d.state == Complete {
		return a
	}
	a.Have = min(a.Have, max(d.desc.Size-1, 0)) // complete is what was checked
	a.Want = d.wants(now)
	a.Hungry = a.Want > 0 && d.hungry(now)
	a.Held, a.Claimed = cluster.NewBitmap(d.segs), cluster.NewBitmap(d.segs)
	for s := range d.segs {
		_, lent := d.leases[s]
		if d.segmentHeld(s) && d.vouched(d.segmentPieces(s)) {
			a.Held.Set(s)
		} else if d.claims[s] || lent {
			a.Claimed.Set(s)
		}
	}
	for id := range d.banned { // proven: the keeper need not wait for a stall to hear of it
		if len(a.Doubt) < maxDoubts {
			a.Doubt = append(a.Doubt, id)
		}
	}
	for id, since := range d.doubts {
		if now.Sub(since) > distrustPeers {
			delete(d.doubts, id)
		} else if len(a.Doubt) < maxDoubts && !d.banned[id] {
			a.Doubt = append(a.Doubt, id)
		}
	}
	return a
}

// announceNow tells the keeper and takes in its answer.
func (d *download) announceNow(ctx context.Context) {
	if d.noPeers {
		return
	}
	now := time.Now()
	d.mu.Lock()
	if d.swarmStalled(now) {
		d.doubt(now)
	}
	a := d.announcement(now)
	if a.Want > 0 {
		d.f.count.asked.Add(1)
	}
	d.keeper.asked = now
	d.mu.Unlock()
	ans, err := d.f.cluster.Announce(ctx, a)
	if err != nil {
		if ctx.Err() == nil {
			d.log.Debug("no keeper answers", "err", err)
		}
		return
	}
	d.heard(ans, a.Want > 0)
}

// doubt notes the peers that hold what is wanted, and do not send it. Called with
// d.mu held.
func (d *download) doubt(now time.Time) {
	for id, p := range d.parts {
		if p.Complete() && len(d.doubts) < maxDoubts {
			d.doubts[id] = now
		}
	}
	for i := range d.wanted {
		for id, p := range d.parts {
			if p.Held.Has(d.segmentOf(i)) && len(d.doubts) < maxDoubts {
				d.doubts[id] = now
			}
		}
	}
}

// announceSoon does the same in the background, one at a time.
func (d *download) announceSoon(r *run) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.noPeers || d.run != r {
		return
	}
	if d.announce {
		d.again = true
		return
	}
	d.announce = true
	d.keeper.asked = time.Now()
	d.wg.Go(func() {
		for {
			d.announceNow(r.ctx)
			d.mu.Lock()
			if !d.again || r.ctx.Err() != nil {
				d.announce, d.again = false, false
				d.mu.Unlock()
				return
			}
			d.again = false
			d.mu.Unlock()
		}
	})
}

// heard takes in what the keeper said; wanted tells that segments were asked for.
func (d *download) heard(ans cluster.Reply, wanted bool) {
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.touched = now
	k := &d.keeper
	k.answered, k.next, k.owners = now, ans.Next, ans.Owners
	k.nodes, k.complete, k.lent = ans.Nodes, ans.Complete, ans.Lent
	k.refused = wanted && len(ans.Granted) == 0
	fresh := false
	named := make(map[string]bool, len(ans.Peers))
	for _, s := range ans.Peers {
		if s.ID == d.f.cluster.ID() {
			continue
		}
		named[s.ID] = true
		p := d.parts[s.ID]
		if p == nil {
			if len(d.parts) >= maxParticipants {
				continue
			}
			p = &participant{}
			d.parts[s.ID] = p
		}
		fresh = fresh || p.Addr != s.Addr
		p.Said = s
	}
	for id := range d.parts {
		if !named[id] {
			delete(d.parts, id)
		}
	}
	d.f.count.lent.Add(int64(len(ans.Granted)))
	for _, s := range ans.Granted {
		if !d.segmentHeld(s) && d.run != nil {
			d.leases[s] = lease{ans.Anyway}
		}
	}
	if fresh {
		d.addPeers()
	}
	d.poke()
}

// participant is what is known of a member's part in the blob.
type participant struct{ cluster.Said }

func (d *download) segmentOf(piece int) int {
	return int(int64(piece) * d.st.PieceSize() / cluster.SegmentSize)
}

// silence says why no peer answers. It wraps trust.ErrForeign when a configured
// one has another secret.
func (f *Fetcher) silence() error {
	if f.gossip != nil {
		silent := f.gossip.Silent()
		for _, addr := range slices.Sorted(maps.Keys(silent)) {
			if trust.Foreign(silent[addr]) {
				return fmt.Errorf("the peer %s is %w", addr, trust.ErrForeign)
			}
		}
	}
	return fmt.Errorf("no peer answers (%d configured)", len(f.o.Peers))
}

// piecesOf returns the first and the last piece of a range that is not empty.
func (d *download) piecesOf(off, n int64) (first, last int) {
	ps := d.st.PieceSize()
	return int(off / ps), int((off + n - 1) / ps)
}
