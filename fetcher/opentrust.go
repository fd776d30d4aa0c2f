package fetcher

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/docker-quay/docker-quay/fetcher/open"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// dropTorrent ends the use of a torrent for this blob: what it says is not of the blob. Never called by a method of openStore.
func (d *download) dropTorrent(name supplier) {
	d.mu.Lock()
	d.banned[name] = true
	i := slices.IndexFunc(d.opens, func(o *openSource) bool { return o.name == name })
	if i < 0 {
		d.mu.Unlock()
		return
	}
	o := d.opens[i]
	d.opens = slices.Delete(d.opens, i, i+1)
	d.wrongMeta++
	d.mu.Unlock()
	d.log.Warn("the metainfo is wrong: the torrent is not of this blob, and not used for it any more", "torrent", o.meta.InfoHash, "trackers", len(o.meta.Trackers))
	if o.tor != nil {
		o.tor.Drop()
	}
}

// otherTorrent is mend for a blob of which pieces came by torrents, when there is no registry to compare with: one torrent at a time
// is believed, and what came by the others, or nobody knows from where, is dropped. It reports whether there was one to blame.
func (d *download) otherTorrent() bool {
	d.mu.Lock()
	var believed []*openSource
	blamed := false
	for i := range d.supplier {
		blamed = blamed || d.fromOpen(i)
	}
	for _, o := range d.opens {
		if !o.out {
			believed = append(believed, o)
		}
	}
	d.mu.Unlock()
	if !blamed {
		return false
	}
	if len(believed) == 1 {
		d.dropTorrent(believed[0].name)
	}
	next := ""
	d.mu.Lock()
	for k, o := range d.opens {
		if o.out = k > 0; !o.out {
			next, o.again = o.name, true
		}
	}
	by := make(map[int]supplier, len(d.supplier))
	for i, s := range d.supplier {
		by[i] = s
	}
	d.mu.Unlock()
	d.drop(func(i int) bool {
		return d.st.Source(i) == store.Peer && by[i] != next && (by[i] == "" || strings.HasPrefix(by[i], torrentSupplier))
	})
	return true
}

// settleOpen is for the end of a fetch: members may now have what came by torrents, and torrents that contradict the blob are wrong.
func (d *download) settleOpen(came []int) {
	for _, i := range came {
		d.tell(i)
	}
	for _, o := range d.openNow() {
		if errors.Is(o.tor.Stats().Err, open.ErrMismatch) {
			d.dropTorrent(o.name)
		}
	}
}

// openStore is the blob as an open swarm sees it.
type openStore struct {
	d *download
	o *openSource
}

var _ open.Storage = openStore{}

func (s openStore) ReadAt(p []byte, off int64) (int, error)  { return s.d.st.ReadAt(p, off) }
func (s openStore) WriteAt(p []byte, off int64) (int, error) { return s.d.st.WriteAt(p, off) }
func (s openStore) Has(i int) bool                           { return s.d.st.Has(i) }

// MarkPiece takes a piece that matches the torrent. No member vouches for it: the digest of the blob decides, and until then
// no member gets it from here.
func (s openStore) MarkPiece(i int, by string) error {
	d := s.d
	if d.st.Has(i) {
		return nil
	}
	d.mu.Lock()
	bad := d.banned[by] || s.o.out
	d.mu.Unlock()
	if bad {
		return fmt.Errorf("%w: piece %d came by %s, which is not believed", open.ErrPutOff, i, by)
	}
	if err := d.st.MarkPiece(i, store.Peer); err != nil {
		return err
	}
	_, n := d.st.PieceRange(i)
	d.arrived(i, int(n), store.Peer, by)
	d.tellOpen(i, by)
	return nil
}
