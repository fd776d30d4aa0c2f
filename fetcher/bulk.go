package fetcher

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/swarm"
)

const (
	// rowBytes bounds what one bulk read takes from a peer: enough that the round trip
	// and the request cost little, and little enough that a peer's uplink is shared out
	// anew ten times a second.
	rowBytes = 1 << 20
	// readsPerPeer is how many bulk reads a peer is asked for at a time: while one
	// begins the other one keeps the link busy.
	readsPerPeer = 2
	// rowsPerNode bounds those of all blobs together, and with them the memory that they
	// take: half a second of a link of 500 Mbit/s.
	rowsPerNode = 32
	// silentPeer is how long a peer may send nothing of a bulk read before others are
	// asked. It is then left alone for shunPeer, twice as long as the time before, up to
	// shunMost.
	silentPeer = 3 * time.Second
	shunPeer   = time.Second
	shunMost   = 64 * time.Second
	// rowTakes bounds a bulk read from a peer that sends drop by drop. What came of it
	// by then is kept.
	rowTakes = 5 * time.Minute
	// twiceAfter is how long a piece may be on its way before, with nothing else left to
	// ask for, another peer is asked for it as well.
	twiceAfter = time.Second
)

// helper is a connected peer that bulk reads are asked of.
type helper struct {
	reads int       // under way
	fails int       // in a row
	until time.Time // not asked before
}

// row is a bulk read: the pieces first to last from one peer.
type row struct {
	from cluster.Member
	flight
}

// wish is a piece on its way from peers.
type wish struct {
	since time.Time
	reads int // that bring it
}

// fillWindow keeps peers busy with pieces that they have, rarest first, and no more
// than a window of them. The swarm tells who has which; the bytes come by ranged
// reads, since a BitTorrent client's pipeline of requests runs dry whenever peers get
// new pieces: of four nodes on 200 Mbit/s links some stood at half speed for seconds.
func (d *download) fillWindow(r *run) {
	tor := d.torrent()
	if tor == nil {
		return
	}
	peers := tor.Peers() // not under d.mu: the swarm's locks come before ours
	now := time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.run != r {
		return
	}
	d.available = make([]uint16, d.pieces)
	for _, p := range peers {
		for i, has := range p.Pieces {
			if has && !d.banned[p.Node] {
				d.available[i]++
			}
		}
	}
	limit := int64(window)
	if d.f.hot(demandFollows) {
		limit = demandWindow
	}
	room := max(int(limit/d.st.PieceSize()), 1) - len(d.wanted)
	if room > 0 {
		d.askFor(r, d.able(peers, now), room, now)
	}
}

// source is a peer that can be asked now.
type source struct {
	cluster.Member
	pieces []bool
	*helper
}

// able returns the peers that can be asked for one more read, and forgets those that
// are gone. Called with d.mu held.
func (d *download) able(peers []swarm.Peer, now time.Time) []source {
	var all []source
	connected := make(map[string]bool, len(peers))
	for _, p := range peers {
		connected[p.Node] = true
		h := d.helpers[p.Node]
		if h == nil {
			h = &helper{}
			d.helpers[p.Node] = h
		}
		if h.reads >= readsPerPeer || now.Before(h.until) || d.banned[p.Node] {
			continue
		}
		if m, ok := d.memberOf(p.Node); ok {
			all = append(all, source{m, p.Pieces, h})
		}
	}
	for id, h := range d.helpers {
		if !connected[id] && h.reads == 0 && now.After(h.until) {
			delete(d.helpers, id)
		}
	}
	return all
}

// memberOf finds where a node can be reached. Called with d.mu held.
func (d *download) memberOf(node string) (cluster.Member, bool) {
	if p := d.parts[node]; p != nil {
		return p.Member, true
	}
	return d.f.cluster.Member(node)
}

// askFor starts bulk reads for up to room pieces from peers that can be asked. Called with d.mu held.
func (d *download) askFor(r *run, able []source, room int, now time.Time) {
	// What was asked for arrives; nothing new is while a program starts, but for what
	// it waits for itself.
	put := d.holdsBack() && d.f.hot(startQuiet)
	reads := 0 // of each piece that is still to be asked for
	free := func(i int) bool {
		fl := d.flights[i]
		if put && fl == nil {
			return false
		}
		return d.wanted[i].reads == reads && now.Sub(d.wanted[i].since) > time.Duration(reads)*twiceAfter && d.available[i] > 0 &&
			(fl == nil || fl.bulk) && !d.claims[d.segmentOf(i)] && !d.wantedOpen(i) && !d.st.Has(i)
	}
	lacking := func() (can []int) {
		for i := range d.pieces {
			if free(i) {
				can = append(can, i)
			}
		}
		return can
	}
	can := lacking()
	if len(can) == 0 && len(d.wanted) > 0 {
		reads = 1 // nothing else is left: what takes long
		can = lacking()
	}
	d.expect(len(d.wanted) > 0 || len(can) > 0 && d.f.rows.Load() < int64(d.f.mostRows), now)
	// Rarest first spreads what only one node has; chance among equals keeps the nodes
	// of a crowd from all asking for the same piece.
	rand.Shuffle(len(can), func(a, b int) { can[a], can[b] = can[b], can[a] })
	rarity := func(i int) int {
		if d.flights[i] != nil {
			return 0 // somebody waits
		}
		return int(d.available[i])
	}
	slices.SortStableFunc(can, func(a, b int) int { return rarity(a) - rarity(b) })
	wide := max(int(rowBytes/d.st.PieceSize()), 1)
	for _, i := range can {
		if room <= 0 || len(able) == 0 {
			return
		}
		at := d.leastBusy(able, i)
		if at < 0 || !free(i) { // the latter: in a row with one before
			continue
		}
		if d.f.rows.Add(1) > int64(d.f.mostRows) {
			d.f.rows.Add(-1)
			return // whoever ends one looks again
		}
		p := able[at]
		w := &row{p.Member, flight{first: i, last: i}}
		fits := func(j int) bool { return w.last-w.first+1 < min(wide, room) && p.pieces[j] && free(j) }
		for w.last+1 < d.pieces && fits(w.last+1) {
			w.last++
		}
		for w.first > 0 && fits(w.first-1) {
			w.first--
		}
		for j := w.first; j <= w.last; j++ {
			d.wanted[j] = wish{now, reads + 1}
		}
		room -= w.last - w.first + 1
		if p.reads++; p.reads >= readsPerPeer {
			able = slices.Delete(able, at, at+1)
		}
		d.wg.Go(func() { d.read(r.ctx, w, p.helper) })
	}
}

// leastBusy is the one with the fewest reads of those that hold a piece, and in this
// node's zone if there is one; -1 when nobody holds it.
func (d *download) leastBusy(able []source, i int) int {
	best, least := -1, 0
	from := rand.IntN(len(able))
	for k := range able {
		at := (from + k) % len(able)
		busy := able[at].reads + readsPerPeer*away(able[at].Member, d.f.o.Zone)
		if able[at].pieces[i] && (best < 0 || busy < least) {
			best, least = at, busy
		}
	}
	return best
}

// read makes one bulk read and keeps account of it.
func (d *download) read(ctx context.Context, w *row, h *helper) {
	err := d.takeRow(ctx, w)
	d.f.rows.Add(-1)
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := w.first; i <= w.last; i++ {
		if v, ok := d.wanted[i]; ok && v.reads > 1 {
			d.wanted[i] = wish{v.since, v.reads - 1}
		} else {
			delete(d.wanted, i)
		}
	}
	h.reads--
	switch {
	case err == nil:
		h.fails = 0
	case ctx.Err() == nil:
		d.log.Debug("a bulk read failed", "peer", w.from.ID, "first", w.first, "last", w.last, "err", err)
		if errors.Is(err, cluster.ErrSilent) {
			d.log.Info("a peer was asked for pieces and sends nothing: others are asked", "peer", w.from.ID)
		}
		pause := min(shunPeer<<min(h.fails, 10), shunMost)
		if errors.Is(err, errPutOff) {
			pause = shunPeer // it did send; whether that was right others judge
		} else {
			h.fails++
		}
		h.until = time.Now().Add(pause - rand.N(pause/4))
	}
	d.poke()
}

// takeRow reads a row and takes each piece as it comes.
func (d *download) takeRow(ctx context.Context, w *row) error {
	ctx, cancel := context.WithTimeout(ctx, rowTakes)
	defer cancel()
	return d.bring(ctx, w.from, &w.flight, cluster.ReadOptions{Silent: silentPeer})
}

// bring reads pieces from a member and takes each as it comes, once it was checked,
// while the next is on its way.
func (d *download) bring(ctx context.Context, from cluster.Member, fl *flight, o cluster.ReadOptions) error {
	off, n := d.flightRange(fl)
	o.Vouch = !d.table.knows(fl.first, fl.last)
	body, said, err := d.f.cluster.Open(ctx, from, d.desc.Digest, off, n, o)
	if err != nil {
		return err
	}
	defer body.Close()
	d.table.learn(said)
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	for i := fl.first; i <= fl.last; i++ {
		_, n := d.st.PieceRange(i)
		p := (*bp)[:n]
		sum, err := readSummed(body, p)
		if err != nil {
			return err
		}
		if err := d.takePiece(ctx, i, p, sum, from.ID); err != nil {
			return err
		}
	}
	return nil
}

// readSummed fills p and sums it up as it comes: while the peer still sends, and while
// what was just decrypted is in the CPU's caches.
func readSummed(r io.Reader, p []byte) (sum cluster.PieceSum, err error) {
	h := sha256.New()
	for done := 0; done < len(p); {
		n, err := r.Read(p[done:])
		h.Write(p[done : done+n])
		if done += n; err != nil && done < len(p) {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return sum, err
		}
	}
	h.Sum(sum[:0])
	return sum, nil
}

// takePiece checks a piece from a member against what was said of it, and keeps it.
func (d *download) takePiece(ctx context.Context, i int, p []byte, sum cluster.PieceSum, from string) error {
	d.mu.Lock()
	bad := d.banned[from]
	d.mu.Unlock()
	if bad {
		return fmt.Errorf("%w: piece %d came from %s, which sent wrong bytes before", errPutOff, i, from)
	}
	w, err := d.table.wait(ctx, i, from)
	if err != nil {
		return fmt.Errorf("%w: %w", errPutOff, err)
	}
	if err := d.table.check(i, sum, w, from); err != nil {
		return err
	}
	if err := d.put(i, p, store.Peer, from); err != nil {
		return fmt.Errorf("%w: %w", errLocal, err)
	}
	return nil
}
