package fetcher

import (
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

// fillWindow keeps the swarm busy with pieces that somebody there has, rarest
// first, and no more than a window of them.
func (d *download) fillWindow() {
	tor := d.torrent()
	if tor == nil {
		return
	}
	limit := int64(window)
	if d.f.hot(demandFollows) {
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
			if n == 0 || i >= d.pieces || d.wanted[i] || d.claims[i/per] || d.flights[i] != nil || d.wantedOpen(i) || d.st.Has(i) {
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
	asked := slices.Collect(maps.Keys(d.wanted))
	d.mu.Unlock()
	for _, c := range can {
		tor.Want(c.piece)
	}
	d.table.ask(tor, asked)
}
