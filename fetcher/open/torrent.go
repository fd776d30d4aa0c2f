package open

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"

	"github.com/docker-quay/docker-quay/fetcher/published"
)

// maxSources bounds the peers that Stats tells apart; what others give counts under the empty name.
const maxSources = 256

// Torrent is one published layer in its open swarm. Its pieces are those of the store. See the package comment for which methods may
// be called when.
type Torrent struct {
	s        *Swarm
	infohash metainfo.Hash
	private  bool
	st       Storage
	lib      *torrent.Torrent // set before ready is closed
	trackers *announcer

	ready   chan struct{} // closed when lib is set
	ctx     context.Context
	cancel  context.CancelFunc // ends run
	stopped chan struct{}      // closed when run has ended
	kick    chan struct{}      // wakes run; holds one

	// gate is held shared during calls of st; dropping takes it to wait for them and keep new ones out.
	gate    sync.RWMutex
	dropped bool // guarded by gate

	proving sync.Mutex // one piece is hashed at a time

	// mu is taken under the library's lock too: the library is never called while it is held, and only s.mu taken.
	mu         sync.Mutex
	pieces     *pieces
	changed    map[int]bool // metainfo pieces whose completion the library is to look up
	delivering map[int]bool // store pieces being written
	sources    map[string]int64
	book       addressBook
	busy       bool      // counted in s.busy
	err        error     // of the storage, last
	failed     time.Time // when err was; zero when downloads are on
	ended      error     // ErrMismatch: the end
}

func newTorrent(s *Swarm, p *published.Torrent, l layout, st Storage) (*Torrent, error) {
	t := &Torrent{
		s: s, infohash: p.InfoHash, private: p.Private || p.Info.Private != nil && *p.Info.Private, st: st,
		ready: make(chan struct{}), stopped: make(chan struct{}), kick: make(chan struct{}, 1),
		pieces:     newPieces(l, p.Info.Pieces),
		changed:    make(map[int]bool),
		delivering: make(map[int]bool),
		sources:    make(map[string]int64),
		book:       newAddressBook(),
	}
	tiers := p.Trackers
	if len(s.o.Trackers) > 0 {
		tiers = nil
		for _, u := range s.o.Trackers {
			tiers = append(tiers, []string{u})
		}
	}
	t.trackers = newAnnouncer(t, tiers)
	t.ctx, t.cancel = context.WithCancel(s.ctx)
	for i := range l.storePieces() {
		if st.Has(i) {
			t.pieces.have(i)
		}
	}
	t.trackers.wasComplete = t.pieces.missing == 0
	return t, nil
}

// Infohash is what the layer is called in its open swarm.
func (t *Torrent) Infohash() metainfo.Hash { return t.infohash }

// Supplier is what MarkPiece is told of who supplied a piece: the torrent itself, as "torrent:" and its infohash. Peers sent what the
// metainfo asks for; if that is not the layer, the metainfo is to blame.
func (t *Torrent) Supplier() string { return "torrent:" + t.infohash.HexString() }

// Want asks peers for store piece i until it is held or Unwant is called. Wishes are met in their order, as many at a time as fit the
// buffer.
func (t *Torrent) Want(i int) {
	t.mu.Lock()
	news := t.pieces.want(i)
	t.countBusy()
	t.mu.Unlock()
	if news {
		t.wake()
	}
}

// Unwant takes Want back. Chunks that were asked for may still arrive, and are kept in memory while there is room.
func (t *Torrent) Unwant(i int) {
	t.mu.Lock()
	news := t.pieces.unwant(i)
	t.countBusy()
	t.mu.Unlock()
	if news {
		t.wake()
	}
}

// Have says that the storage holds store piece i, got by other means: peers are told of the metainfo pieces that are whole by it.
// Idempotent.
func (t *Torrent) Have(i int) {
	t.mu.Lock()
	news := t.setHave(i)
	t.mu.Unlock()
	if news {
		t.wake()
	}
}

// setHave records that store piece i is held; whether that is news. Needs mu.
func (t *Torrent) setHave(i int) bool {
	before := t.pieces.missing
	for _, j := range t.pieces.have(i) {
		t.changed[j] = true
	}
	t.countBusy()
	return t.pieces.missing != before
}

// Lost says that the storage holds store piece i no longer: it is not served any more, and can be wished for again. BitTorrent has no
// word for it; a peer that asks for it is refused, and learns better when it returns. Idempotent.
func (t *Torrent) Lost(i int) {
	t.mu.Lock()
	before := t.pieces.missing
	for _, j := range t.pieces.lost(i) {
		t.changed[j] = true
	}
	news := t.pieces.missing != before
	t.mu.Unlock()
	if news {
		t.wake()
	}
}

// countBusy keeps s.busy. Needs mu.
func (t *Torrent) countBusy() {
	busy := len(t.pieces.wanted) > 0 && t.ended == nil && t.ctx.Err() == nil
	if busy == t.busy {
		return
	}
	t.busy = busy
	if busy {
		t.s.setBusy(1)
	} else {
		t.s.setBusy(-1)
	}
}

// AddPeers makes addrs known as peers of this layer, beside those that trackers name. Idempotent.
func (t *Torrent) AddPeers(addrs []netip.AddrPort) { t.found(addrs, true) }

// found notes addresses of peers. Near ones may be on loopback.
func (t *Torrent) found(addrs []netip.AddrPort, near bool) {
	t.mu.Lock()
	added := false
	for _, ap := range addrs {
		ap = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		if near {
			t.s.allowNearby(ap)
		}
		added = t.s.dialable(ap) && t.book.add(ap) || added
	}
	t.mu.Unlock()
	if added {
		t.wake()
	}
}

// Availability is the number of connected peers that hold each store piece, wholly.
func (t *Torrent) Availability() []uint16 {
	p := t.pieces
	n := make([]uint16, p.storePieces())
	has := make([]bool, p.metaPieces())
	for _, pc := range t.lib.PeerConns() {
		clear(has)
		pc.PeerPieces().Iterate(func(j uint32) bool {
			if int(j) < len(has) {
				has[j] = true
			}
			return true
		})
		for i := range n {
			m := p.metaOf(i)
			if !slices.Contains(has[m.first:m.last+1], false) {
				n[i]++
			}
		}
	}
	return n
}

// Stats is what a torrent has done since it was added.
type Stats struct {
	// Peers is the number of connections now.
	Peers int
	// Downloaded, Uploaded and Wasted are bytes of content: received and of use, sent, and received in vain.
	Downloaded, Uploaded, Wasted int64
	// PerPeer splits Downloaded by the peer's address, host:port; peers beyond the first 256 are summed up under "".
	PerPeer map[string]int64
	// Trackers is how announcing goes, by tier.
	Trackers []TrackerStatus
	// Err is why nothing is downloaded at the moment: the storage's last error, or ErrMismatch, which is for good. Nil when all is well.
	Err error
}

// Stats takes a snapshot.
func (t *Torrent) Stats() Stats {
	ls := t.lib.Stats()
	s := Stats{
		Peers:      ls.ActivePeers,
		Downloaded: ls.BytesReadUsefulData.Int64(),
		Uploaded:   ls.BytesWrittenData.Int64(),
		Trackers:   t.trackers.status(),
	}
	s.Wasted = ls.BytesReadData.Int64() - s.Downloaded
	t.mu.Lock()
	defer t.mu.Unlock()
	s.PerPeer = maps.Clone(t.sources)
	switch {
	case t.ended != nil:
		s.Err = t.ended
	case !t.failed.IsZero():
		s.Err = t.err
	}
	return s
}

// received counts bytes of use.
func (t *Torrent) received(peer string, n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.sources[peer]; !known && len(t.sources) >= maxSources {
		peer = ""
	}
	t.sources[peer] += n
}

// progress is what trackers are told: bytes received and sent since the torrent was added, and still missing.
func (t *Torrent) progress() (down, up, left int64) {
	ls := t.lib.Stats()
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, has := range t.pieces.stored {
		if !has {
			_, n := t.pieces.storeRange(i)
			left += n
		}
	}
	return ls.BytesReadUsefulData.Int64(), ls.BytesWrittenData.Int64(), left
}

// Drop leaves the swarm and closes its connections; trackers are told in the background. When it returns, the storage is no longer
// used and the torrent can be added again. It can be called more than once.
func (t *Torrent) Drop() {
	t.quit()
	t.lib.Drop()
	t.s.forget(t)
}

// quit ends run and keeps the library from the storage; it waits for both.
func (t *Torrent) quit() {
	<-t.ready // Swarm.Close may come during Add
	t.cancel()
	<-t.stopped
	t.mu.Lock()
	t.countBusy()
	t.mu.Unlock()
	t.gate.Lock()
	t.dropped = true
	t.gate.Unlock()
}

// enter begins a call of the storage; false when the torrent is dropped. Balance with leave.
func (t *Torrent) enter() bool {
	t.gate.RLock()
	if t.dropped {
		t.gate.RUnlock()
		return false
	}
	return true
}

func (t *Torrent) leave() { t.gate.RUnlock() }

// fail records trouble with the storage; run stops downloading for a while.
func (t *Torrent) fail(err error) {
	t.mu.Lock()
	first := t.failed.IsZero()
	t.err = err
	t.failed = time.Now()
	t.mu.Unlock()
	if first {
		t.s.log.Warn("the storage does not take what peers send; trying again soon", "torrent", t.infohash, "error", err, "wait", retryStorage)
	}
	t.wake()
}

// end stops the torrent for good: its metainfo is not of what is in the storage.
func (t *Torrent) end(why error) error {
	err := fmt.Errorf("%w: %w", ErrMismatch, why)
	t.mu.Lock()
	first := t.ended == nil
	if first {
		t.ended = err
		t.countBusy()
	}
	t.mu.Unlock()
	if first {
		t.s.log.Warn("a torrent is not of the layer that it says, or the layer's bytes are wrong; it is not used any more",
			"torrent", t.infohash, "error", why)
	}
	t.wake()
	return err
}
