package fetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

// Priority orders reads: who waits for them decides what they may hold back.
type Priority int

// The priorities, lowest first.
const (
	// Background is the fetch of everything that nobody waits for.
	Background Priority = iota
	// Prefetch is what will likely be read soon.
	Prefetch
	// Demand is what somebody waits for now.
	Demand
)

const (
	// maxFlight is the most bytes one demand request covers.
	maxFlight = 2 << 20
	// hedgeAfter is how long a peer may take for a demand read before the registry
	// is asked as well, while little is known of how long peers take: well over the
	// 65 ms that a peer with a busy 200 Mbit/s link needs, well under what a person
	// notices. Once hedgeKnown reads were timed it is hedgeFactor of their 99th
	// percentile, within bounds.
	hedgeAfter  = 150 * time.Millisecond
	hedgeFactor = 2
	hedgeKnown  = 32
	hedgeLeast  = 20 * time.Millisecond
	hedgeMost   = 600 * time.Millisecond
	// hedgeThrough is the same for an owner that has to ask the registry itself:
	// with less, three nodes on 200 Mbit/s links hedged each other's reads and
	// the registry's link was full of bytes that somebody had already.
	hedgeThrough = 3 * hedgeAfter
	// joinWithin is how long the first read of a blob waits to learn which
	// peers have it.
	joinWithin = 200 * time.Millisecond
	// lookSoon and lookLate are how often a blob that is only read here and there
	// asks its keeper who holds it now: a node that has just joined may ask before
	// the keeper has heard of the holders, so soon at first and half as often each
	// time.
	lookSoon = 200 * time.Millisecond
	lookLate = 10 * time.Second
	// sourceGrace is how long a demand read that finds nobody to ask looks for
	// somebody.
	sourceGrace = 2 * time.Second
	// flightTries is how often a demand read is tried before its error is
	// handed to the reader; the registry client retries below that.
	flightTries = 3
)

// flight is the fetch of a row of pieces that somebody waits for.
type flight struct {
	first, last int
	done        chan struct{}
	err         error // set before done is closed
	bulk        bool  // left to the bulk fetch
}

// need makes the pieces first to last held, or says why they cannot be.
func (d *download) need(ctx context.Context, first, last int, prio Priority) error {
	return d.gather(ctx, first, last, prio, true)
}

// readThrough does the same for another node that takes this one for the owner:
// the registry is asked, and no third node, so that two nodes that disagree do
// not ask each other in a circle.
func (d *download) readThrough(ctx context.Context, first, last int) error {
	d.mu.Lock()
	able := d.originUsable(time.Now()) && !d.noRange
	d.mu.Unlock()
	if !able {
		return cluster.ErrNotHeld
	}
	return d.gather(ctx, first, last, Demand, false)
}

// gather starts a flight for every piece that is missing and not under way, and
// waits for them all.
func (d *download) gather(ctx context.Context, first, last int, prio Priority, peers bool) error {
	for try := 0; ; try++ {
		if d.holds(first, last) {
			return nil
		}
		var wait []*flight
		d.mu.Lock()
		if d.stopped {
			d.mu.Unlock()
			return fmt.Errorf("%s: %w", d.what(), ErrClosed)
		}
		if !d.noPeers && !d.joined && d.run == nil {
			d.mu.Unlock()
			jctx, cancel := context.WithTimeout(ctx, joinWithin)
			d.join(jctx)
			cancel()
			d.mu.Lock()
		}
		if !d.noPeers && d.run == nil && time.Since(d.keeper.asked) > d.lookAgain() {
			d.keeper.asked = time.Now()
			d.keeper.looks++
			d.wg.Go(func() { d.announceNow(d.ctx) })
		}
		per := max(int(maxFlight/d.st.PieceSize()), 1)
		for i := first; i <= last; i++ {
			fl := d.flights[i]
			if fl == nil && !d.st.Has(i) {
				end := i
				for end < last && end-i+1 < per && d.flights[end+1] == nil && !d.st.Has(end+1) {
					end++
				}
				fl = &flight{first: i, last: end, done: make(chan struct{})}
				for j := i; j <= end; j++ {
					d.flights[j] = fl
				}
				d.wg.Go(func() { d.fly(fl, prio, peers) })
			}
			if fl != nil && (len(wait) == 0 || wait[len(wait)-1] != fl) {
				wait = append(wait, fl)
			}
		}
		d.mu.Unlock()
		var err error
		for _, fl := range wait {
			select {
			case <-fl.done:
				if fl.err != nil {
					err = fl.err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err != nil && try+1 >= flightTries {
			return err
		}
	}
}

// lookAgain is when the keeper is asked again. Called with d.mu held.
func (d *download) lookAgain() time.Duration {
	if d.keeper.complete > 0 {
		return lookLate
	}
	return min(lookSoon<<min(d.keeper.looks, 10), lookLate)
}

func (d *download) holds(first, last int) bool {
	for i := first; i <= last; i++ {
		if !d.st.Has(i) {
			return false
		}
	}
	return true
}

// fly fetches one flight. It outlives the reader that began it, whose context
// may end while others wait for the same pieces; the sources bound it.
func (d *download) fly(fl *flight, prio Priority, peers bool) {
	if prio == Demand {
		defer d.f.demanded()()
	}
	begun := time.Now()
	fl.err = d.race(d.ctx, fl, peers)
	// A node that has just joined may ask before the blob's keeper has heard of
	// those that hold it.
	for wait := joinWithin / 4; errors.Is(fl.err, ErrNoSource) && peers && !d.noPeers && time.Since(begun)+wait < sourceGrace; wait *= 2 {
		if sleep(d.ctx, wait) != nil {
			break
		}
		d.announceNow(d.ctx)
		fl.err = d.race(d.ctx, fl, peers)
	}
	if prio == Demand {
		d.f.count.demanded(d.st.Source(fl.first), time.Since(begun), fl.err)
	}
	d.log.Debug("demand", "first", fl.first, "last", fl.last, "prio", prio, "took", time.Since(begun), "err", fl.err)
	d.mu.Lock()
	for i := fl.first; i <= fl.last; i++ {
		delete(d.flights, i)
	}
	d.mu.Unlock()
	close(fl.done)
}

// race asks a holder, or else the node that owns the segment, then the registry as well when that one is slow
// or fails. The first to have the bytes wins.
func (d *download) race(ctx context.Context, fl *flight, askPeers bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	d.mu.Lock()
	source := d.origin
	whole := d.noRange
	if d.originErr != nil && d.originRetry.IsZero() || whole {
		source = nil
	}
	var peers []cluster.Member
	through := false
	if askPeers && !d.noPeers {
		if peers = d.holdersOf(fl); len(peers) == 0 && source != nil {
			peers, through = d.ownerOf(fl), true
		}
	}
	bulk, torrents := d.run != nil, len(d.opens) > 0 || d.seeking > 0
	d.mu.Unlock()

	results := make(chan error, 1+len(peers))
	running := 0
	ask := func(f func() error) {
		running++
		go func() { results <- f() }()
	}
	askOrigin := func() {
		s := source
		source = nil
		ask(func() error { return d.demandOrigin(ctx, s, fl) })
	}
	next := func() bool {
		switch {
		case len(peers) > 0:
			m := peers[0]
			peers = peers[1:]
			ask(func() error { return d.demandPeer(ctx, m, fl, through) })
		case source != nil:
			askOrigin()
		default:
			return false
		}
		return true
	}
	if !next() {
		if (whole || torrents) && !bulk {
			d.start() // one stream that brings all is the only way, or a torrent
		} else if !bulk {
			return fmt.Errorf("%s: %w", d.what(), ErrNoSource)
		}
		return d.await(ctx, fl)
	}
	after := d.f.delays.hedge()
	if through {
		after = max(after, hedgeThrough)
	}
	hedge := time.NewTimer(after)
	defer hedge.Stop()
	var last error
	for running > 0 {
		select {
		case err := <-results:
			running--
			if err == nil || d.holds(fl.first, fl.last) {
				return nil
			}
			last = err
			if isLocal(err) {
				return err
			}
			next()
		case <-hedge.C:
			if source != nil || len(peers) > 0 {
				d.f.count.hedges.Add(1)
			}
			if source != nil {
				askOrigin()
			} else {
				next()
			}
		}
	}
	return last
}

// await waits for the bulk fetch to bring a flight's pieces.
func (d *download) await(ctx context.Context, fl *flight) error {
	d.mu.Lock()
	done := d.done
	fl.bulk = true
	d.mu.Unlock()
	d.poke()
	d.wishOpen(fl.first, fl.last)
	for {
		changed := d.st.Changed()
		if d.holds(fl.first, fl.last) {
			return nil
		}
		select {
		case <-changed:
		case <-done:
			d.mu.Lock()
			err := d.err
			d.mu.Unlock()
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// holdersOf returns up to two participants that hold a flight, those of this
// node's zone first and else in random order. Called with d.mu held.
func (d *download) holdersOf(fl *flight) []cluster.Member {
	var ms []cluster.Member
	for _, p := range d.parts {
		if d.banned[p.ID] || !d.doubts[p.ID].IsZero() {
			continue
		}
		all := p.Complete()
		for s, last := d.segmentOf(fl.first), d.segmentOf(fl.last); !all && s <= last && p.Held.Has(s); s++ {
			all = s == last
		}
		if all {
			ms = append(ms, p.Member)
		}
	}
	rand.Shuffle(len(ms), func(a, b int) { ms[a], ms[b] = ms[b], ms[a] })
	zone := d.f.o.Zone
	slices.SortStableFunc(ms, func(a, b cluster.Member) int { return away(a, zone) - away(b, zone) })
	return ms[:min(len(ms), 2)]
}

func away(m cluster.Member, zone string) int {
	if m.Zone == zone {
		return 0
	}
	return 1
}

// ownerOf returns the node that reads through for a flight's segment, when that is
// not this node: nodes that start the same image at once all read the same pieces,
// and the owner takes each from the registry once. Called with d.mu held.
func (d *download) ownerOf(fl *flight) []cluster.Member {
	if d.noPeers || len(d.keeper.owners) == 0 {
		return nil
	}
	ids := make([]string, len(d.keeper.owners))
	for i, m := range d.keeper.owners {
		ids[i] = m.ID
	}
	owner := cluster.Owner(d.desc.Digest, d.segmentOf(fl.first), ids)
	if owner == d.f.cluster.ID() || d.banned[owner] || !d.doubts[owner].IsZero() {
		return nil
	}
	return []cluster.Member{d.keeper.owners[slices.Index(ids, owner)]}
}

func (d *download) flightRange(fl *flight) (off, n int64) {
	off, _ = d.st.PieceRange(fl.first)
	lastOff, lastLen := d.st.PieceRange(fl.last)
	return off, lastOff + lastLen - off
}

func (d *download) demandPeer(ctx context.Context, m cluster.Member, fl *flight, through bool) error {
	begun := time.Now()
	switch err := d.bring(ctx, m, fl, cluster.ReadOptions{Through: through}); {
	case err == nil:
		if !through {
			d.f.delays.add(time.Since(begun))
		}
		return nil
	case ctx.Err() != nil, through && errors.Is(err, cluster.ErrNotHeld), errors.Is(err, errPutOff), isLocal(err):
		return err
	default:
		d.mu.Lock()
		delete(d.parts, m.ID) // until the keeper names it again
		d.mu.Unlock()
		return err
	}
}

func (d *download) demandOrigin(ctx context.Context, source Origin, fl *flight) error {
	off, n := d.flightRange(fl)
	s, err := source.Open(ctx, d.desc, off, n)
	if err != nil {
		return fmt.Errorf("%s: %w", d.what(), err)
	}
	defer s.Close()
	if s.Whole() {
		d.mu.Lock()
		d.noRange = true
		d.mu.Unlock()
		_ = s.Close()
		d.start()
		return d.await(ctx, fl)
	}
	return d.take(ctx, s, fl.first, fl.last+1, nil)
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
