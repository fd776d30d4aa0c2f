package fetcher

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// dispute is between who sent pieces and who says that they are wrong.
type dispute struct{ supplier, signer string }

// check holds a piece from a peer against the word about it.
func (t *table) check(i int, sum cluster.PieceSum, w word, peer string) error {
	if sum == w.sum {
		return nil
	}
	t.d.f.count.wrong.Add(1)
	t.d.log.Warn("a piece is not what was said of it", "piece", i, "from", peer, "said_by", w.by)
	t.d.wg.Go(func() { t.d.judge(i, w, peer) })
	return fmt.Errorf("%w: piece %d from %s is not what %s said of it", errPutOff, i, peer, w.by)
}

// judge finds out who is wrong about a piece, its supplier or who signed the word
// about it, by asking the registry. Without one the signer is believed until the
// blob's digest says otherwise: see swapSides.
func (d *download) judge(i int, w word, peer string) {
	d.mu.Lock()
	source := d.origin
	if d.originErr != nil || d.noRange {
		source = nil
	}
	d.mu.Unlock()
	if source != nil && !d.st.Has(i) {
		fl := &flight{first: i, last: i, done: make(chan struct{})}
		if err := d.demandOrigin(d.ctx, source, fl); err == nil {
			d.table.mu.Lock()
			sum, ok := d.table.sums[i]
			d.table.mu.Unlock()
			if ok && sum == w.sum {
				d.ban(peer)
				return
			}
			if ok {
				d.disbelieve(w.by)
				return
			}
		}
	}
	if peer != w.by && d.table.strike(dispute{peer, w.by}) {
		d.banFor(peer, Disputed)
	}
}

// strike counts a dispute; whether the supplier is out by it. Then it is not
// believed either: else it could have the signer out in turn, and nobody was left.
func (t *table) strike(p dispute) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.strikes[p]++; t.strikes[p] < strikesOut || t.sides[p.signer] != "" {
		return false
	}
	t.sides[p.supplier] = p.signer
	t.unsay(p.supplier)
	return true
}

// unsay drops what a node said of pieces that are not here. Called with t.mu held.
func (t *table) unsay(node string) {
	for i, w := range t.words {
		if w.by == node && !t.d.st.Has(i) {
			delete(t.words, i)
		}
	}
}

// takeTurns is for a fetch that nothing comes of, with peers that contradict each
// other and no registry to ask: one after the other is asked and believed alone. It
// reports whether that changed anything.
func (d *download) takeTurns(now time.Time) bool {
	if d.lastPiece.before(now) < stalledAfter {
		return false
	}
	t := d.table
	t.mu.Lock()
	if len(t.sides) == 0 || now.Sub(t.turned) < stalledAfter {
		t.mu.Unlock()
		return false
	}
	in := map[string]bool{}
	for supplier, signer := range t.sides {
		in[supplier], in[signer] = true, true
	}
	all := slices.Sorted(maps.Keys(in))
	t.turned = now
	t.turn++
	chosen := all[t.turn%len(all)]
	t.sides, t.strikes = map[string]string{}, map[dispute]int{}
	for _, node := range all {
		if node != chosen {
			t.sides[node] = chosen
			t.unsay(node)
		}
	}
	t.mu.Unlock()
	d.log.Info("peers contradict each other and nothing comes: another one is believed", "peer", chosen)
	d.forgive(chosen)
	for _, node := range all {
		if node != chosen {
			d.banFor(node, Disputed)
		}
	}
	return true
}

// forgive asks a peer again that was banned for a dispute.
func (d *download) forgive(node string) {
	d.mu.Lock()
	was := d.banned[node]
	delete(d.banned, node)
	delete(d.bannedFor, node)
	if h := d.helpers[node]; h != nil {
		h.fails, h.until = 0, time.Time{}
	}
	tor := d.tor
	if was {
		d.addPeers()
	}
	d.mu.Unlock()
	if was && tor != nil {
		tor.Unban(node)
	}
}

// swapSides is for a blob whose digest does not match and no registry to ask: in
// each dispute the signer was believed, and now the supplier is, unless there are
// pieces left from before the dispute to fetch again first. It reports whether
// there was a dispute.
func (d *download) swapSides() bool {
	t := d.table
	t.mu.Lock()
	before := map[int]bool{} // taken on the word of who was only later left out
	for i, w := range t.words {
		before[i] = t.sides[w.by] != "" && d.st.Has(i)
	}
	t.mu.Unlock()
	if d.drop(func(i int) bool { return before[i] && d.st.Source(i) == store.Peer }) > 0 {
		return true
	}
	t.mu.Lock()
	sides := t.sides
	t.sides, t.strikes = map[string]string{}, map[dispute]int{}
	t.mu.Unlock()
	for supplier, signer := range sides {
		d.forgive(supplier)
		d.mu.Lock()
		from := map[int]bool{}
		for i, s := range d.supplier {
			from[i] = s == signer
		}
		d.mu.Unlock()
		d.disbelieve(signer)
		d.drop(func(i int) bool { return from[i] })
	}
	return len(sides) > 0
}

// disbelieve drops all that a node said of the blob's pieces, with the pieces that
// were taken on its word, and asks it no more.
func (d *download) disbelieve(node string) {
	if node == d.f.id.ID() {
		return
	}
	t := d.table
	t.mu.Lock()
	was := t.liars[node]
	t.liars[node] = true
	said := map[int]bool{}
	for i, w := range t.words {
		if w.by == node {
			said[i] = true
			delete(t.words, i)
		}
	}
	t.mu.Unlock()
	if !was {
		d.log.Warn("peer said of pieces what they do not contain, and is not believed any more", "peer", node)
	}
	d.banFor(node, FalseTable)
	d.drop(func(i int) bool { return said[i] && d.st.Source(i) == store.Peer })
}
