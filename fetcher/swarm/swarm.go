package swarm

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

var (
	// ErrClosed is the error of a Swarm after Close.
	ErrClosed = errors.New("the swarm is closed")
	// ErrExists is the error of Add for a blob that is in the swarm already.
	ErrExists = errors.New("the blob is in the swarm already")

	// errFull is why a connection is neither dialled nor kept.
	errFull = errors.New("this node has as many connections as it may")
)

// Options are what New needs.
type Options struct {
	// ID is this node's membership; required.
	ID *trust.Identity
	// Listener yields connections whose TLS handshake is done, as trust.Listener.Swarm does. The Swarm closes it. Nil: this
	// node only dials.
	Listener net.Listener
	// Connections bounds those of all torrents together, in both directions; those beyond it are not dialled, and closed when
	// they come in. ConnectionsPerTorrent bounds those of one blob. 0: no bound of all, the library's 50 for one.
	Connections, ConnectionsPerTorrent int
	// Unknown is asked when a member connects for an infohash that is not in the swarm: it may Add the blob and return
	// true. It runs on the connection's goroutine and must be quick. Nil: such connections are refused.
	Unknown func(metainfo.Hash) bool
	// Log receives a warning per peer that is not of the cluster, and the library's warnings at level Debug. Nil: no log.
	Log *slog.Logger
}

// Swarm is this node's part in the swarms of all its blobs. It is safe for concurrent use.
type Swarm struct {
	self torrent.PeerID
	tls  *tls.Config
	most int // connections; 0: no bound
	ask  func(metainfo.Hash) bool
	log  *slog.Logger
	lib  *torrent.Client
	ln   net.Listener // nil when only dialling

	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc
	done   chan struct{} // closed when the library is closed

	mu       sync.Mutex                        // a leaf: nothing else is locked or called while it is held
	closed   bool                              // guarded by mu
	torrents map[metainfo.Hash]*Torrent        // guarded by mu
	conns    map[*conn]struct{}                // open ones; guarded by mu
	nodes    map[netip.AddrPort]torrent.PeerID // who answered when an address was last dialled; guarded by mu
	warned   map[string]bool                   // addresses reported as foreign; guarded by mu
}

// New starts taking part. It owns o.Listener from then on, also when it fails.
func New(o Options) (*Swarm, error) {
	if o.ID == nil {
		return nil, errors.New("a swarm needs an identity: make a cluster secret with `docker quay node secret`")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Swarm{
		tls:      o.ID.Client(trust.ProtoSwarm),
		most:     o.Connections,
		ask:      o.Unknown,
		log:      o.Log,
		ln:       o.Listener,
		done:     make(chan struct{}),
		torrents: make(map[metainfo.Hash]*Torrent),
		conns:    make(map[*conn]struct{}),
		nodes:    make(map[netip.AddrPort]torrent.PeerID),
		warned:   make(map[string]bool),
	}
	var err error
	if s.self, err = peerIDOf(o.ID.ID()); err != nil {
		return nil, err
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	if s.lib, err = torrent.NewClient(s.libraryConfig(o)); err != nil {
		s.cancel()
		if s.ln != nil {
			s.ln.Close()
		}
		return nil, fmt.Errorf("cannot start BitTorrent: %w", err)
	}
	s.lib.AddDialer(dialer{s})
	if s.ln != nil {
		s.lib.AddListener(listener{s})
	}
	return s, nil
}

// Add makes the blob known: members that ask for it are told which pieces this node holds. Size and pieceSize are in bytes and above 0. Has
// tells what is held to begin with; it is called during Add only. For pieces that come or go while Add runs, and ever after, call Have or
// Lost. The error wraps ErrExists or ErrClosed.
func (s *Swarm) Add(d digest.Digest, size, pieceSize int64, has func(i int) bool) (*Torrent, error) {
	if size <= 0 || pieceSize <= 0 {
		return nil, fmt.Errorf("%s: a blob of %d bytes in pieces of %d cannot be shared", d, size, pieceSize)
	}
	info := infoBytes(d, size, pieceSize)
	t := newTorrent(s, metainfo.HashBytes(info), d, size, pieceSize, has)

	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", d, ErrClosed)
	case s.torrents[t.infohash] != nil:
		s.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", d, ErrExists)
	}
	s.torrents[t.infohash] = t // before the library has it: members may connect for it at once
	s.mu.Unlock()

	lib, _ := s.lib.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash:  t.infohash,
		InfoBytes: info,
		Storage:   pieceStorage{t},
		// Completion is always known; were it not, this would keep the library from reading the whole blob.
		DisableInitialPieceCheck: true,
	})
	t.lib = lib
	if lib.Info() == nil { // the library refused the dictionary; it does not say why
		lib.Drop()
		s.forget(t)
		close(t.stopped) // for a Close that came meanwhile
		close(t.ready)
		return nil, fmt.Errorf("%s: BitTorrent cannot share a blob of %d bytes in pieces of %d", d, size, pieceSize)
	}
	t.want()
	close(t.ready)
	go t.run()
	return t, nil
}

// Close ends all torrents and connections and waits for what was started. It can be called more than once.
func (s *Swarm) Close() {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	torrents := make([]*Torrent, 0, len(s.torrents))
	for _, t := range s.torrents {
		torrents = append(torrents, t)
	}
	s.mu.Unlock()
	if !first {
		<-s.done
		return
	}
	s.cancel()
	for _, t := range torrents {
		t.quit()
	}
	s.lib.Close()
	close(s.done)
	for _, c := range s.openConns() {
		c.Close()
	}
	if s.ln != nil {
		s.ln.Close()
	}
}

// Connections is the number of open connections of all torrents.
func (s *Swarm) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// Torrents is the number of blobs in the swarm.
func (s *Swarm) Torrents() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.torrents)
}

// fullLocked reports whether there is no place for another connection.
func (s *Swarm) fullLocked() bool { return s.most > 0 && len(s.conns) >= s.most }

func (s *Swarm) openConns() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// torrent is the torrent of an infohash, nil if there is none.
func (s *Swarm) torrent(h metainfo.Hash) *Torrent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.torrents[h]
}

func (s *Swarm) forget(t *Torrent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.torrents[t.infohash] == t {
		delete(s.torrents, t.infohash)
	}
}

// onPeer is called by the library, under its lock, when a connection has joined a torrent.
func onPeer(pc *torrent.PeerConn) {
	// The library answers extended messages (BEP 10) also when they were not agreed on, and hole punching has it dial on a peer's word. With
	// no extension it hangs up instead.
	pc.LocalLtepProtocolMap = &torrent.LocalLtepProtocolMap{}
}

// peerIDPrefix begins the BitTorrent peer ID of every node; the 16 bytes of the node ID follow.
const peerIDPrefix = "QY1-"

func peerIDOf(node string) (id torrent.PeerID, err error) {
	raw, err := hex.DecodeString(node)
	if err != nil || len(raw) != len(id)-len(peerIDPrefix) {
		return id, fmt.Errorf("%q is not a node ID", node)
	}
	copy(id[copy(id[:], peerIDPrefix):], raw)
	return id, nil
}

func nodeOf(id torrent.PeerID) string {
	return hex.EncodeToString(id[len(peerIDPrefix):])
}
