package swarm

import (
	"cmp"
	"context"
	"crypto/sha256"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
)

// Torrent is one blob in the swarm. See the package comment for which methods may be called when.
type Torrent struct {
	s         *Swarm
	digest    digest.Digest
	infohash  metainfo.Hash
	pieceSize int64
	pieces    int
	hashSeed  [sha256.Size]byte
	st        Storage
	lib       *torrent.Torrent // set before ready is closed

	ready   chan struct{} // closed when lib is set
	ctx     context.Context
	cancel  context.CancelFunc // ends run
	stopped chan struct{}      // closed when run has ended
	kick    chan struct{}      // wakes run; holds one

	// gate is held shared during calls of st; dropping takes it to wait for them and keep new ones out.
	gate    sync.RWMutex
	dropped bool // guarded by gate

	// mu is taken under the library's lock too: the library is never called while it is held, and only s.mu taken.
	mu        sync.Mutex
	held      []bool                      // pieces held
	missing   int                         // count of those that are not
	wanted    map[int]bool                // the caller's wishes
	changed   map[int]bool                // pieces whose completion the library is to look up
	wishes    map[int]bool                // priorities to set: wanted or not
	lost      map[int]bool                // pieces to look up once more at the next try of peers
	suppliers map[int][]share             // who gave what of pieces that are not whole yet
	received  map[torrent.PeerID]int64    // bytes of use, ever
	peers     map[netip.AddrPort]*address // to keep connected to
	newPeers  bool                        // peers were added since run last tried them
	banned    map[torrent.PeerID]bool
	asked     map[torrent.PeerID]*asked
	err       error     // of the storage, last
	failed    time.Time // when err was; zero when downloads are on
}

// share is a peer's part of a piece.
type share struct {
	peer  torrent.PeerID
	bytes int64
}

func newTorrent(s *Swarm, h metainfo.Hash, d digest.Digest, size, pieceSize int64, st Storage) *Torrent {
	n := numPieces(size, pieceSize)
	t := &Torrent{
		s: s, digest: d, infohash: h, pieceSize: pieceSize, pieces: n, hashSeed: pieceSeed(d, size, pieceSize), st: st,
		ready: make(chan struct{}), stopped: make(chan struct{}), kick: make(chan struct{}, 1),
		held:      make([]bool, n),
		missing:   n,
		wanted:    make(map[int]bool),
		changed:   make(map[int]bool),
		wishes:    make(map[int]bool),
		lost:      make(map[int]bool),
		suppliers: make(map[int][]share),
		received:  make(map[torrent.PeerID]int64),
		peers:     make(map[netip.AddrPort]*address),
		banned:    make(map[torrent.PeerID]bool),
		asked:     make(map[torrent.PeerID]*asked),
	}
	t.ctx, t.cancel = context.WithCancel(s.ctx)
	for i := range n {
		if st.Has(i) {
			t.held[i] = true
			t.missing--
		}
	}
	return t
}

// Infohash is what the blob is called on the wire.
func (t *Torrent) Infohash() metainfo.Hash { return t.infohash }

// Want asks peers for piece i (0 to the number of pieces − 1) until it is held or Unwant is called. Chunks on their way
// are not called back by a later wish for something else, so keep a window of few pieces.
func (t *Torrent) Want(i int) { t.wish(i, true) }

// Unwant takes Want back. Chunks that were asked for may still arrive, and complete the piece.
func (t *Torrent) Unwant(i int) { t.wish(i, false) }

func (t *Torrent) wish(i int, want bool) {
	t.mu.Lock()
	if t.wanted[i] == want || want && t.held[i] {
		t.mu.Unlock()
		return
	}
	if want {
		t.wanted[i] = true
	} else {
		delete(t.wanted, i)
	}
	t.wishes[i] = want
	t.mu.Unlock()
	t.wake()
}

// Have says that the storage holds piece i, got by other means: peers are told. Idempotent.
func (t *Torrent) Have(i int) {
	if t.setHave(i) {
		t.wake()
	}
}

// setHave records that piece i is held; whether that is news.
func (t *Torrent) setHave(i int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.suppliers, i)
	if t.held[i] {
		return false
	}
	t.held[i] = true
	t.missing--
	delete(t.wanted, i)
	t.changed[i] = true
	return true
}

// Lost says that the storage holds piece i no longer: it is not served any more, and can be wanted again. BitTorrent
// has no word for it; a peer that was told of the piece and asks for it is disconnected, and learns better when it
// returns. Idempotent.
func (t *Torrent) Lost(i int) {
	t.mu.Lock()
	if !t.held[i] {
		t.mu.Unlock()
		return
	}
	t.held[i] = false
	t.missing++
	t.changed[i] = true
	t.lost[i] = true
	t.wishes[i] = false // the library remembers the wish that once brought it
	t.mu.Unlock()
	t.wake()
}

func (t *Torrent) has(i int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held[i]
}

// AddPeers makes addrs known as peers of this blob, for as long as the torrent lives. Idempotent; this node's own
// address does no harm. A complete torrent does not dial: whoever misses pieces does.
func (t *Torrent) AddPeers(addrs []netip.AddrPort) {
	t.mu.Lock()
	added := false
	for _, ap := range addrs {
		ap = netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
		if !ap.IsValid() || ap.Port() == 0 || ap.Addr().IsUnspecified() || t.peers[ap] != nil {
			continue
		}
		if len(t.peers) >= maxPeers && !t.dropPeer() {
			break
		}
		t.peers[ap] = &address{addr: net.TCPAddrFromAddrPort(ap)}
		added = true
	}
	t.newPeers = t.newPeers || added
	t.mu.Unlock()
	if added {
		t.wake()
	}
}

// address is where a peer may be.
type address struct {
	addr  *net.TCPAddr
	tries int       // in a row without a connection
	next  time.Time // when to try again
}

// tried notes a try. The first ones are as far apart as run's looks, see retryPeers; the pauses after them, up to a fifth shorter
// than they are meant to be, are taken here.
func (a *address) tried(now time.Time) {
	if a.tries++; a.tries < retryKeep {
		a.next = now.Add(retryPeers / 2)
		return
	}
	wait := min(retryPeers<<min(a.tries-retryKeep+1, 10), retryMost)
	a.next = now.Add(wait - rand.N(wait/5))
}

// dropPeer forgets the address that failed most often, to make room; false when none failed for long. Needs mu.
func (t *Torrent) dropPeer() bool {
	var worst netip.AddrPort
	most := retryKeep
	for ap, a := range t.peers {
		if a.tries > most {
			worst, most = ap, a.tries
		}
	}
	delete(t.peers, worst)
	return worst.IsValid()
}

// Ban closes the connections to a peer, by node ID, for this blob, and has none with it any more.
func (t *Torrent) Ban(peer string) {
	id, err := peerIDOf(peer)
	if err != nil {
		return // not a node: it has no connections either
	}
	t.mu.Lock()
	t.banned[id] = true
	t.mu.Unlock()
	for _, pc := range t.lib.PeerConns() {
		if pc.PeerID == id {
			pc.Close()
		}
	}
}

// Unban takes Ban back.
func (t *Torrent) Unban(peer string) {
	id, err := peerIDOf(peer)
	if err != nil {
		return
	}
	t.mu.Lock()
	delete(t.banned, id)
	t.mu.Unlock()
	t.wake()
}

func (t *Torrent) isBanned(id torrent.PeerID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.banned[id] || t.shunned(id)
}

// Availability is the number of connected peers that hold each piece. It costs microseconds per peer.
func (t *Torrent) Availability() []uint16 {
	n := make([]uint16, t.pieces)
	for _, pc := range t.lib.PeerConns() {
		pc.PeerPieces().Iterate(func(i uint32) bool {
			if int(i) < len(n) {
				n[i]++
			}
			return true
		})
	}
	return n
}

// Peer is a connected peer and the pieces it holds.
type Peer struct {
	Node   string // its ID
	Pieces []bool
}

// Peers are the connected peers that may be asked, in no order.
func (t *Torrent) Peers() []Peer {
	conns := t.lib.PeerConns()
	peers := make([]Peer, 0, len(conns))
	for _, pc := range conns {
		if t.isBanned(pc.PeerID) {
			continue
		}
		held := make([]bool, t.pieces)
		pc.PeerPieces().Iterate(func(i uint32) bool {
			if int(i) < len(held) {
				held[i] = true
			}
			return true
		})
		peers = append(peers, Peer{nodeOf(pc.PeerID), held})
	}
	return peers
}

// Holders names up to limit connected peers, by node ID, that hold piece i.
func (t *Torrent) Holders(i, limit int) []string {
	var ids []string
	for _, pc := range t.lib.PeerConns() {
		if len(ids) >= limit {
			break
		}
		if pc.PeerPieces().Contains(uint32(i)) {
			ids = append(ids, nodeOf(pc.PeerID))
		}
	}
	return ids
}

// Stats is what a torrent has done since it was added.
type Stats struct {
	// Peers is the number of connections now.
	Peers int
	// Downloaded, Uploaded and Wasted are bytes of content: received and of use, sent, and received in vain.
	Downloaded, Uploaded, Wasted int64
	// PerPeer splits Downloaded by node ID.
	PerPeer map[string]int64
	// Err is why nothing is downloaded at the moment: the storage's last error, nil when all is well.
	Err error
}

// Stats takes a snapshot.
func (t *Torrent) Stats() Stats {
	ls := t.lib.Stats()
	s := Stats{
		Peers:      ls.ActivePeers,
		Downloaded: ls.BytesReadUsefulData.Int64(),
		Uploaded:   ls.BytesWrittenData.Int64(),
		PerPeer:    make(map[string]int64),
	}
	s.Wasted = ls.BytesReadData.Int64() - s.Downloaded
	t.mu.Lock()
	defer t.mu.Unlock()
	for id, n := range t.received {
		s.PerPeer[nodeOf(id)] = n
	}
	if !t.failed.IsZero() {
		s.Err = t.err
	}
	return s
}

// Drop takes the blob out of the swarm and closes its connections. When it returns, the storage is no longer used and
// the blob can be added again. It can be called more than once.
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
		t.s.log.Warn("the storage does not take what peers send; trying again soon", "blob", t.digest, "error", err, "wait", retryStorage)
	}
	t.wake()
}

// supplied records that a peer gave n bytes of piece i.
func (t *Torrent) supplied(i int, peer torrent.PeerID, n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.received[peer] += n
	if t.held[i] {
		return
	}
	shares := t.suppliers[i]
	for k := range shares {
		if shares[k].peer == peer {
			shares[k].bytes += n
			return
		}
	}
	t.suppliers[i] = append(shares, share{peer, n})
}

// takeSuppliers forgets and returns who supplied piece i, the largest share first.
func (t *Torrent) takeSuppliers(i int) []share {
	t.mu.Lock()
	defer t.mu.Unlock()
	shares := t.suppliers[i]
	delete(t.suppliers, i)
	slices.SortStableFunc(shares, func(a, b share) int { return cmp.Compare(b.bytes, a.bytes) })
	return shares
}

func joinSuppliers(shares []share) string {
	ids := make([]string, len(shares))
	for k, s := range shares {
		ids[k] = nodeOf(s.peer)
	}
	return strings.Join(ids, supplierSeparator)
}

const supplierSeparator = "+"

// Suppliers takes apart what MarkPiece is given as peer: the node IDs of all peers that a piece came from, the one that
// gave most of it first. Usually it is one; near the end of a blob, or when a peer went away, there are several, and
// which of them gave a wrong byte cannot be told.
func Suppliers(peer string) []string {
	if peer == "" {
		return nil
	}
	return strings.Split(peer, supplierSeparator)
}
