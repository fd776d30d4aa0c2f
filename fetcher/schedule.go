package fetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

const (
	// tick is how often the scheduler looks at what peers have when nothing
	// wakes it: the delay that a piece that became available may wait.
	tick = 50 * time.Millisecond
	// announceEvery is how often the members are told of the progress of an
	// incomplete blob; claims and completion are told at once.
	announceEvery = time.Second
	// silentAfter is when a participant that says nothing is not counted on:
	// three announcements, two of which may be lost.
	silentAfter = 3 * announceEvery
	// stalledAfter is when a participant whose fetch does not grow, or a swarm
	// that delivers nothing, is not counted on.
	stalledAfter = 3 * time.Second
	// takeover is how much later each next rank takes over a share.
	takeover = 3 * time.Second
	// distrustPeers is how long the registry is asked for everything after the
	// swarm stalled, before it is given another chance.
	distrustPeers = 10 * time.Second
	// window is how many bytes of pieces are asked of the swarm at a time. The
	// library cannot take a request back, so this is what a demand read has to
	// queue behind at worst; 16 MiB covers 50 ms ticks up to 2.5 Gbit/s.
	window = 16 << 20
	// demandWindow is the same while a container waits for reads.
	demandWindow = 1 << 20
	// streamsPerBlob is how many registry streams one blob uses: two hide the
	// round trip between requests.
	streamsPerBlob = 2
	// runAlone and runShared are how many segments one registry request covers
	// at most. Alone, fewer requests. With members about, little is claimed at
	// a time, so that one that starts a moment later finds work left: with
	// runs of 8 the first of three nodes fetched all of a 163 MB image.
	runAlone  = 8
	runShared = 1
	// noPeerGrace is how long a fetch without a usable registry waits for
	// members to turn up with what is missing.
	noPeerGrace = 10 * time.Second
	// noProgress ends a fetch that has peers but gets nothing from anywhere.
	noProgress = 45 * time.Second
	// originBackoff is the first wait after the registry was found away.
	originBackoff = time.Second
	// originPatience bounds how long a registry that is away is asked again
	// while nothing else supplies the blob.
	originPatience = 3
)

// participant is what is known of a member's part in the blob.
type participant struct {
	cluster.Member
	cluster.Announcement
	heard time.Time // when it last said something
	grew  time.Time // when its bytes last grew
}

// counted reports whether a participant can be counted on to get its share.
func (p *participant) counted(now time.Time) bool {
	if now.Sub(p.heard) > silentAfter {
		return false
	}
	return p.Complete() || now.Sub(p.grew) < stalledAfter
}

// schedule drives the fetch until it is over.
func (d *download) schedule(r *run) {
	d.join(r.ctx)
	t := time.NewTicker(tick)
	defer t.Stop()
	var announced time.Time
	for {
		if !d.noPeers && time.Since(announced) > announceEvery {
			announced = time.Now()
			d.announceSoon(r)
		}
		if err := d.step(r); err != nil {
			d.fail(r, err)
			return
		}
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		case <-d.kick:
			// A burst of pieces is one reason to look, not many.
			select {
			case <-r.ctx.Done():
				return
			case <-time.After(tick / 10):
			}
		}
	}
}

// step hands out what can be fetched now. Its error ends the fetch.
func (d *download) step(r *run) error {
	if d.st.Frontier() >= d.pieces {
		return nil // the verifier has the word
	}
	d.mu.Lock()
	if d.run != r || d.state == Verifying {
		d.mu.Unlock()
		return nil
	}
	now := time.Now()
	for d.workers < streamsPerBlob && d.originUsable(now) {
		if len(d.nextRun(now, false)) == 0 {
			break
		}
		d.workers++
		d.wg.Go(func() { d.stream(r) })
		if d.noRange {
			break
		}
	}
	stuck := d.stuck(now)
	d.mu.Unlock()
	d.fillWindow()
	return stuck
}

func (d *download) originUsable(now time.Time) bool {
	if d.origin == nil {
		return false
	}
	return d.originErr == nil || !d.originRetry.IsZero() && now.After(d.originRetry)
}

// stuck says why the fetch cannot go on; nil while it may. Called with d.mu.
func (d *download) stuck(now time.Time) error {
	quiet := now.Sub(time.Unix(0, d.lastPiece.Load()))
	if d.origin != nil && (d.originErr == nil || !d.originRetry.IsZero() && d.originFails < originPatience) {
		return nil // the registry's own deadlines hold
	}
	holders, active := 0, 0
	for _, p := range d.parts {
		if now.Sub(p.heard) < silentAfter && !d.banned[p.ID] {
			if p.Have > 0 {
				holders++
			}
			if p.Active {
				active++
			}
		}
	}
	limit := noProgress
	switch {
	case d.noPeers || len(d.f.Members()) == 0 && len(d.f.o.Peers) == 0:
		limit = 0
	case holders == 0 && active == 0 && d.originErr != nil:
		limit = 2 * announceEvery // every member was asked; the registry's answer stands
	case holders == 0 && active == 0:
		limit = noPeerGrace
	}
	if quiet < limit {
		return nil
	}
	switch {
	case d.originErr != nil:
		return d.originErr
	case d.noPeers || len(d.f.Members()) == 0:
		return fmt.Errorf("%s: %w: the registry may not be asked and %w", d.whatLocked(), ErrNoSource, d.f.silence())
	default:
		return fmt.Errorf("%s: %w: %d of %d bytes are here, %d peers take part and none has sent anything for %s", d.whatLocked(), ErrNoSource, d.st.Have(), d.desc.Size, len(d.parts), quiet.Round(time.Second))
	}
}

// originFailed notes an error of the registry. Called without d.mu.
func (d *download) originFailed(err error) {
	if errors.Is(err, context.Canceled) {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.originErr = fmt.Errorf("%s: %w", d.whatLocked(), err)
	d.originFails++
	d.originRetry = time.Time{}
	if errors.Is(err, origin.ErrUnavailable) || errors.Is(err, origin.ErrRateLimited) {
		wait := originBackoff << min(d.originFails-1, 5)
		d.originRetry = time.Now().Add(wait + rand.N(wait/2))
	}
}

func (d *download) originWorked() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.originErr, d.originRetry, d.originFails = nil, time.Time{}, 0
}

// nextRun returns the next segments, in a row, that this node should ask the
// registry for, and claims them when claim is set. Called with d.mu.
func (d *download) nextRun(now time.Time, claim bool) []int {
	if d.noRange {
		if len(d.claims) > 0 {
			return nil
		}
		all := make([]int, 0, d.segs)
		for s := range d.segs {
			all = append(all, s)
		}
		return d.claimed(all, claim)
	}
	own := d.shareOf(now)
	most := runShared
	if d.noPeers || len(d.f.Members()) == 0 && len(d.f.o.Peers) == 0 {
		most = runAlone
	}
	var run []int
	left := false
	for s := range d.segs {
		switch {
		case d.claims[s] || d.segmentHeld(s):
		case own.mine(s) && d.anyToAsk(s, own.alone):
			run = append(run, s)
		default:
			left = true
		}
		if len(run) == most || len(run) > 0 && run[len(run)-1] != s {
			break
		}
	}
	if len(run) > 0 {
		d.ownDone = time.Time{}
	} else if left && d.ownDone.IsZero() && len(d.claims) == 0 {
		d.ownDone = now
	}
	return d.claimed(run, claim)
}

func (d *download) claimed(run []int, claim bool) []int {
	if claim {
		for _, s := range run {
			d.claims[s] = true
		}
	}
	return run
}

// segmentHeld reports whether every piece of a segment is here.
func (d *download) segmentHeld(s int) bool {
	first, last := d.segmentPieces(s)
	for i := first; i < last; i++ {
		if !d.st.Has(i) {
			return false
		}
	}
	return true
}

// toAsk reports whether the registry should be asked for a piece: it is missing,
// no demand read is at it, and, unless alone, no peer has it. Called with d.mu.
func (d *download) toAsk(i int, alone bool) bool {
	return !d.st.Has(i) && d.flights[i] == nil && (alone || i >= len(d.available) || d.available[i] == 0)
}

func (d *download) anyToAsk(s int, alone bool) bool {
	first, last := d.segmentPieces(s)
	for i := first; i < last; i++ {
		if d.toAsk(i, alone) {
			return true
		}
	}
	return false
}

// segmentPieces returns the pieces [first, last) of a segment. Piece sizes
// divide the segment size.
func (d *download) segmentPieces(s int) (first, last int) {
	per := int(cluster.SegmentSize / d.st.PieceSize())
	return s * per, min((s+1)*per, d.pieces)
}

// share is one look at who gets what from the registry.
type share struct {
	d     *download
	now   time.Time
	alone bool
	nodes []string       // that own segments, this one among them
	parts []*participant // that can be counted on
	idle  time.Duration  // since when this node has nothing of its own left
}

// shareOf computes the current share. Called with d.mu.
func (d *download) shareOf(now time.Time) *share {
	w := &share{d: d, now: now}
	if d.noPeers {
		w.alone = true
		return w
	}
	w.nodes = []string{d.f.cluster.ID()}
	distrust := d.swarmStalled(now)
	for _, p := range d.parts {
		if d.banned[p.ID] || !p.counted(now) || distrust {
			continue
		}
		w.parts = append(w.parts, p)
		if p.Active && p.Origin && !p.Complete() {
			w.nodes = append(w.nodes, p.ID)
		}
	}
	w.alone = len(w.parts) == 0
	if !d.ownDone.IsZero() {
		w.idle = now.Sub(d.ownDone)
	}
	return w
}

// mine reports whether this node should ask the registry for a segment now.
func (w *share) mine(s int) bool {
	if w.alone {
		return true
	}
	claimedBy := false
	for _, p := range w.parts {
		if p.Complete() || p.Held.Has(s) {
			return false // the swarm brings it
		}
		claimedBy = claimedBy || p.Claimed.Has(s)
	}
	rank := cluster.Rank(w.d.desc.Digest, s, w.nodes[0], w.nodes)
	if claimedBy {
		rank = max(rank, 1)
	}
	return time.Duration(rank)*takeover <= w.idle
}

// swarmStalled reports whether pieces are wanted of the swarm and none has come
// for stalledAfter; it then stays so for distrustPeers. Called with d.mu.
func (d *download) swarmStalled(now time.Time) bool {
	if len(d.wanted) == 0 {
		return false
	}
	quiet := now.Sub(time.Unix(0, d.lastPeerPiece.Load()))
	if quiet > stalledAfter+distrustPeers {
		d.lastPeerPiece.Store(now.UnixNano()) // another chance
		return false
	}
	return quiet > stalledAfter
}

// fillWindow keeps the swarm busy with pieces that somebody there has, rarest
// first, and no more than a window of them.
func (d *download) fillWindow() {
	tor := d.torrent()
	if tor == nil {
		return
	}
	limit := int64(window)
	if d.f.hot(0) {
		limit = demandWindow
	}
	most := max(int(limit/d.st.PieceSize()), 4)
	type candidate struct{ piece, holders int }
	var can []candidate
	// What was asked for arrives; nothing new is while a program starts.
	put := d.holdsBack() && d.f.hot(startQuiet)
	// Not under d.mu: the swarm's locks come before ours.
	available := tor.Availability()
	d.mu.Lock()
	d.available = available
	for i := range d.wanted {
		if d.st.Has(i) || i < len(available) && available[i] == 0 {
			delete(d.wanted, i)
			if !d.st.Has(i) {
				tor.Unwant(i)
			}
		}
	}
	if room := most - len(d.wanted); room > 0 && !put {
		per := int(cluster.SegmentSize / d.st.PieceSize())
		for i, n := range available {
			if n == 0 || i >= d.pieces || d.wanted[i] || d.claims[i/per] || d.flights[i] != nil || d.st.Has(i) {
				continue
			}
			can = append(can, candidate{i, int(n)})
		}
		// Rarest first spreads what only the owner has; chance among equals
		// keeps the nodes of a crowd from all asking for the same piece.
		rand.Shuffle(len(can), func(a, b int) { can[a], can[b] = can[b], can[a] })
		slices.SortStableFunc(can, func(a, b candidate) int { return a.holders - b.holders })
		if len(can) > room {
			can = can[:room]
		}
		if len(d.wanted) == 0 && len(can) > 0 {
			// The clock of the swarm's stall starts with the first wish.
			d.lastPeerPiece.Store(time.Now().UnixNano())
		}
		for _, c := range can {
			d.wanted[c.piece] = true
		}
	}
	d.mu.Unlock()
	for _, c := range can {
		tor.Want(c.piece)
	}
}
