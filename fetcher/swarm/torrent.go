package swarm

import (
	"context"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
)

// Torrent is one blob in the swarm. See the package comment for which methods may be called when.
type Torrent struct {
	s        *Swarm
	digest   digest.Digest
	infohash metainfo.Hash
	pieces   int
	lib      *torrent.Torrent // set before ready is closed

	ready   chan struct{} // closed when lib is set
	ctx     context.Context
	cancel  context.CancelFunc // ends run
	stopped chan struct{}      // closed when run has ended
	kick    chan struct{}      // wakes run; holds one

	// mu is taken under the library's lock too: the library is never called while it is held, and only s.mu taken.
	mu       sync.Mutex
	held     []bool                      // pieces held
	missing  int                         // count of those that are not
	changed  map[int]bool                // pieces whose completion the library is to look up
	lost     map[int]bool                // pieces that peers were told of and that are gone
	peers    map[netip.AddrPort]*address // to keep connected to
	newPeers bool                        // peers were added since run last tried them
	banned   map[torrent.PeerID]bool
}

func newTorrent(s *Swarm, h metainfo.Hash, d digest.Digest, size, pieceSize int64, has func(i int) bool) *Torrent {
	n := numPieces(size, pieceSize)
	t := &Torrent{
		s: s, digest: d, infohash: h, pieces: n,
		ready: make(chan struct{}), stopped: make(chan struct{}), kick: make(chan struct{}, 1),
		held:    make([]bool, n),
		missing: n,
		changed: make(map[int]bool),
		lost:    make(map[int]bool),
		peers:   make(map[netip.AddrPort]*address),
		banned:  make(map[torrent.PeerID]bool),
	}
	t.ctx, t.cancel = context.WithCancel(s.ctx)
	for i := range n {
		if has(i) {
			t.held[i] = true
			t.missing--
		}
	}
	return t
}

// Infohash is what the blob is called on the wire.
func (t *Torrent) Infohash() metainfo.Hash { return t.infohash }

// Have says that this node holds piece i (0 to the number of pieces − 1): peers are told. Idempotent.
func (t *Torrent) Have(i int) {
	t.mu.Lock()
	if t.held[i] {
		t.mu.Unlock()
		return
	}
	t.held[i] = true
	t.missing--
	t.changed[i] = true
	delete(t.lost, i)
	t.mu.Unlock()
	t.wake()
}

// Lost says that this node holds piece i no longer: peers are told unless Have says soon that it does again. See the package comment for how.
// Idempotent.
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
	return t.banned[id]
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

// Connections is the number of peers that are connected now.
func (t *Torrent) Connections() int { return len(t.lib.PeerConns()) }

// Drop takes the blob out of the swarm and closes its connections. When it returns the blob can be added again. It can be called more than
// once.
func (t *Torrent) Drop() {
	t.quit()
	t.lib.Drop()
	t.s.forget(t)
}

// quit ends run.
func (t *Torrent) quit() {
	<-t.ready // Swarm.Close may come during Add
	t.cancel()
	<-t.stopped
}
