package fetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

const (
	// tick is how often the scheduler looks at what peers have when nothing
	// wakes it: the delay that a piece that became available may wait.
	tick = 50 * time.Millisecond
	// pause is how long the scheduler lets news gather before it looks: a look costs
	// a tenth of a millisecond for each hundred connected peers' pieces, and with a
	// window of wishes out nothing waits for it.
	pause = 20 * time.Millisecond
	// announceEvery is how often the keeper is told of the progress of a fetch
	// before it has said how often it wants to be.
	announceEvery = time.Second
	// stalledAfter is when a swarm that delivers nothing is not counted on.
	stalledAfter = 3 * time.Second
	// hungryBelow is the rate in bytes a second under which a swarm that has the
	// pieces counts as slower than the registry would be, looked at over
	// hungryOver.
	hungryBelow = 4 << 20
	hungryOver  = 3 * time.Second
	// keeperSilent is how long a fetch waits for a word of a keeper before it asks
	// the registry without one.
	keeperSilent = 2 * time.Second
	// distrustPeers is how long the registry is asked for everything after the
	// swarm stalled, before it is given another chance.
	distrustPeers = 10 * time.Second
	// window is how many bytes of pieces are asked of peers at a time: what a demand
	// read has to queue behind at worst; 16 MiB covers 50 ms ticks up to 2.5 Gbit/s.
	window = 16 << 20
	// demandWindow is the same while a container waits for reads, or has done so
	// within demandFollows: the next read must not find the link taken by what
	// was asked for in between. It still moves 200 Mbit/s and more.
	demandWindow  = 512 << 10
	demandFollows = time.Second
	// streamsPerBlob is how many registry streams one blob uses: two hide the
	// round trip between requests.
	streamsPerBlob = 2
	// runAlone and runShared are how many segments one registry request covers
	// at most. Alone, fewer requests; else each stream takes its own, also where no
	// other member was met yet: they may be starting the same image at this moment.
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

// schedule drives the fetch until it is over.
func (d *download) schedule(r *run) {
	d.join(r.ctx)
	t := time.NewTicker(tick)
	defer t.Stop()
	for {
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
			case <-time.After(pause):
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
	for d.workers < d.streams() && d.originUsable(now) {
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
	due := d.announcementDue(now)
	source, usable := d.origin, d.originUsable(now)
	d.mu.Unlock()
	if source != nil && !d.noPeers {
		d.waitTogether(source)
	}
	if !usable && !d.noPeers {
		d.takeTurns(now)
	}
	if due {
		d.announceSoon(r)
	}
	d.fillWindow(r)
	d.fillOpen()
	return stuck
}

// streams is how many registry streams the bulk fetch may use now. What was
// asked of the registry comes, whoever waits for something else meanwhile: so it
// is less while there are demand reads.
func (d *download) streams() int {
	if d.f.hot(demandFollows) {
		return 1
	}
	return streamsPerBlob
}

func (d *download) originUsable(now time.Time) bool {
	if d.origin == nil {
		return false
	}
	return d.originErr == nil || !d.originRetry.IsZero() && now.After(d.originRetry)
}

// stuck says why the fetch cannot go on; nil while it may. Called with d.mu.
func (d *download) stuck(now time.Time) error {
	quiet := d.lastPiece.before(now)
	if d.origin != nil && (d.originErr == nil || !d.originRetry.IsZero() && d.originFails < originPatience) {
		return nil // the registry's own deadlines hold
	}
	holders, active := 0, max(d.keeper.nodes-1, 0)
	for _, p := range d.parts {
		if p.Have > 0 && !d.banned[p.ID] {
			holders++
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
	if limit > 0 && quiet < limit {
		return nil
	}
	if most, still := d.openLimit(now); min(still, quiet) < most {
		return nil
	}
	switch {
	case d.wrongMeta > 0 && len(d.opens) == 0 && d.originErr == nil:
		return fmt.Errorf("%s: %w: the torrents that were found are not of it, and the registry may not be asked", d.whatLocked(), ErrMismatch)
	case len(d.opens) > 0 && d.originErr == nil:
		return fmt.Errorf("%s: %w: %d of %d bytes are here, %d torrents were found, and no peer of theirs has sent anything for %s", d.whatLocked(), ErrNoSource, d.st.Have(), d.desc.Size, len(d.opens), quiet.Round(time.Second))
	case d.originErr != nil:
		return d.originErr
	case d.noPeers || len(d.f.Members()) == 0:
		return fmt.Errorf("%s: %w: the registry may not be asked and %w", d.whatLocked(), ErrNoSource, d.f.silence())
	default:
		return fmt.Errorf("%s: %w: %d of %d bytes are here, %d peers take part and none has sent anything for %s", d.whatLocked(), ErrNoSource, d.st.Have(), d.desc.Size, max(d.keeper.nodes-1, len(d.parts)), quiet.Round(time.Second))
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
	if (own.alone || d.keeper.nodes <= 1) && len(d.opens) == 0 {
		// Each stream half of what is lent: the first of a crowd, which is alone
		// for a moment, must not get in one request what two would.
		switch {
		case !own.alone:
			most = min(max(len(d.leases)/streamsPerBlob, runShared), runAlone)
		case d.noPeers:
			most = runAlone
		}
	}
	var run []int
	for s := range d.segs {
		if !d.claims[s] && !d.segmentHeld(s) && own.mine(s) && d.anyToAsk(s, own.anyway(s)) {
			run = append(run, s)
		}
		if len(run) == most || len(run) > 0 && run[len(run)-1] != s {
			break
		}
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
// no demand read is at it, no open swarm was asked for it, and, unless alone, no peer has it. Called with d.mu.
func (d *download) toAsk(i int, alone bool) bool {
	return !d.st.Has(i) && d.flights[i] == nil && !d.wantedOpen(i) && (alone || i >= len(d.available) || d.available[i] == 0)
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

// expect notes whether peers have something that this node lacks and would take from
// them now, asked for or not: a peer that was silent is left alone for a while, and that
// is no reason to think better of the swarm. Called with d.mu.
func (d *download) expect(yes bool, now time.Time) {
	if yes && !d.expects && d.distrust.IsZero() {
		d.lastPeerPiece.set(now) // the clock of a stall starts here
	}
	d.expects = yes
}

// swarmStalled reports whether peers have what is missing and none of it has come for
// stalledAfter; it then stays so for distrustPeers, or until a piece comes. Called with
// d.mu.
func (d *download) swarmStalled(now time.Time) bool {
	quiet := d.lastPeerPiece.before(now)
	switch {
	case quiet <= stalledAfter:
		d.distrust = time.Time{}
		return false
	case now.Before(d.distrust):
		return true
	case !d.distrust.IsZero(): // another chance
		d.distrust = time.Time{}
		d.lastPeerPiece.set(now)
		return false
	case !d.expects:
		return false
	}
	d.distrust = now.Add(distrustPeers)
	return true
}
