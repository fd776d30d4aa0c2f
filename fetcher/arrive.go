package fetcher

import (
	"errors"
	"fmt"
	"hash/crc32"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/store"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// put writes one whole piece that came from the registry or by a ranged read
// from a peer ("" for the registry).
func (d *download) put(i int, p []byte, src store.Source, peer string) error {
	if d.st.Has(i) {
		return nil
	}
	off, _ := d.st.PieceRange(i)
	if _, err := d.st.WriteAt(p, off); err != nil {
		if errors.Is(err, store.ErrHeld) {
			return nil
		}
		return fmt.Errorf("%s: %w", d.what(), err)
	}
	if d.st.Has(i) {
		return nil
	}
	if src == store.Origin {
		d.table.own(i, p)
	}
	// The sum of the bytes at hand: reading each piece back for it took 0.2 of
	// 1.9 CPU-s per GiB.
	if err := d.st.MarkPieceCRC(i, src, crc32.Checksum(p, castagnoli)); err != nil {
		return fmt.Errorf("%s: %w", d.what(), err)
	}
	d.arrived(i, len(p), src, peer)
	d.tell(i)
	d.tellOpen(i, peer)
	return nil
}

// arrived accounts for a new piece.
func (d *download) arrived(i, n int, src store.Source, peer string) {
	now := time.Now()
	d.lastPiece.set(now)
	d.f.count.arrived(src, n)
	d.downRate.add(now, int64(n))
	d.mu.Lock()
	delete(d.wanted, i)
	for _, o := range d.opens {
		delete(o.wanted, i)
		if o.name == peer {
			o.last, o.met = now, true
			o.count++
		}
	}
	if src == store.Peer {
		d.supplier[i] = peer
		d.fromPeers.Add(int64(n))
		if d.fromOpen(i) {
			d.byOpen = true
		} else {
			d.lastPeerPiece.set(now)
		}
	} else {
		d.fromOrigin.Add(int64(n))
	}
	d.mu.Unlock()
	d.poke()
}
