package open

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

var (
	// ErrClosed is the error of a Swarm after Close.
	ErrClosed = errors.New("the open swarm is closed")
	// ErrExists is the error of Add for a torrent that is in the swarm already.
	ErrExists = errors.New("the torrent is in the open swarm already")
	// ErrMismatch says that the layer's bytes and the metainfo's piece hashes contradict each other: the torrent is of something
	// else, or, while the layer is not verified, its bytes so far are wrong. The torrent neither downloads nor uploads any more.
	ErrMismatch = errors.New("the torrent is not of this layer")
	// ErrBadPiece is what a Storage wraps when MarkPiece refuses a piece for its content: it knows better than the metainfo, and the torrent
	// ends with ErrMismatch.
	ErrBadPiece = errors.New("the piece has the wrong content")
	// ErrPutOff is what a Storage wraps when MarkPiece refuses a piece for now: the wish for it ends, and no more. The piece stays in memory
	// while there is room.
	ErrPutOff = errors.New("the piece is not taken now")
)

// Storage is where a layer's pieces are. Offsets are within the layer. All methods must be safe for concurrent use. Only pieces that were
// wished for are written, and only with bytes that matched the metainfo.
type Storage interface {
	// ReadAt reads bytes of pieces that are held, as io.ReaderAt.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes part of one piece that is not held, as io.WriterAt. When the piece was marked by other means in the meantime it may
	// return any error; the bytes are then forgotten.
	WriteAt(p []byte, off int64) (int, error)
	// Has reports whether piece i is held. It is asked for often and must be quick.
	Has(i int) bool
	// MarkPiece makes piece i, now wholly written, a held one, or returns why not: see ErrBadPiece and ErrPutOff. Any other error is taken for
	// trouble with the disk. By is Torrent.Supplier.
	MarkPiece(i int, by string) error
}

// Options are what New needs. The zero value is of use: any port, trackers as in the metainfo, no discovery, no seeding.
type Options struct {
	// Listen is the host or IP address to listen on, "" for all. Strangers connect to it. An IP address is also where trackers and peers
	// see this node come from.
	Listen string
	// Ports is where to listen, TCP (and UDP when Public); the first that is free. The zero value is any.
	Ports trust.PortRange
	// Trackers, announce URLs, replace those of the metainfo when not empty; each is a tier of its own, so all are asked.
	Trackers []string
	// TrackerTLS is for trackers with https URLs: roots of a private authority. Nil: the system's.
	TrackerTLS *tls.Config
	// Public looks for peers of torrents that are not private by DHT, peer exchange and local service discovery, and tells of this node
	// there. It opens a UDP port of the same number.
	Public bool
	// DHTNodes are where Public begins, as host:port. Nil: the well-known routers of the BitTorrent DHT.
	DHTNodes []string
	// Seed lets peers download from this node. Without it not a byte of content is uploaded.
	Seed bool
	// UploadLimit and DownloadLimit bound the rates of all torrents together, in bytes of content (up) and of the wire (down) per second;
	// nil for no limit. They may be shared and changed while in use. An UploadLimit with a burst below 16 KiB is given one of 16 KiB.
	UploadLimit, DownloadLimit *rate.Limiter
	// MaxConnections bounds the connections of all torrents together, both ways; 0 is 200.
	MaxConnections int
	// Buffer bounds the bytes in memory of pieces that are not checked or not written yet, over all torrents; 0 is 64 MiB. A torrent
	// that downloads may always have what one wish needs: one or two of its pieces, which may have up to 64 MiB in a torrent of somebody
	// else's, and have at most 1 MiB in ours.
	Buffer int64
	// Log receives what a user should know of trackers and torrents, and the library's warnings at level Debug. Nil: no log.
	Log *slog.Logger

	noLocalDiscovery bool // in tests: it multicasts on every interface
}

const (
	// defaultConnections: a layer seldom has more than 50 peers worth having, and four such at once fill a link; each costs some 50 KiB.
	defaultConnections = 200
	// defaultBuffer holds 64 of our own pieces of 1 MiB or 4 of the longest that are common elsewhere.
	defaultBuffer = 64 << 20
	// maxAnnounces bounds the announces in progress of all torrents together: a node that starts with 1,000 layers must not open 1,000
	// connections to one tracker.
	maxAnnounces = 8
)

// Swarm is this node's part in the open swarms of all its published layers. It is safe for concurrent use.
type Swarm struct {
	o        Options
	log      *slog.Logger
	lib      *torrent.Client
	ln       net.Listener
	port     uint16
	from     netip.Addr // where peers and trackers are connected from; invalid: as the kernel likes
	loopback bool       // listens on loopback only, so peers on loopback are no surprise
	dht      *dhtNode
	http     *http.Client
	key      uint32        // by which trackers know this node when its address changes (BEP 7)
	announce chan struct{} // one element per announce in progress

	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc
	done   chan struct{}  // closed when the library is closed
	wg     sync.WaitGroup // announces

	mu       sync.Mutex                 // a leaf: nothing else is locked or called while it is held
	closed   bool                       // guarded by mu
	torrents map[metainfo.Hash]*Torrent // guarded by mu
	conns    map[*conn]struct{}         // open ones; guarded by mu
	slots    int                        // connections open or being made; guarded by mu
	nearby   map[netip.AddrPort]bool    // loopback addresses that may be dialled; guarded by mu
	busy     int                        // torrents that have wishes; guarded by mu
}

// New starts listening.
func New(o Options) (*Swarm, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxConnections <= 0 {
		o.MaxConnections = defaultConnections
	}
	if o.Buffer <= 0 {
		o.Buffer = defaultBuffer
	}
	for _, u := range o.Trackers {
		if _, err := parseTracker(u); err != nil {
			return nil, err
		}
	}
	ln, udp, err := listen(o.Listen, o.Ports, o.Public)
	if err != nil {
		return nil, err
	}
	addr := ln.Addr().(*net.TCPAddr)
	s := &Swarm{
		o: o, log: o.Log, ln: ln,
		port: uint16(addr.Port), loopback: addr.IP.IsLoopback(),
		key: rand.Uint32(), announce: make(chan struct{}, maxAnnounces),
		done:     make(chan struct{}),
		torrents: make(map[metainfo.Hash]*Torrent),
		conns:    make(map[*conn]struct{}),
		nearby:   make(map[netip.AddrPort]bool),
	}
	if ip, err := netip.ParseAddr(o.Listen); err == nil && !ip.IsUnspecified() {
		s.from = ip.Unmap()
	}
	s.http = trackerClient(o.TrackerTLS, s.from)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	fail := func(err error) (*Swarm, error) {
		s.cancel()
		ln.Close()
		if udp != nil {
			udp.Close()
		}
		return nil, fmt.Errorf("cannot start open BitTorrent: %w", err)
	}
	if o.Public {
		if s.dht, err = newDHT(s, udp); err != nil {
			return fail(err)
		}
	}
	if s.lib, err = torrent.NewClient(s.libraryConfig()); err != nil {
		if s.dht != nil {
			s.dht.close()
		}
		return fail(err)
	}
	s.lib.AddDialer(dialer{s})
	s.lib.AddListener(listener{s})
	return s, nil
}

// Port is where peers connect, and what trackers are told.
func (s *Swarm) Port() uint16 { return s.port }

// Add makes a published layer known: trackers hear of it, peers that ask are served what st holds, and pieces wished for are downloaded
// into it. St counts pieces of store.PieceSize(size of the layer). For pieces that st gets by other means while Add runs, and ever
// after, call Have. A few of the pieces held are checked against the metainfo first, hence it reads; the error wraps ErrMismatch when
// they are something else, ErrExists or ErrClosed.
func (s *Swarm) Add(p *published.Torrent, st Storage) (*Torrent, error) {
	l, err := newLayout(p)
	if err != nil {
		return nil, fmt.Errorf("torrent %s: %w", p.InfoHash, err)
	}
	t, err := newTorrent(s, p, l, st)
	if err != nil {
		return nil, fmt.Errorf("torrent %s: %w", p.InfoHash, err)
	}
	if err := t.probe(); err != nil {
		return nil, fmt.Errorf("torrent %s: %w", p.InfoHash, err)
	}

	s.mu.Lock()
	switch {
	case s.closed:
		s.mu.Unlock()
		return nil, fmt.Errorf("torrent %s: %w", p.InfoHash, ErrClosed)
	case s.torrents[t.infohash] != nil:
		s.mu.Unlock()
		return nil, fmt.Errorf("torrent %s: %w", p.InfoHash, ErrExists)
	}
	s.torrents[t.infohash] = t // before the library has it, so that its callbacks find it
	s.mu.Unlock()

	t.lib, _ = s.lib.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash:  t.infohash,
		InfoBytes: p.MetaInfo.InfoBytes,
		Storage:   pieceStorage{t},
		ChunkSize: chunkSize,
		// Completion is always known; were it not, this would keep the library from reading the whole layer.
		DisableInitialPieceCheck: true,
	})
	if t.lib.Info() == nil { // the library refused the dictionary; it does not say why
		t.lib.Drop()
		s.forget(t)
		close(t.stopped) // for a Close that came meanwhile
		close(t.ready)
		return nil, fmt.Errorf("torrent %s: its info dictionary is malformed", p.InfoHash)
	}
	close(t.ready)
	go t.run()
	return t, nil
}

// Close leaves all swarms: trackers are told, connections closed, and what was started is waited for; at most 10 s, should a Storage
// hang. The Storages are no longer used when it returned nil. It can be called more than once.
func (s *Swarm) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	torrents := make([]*Torrent, 0, len(s.torrents))
	for _, t := range s.torrents {
		torrents = append(torrents, t)
	}
	s.mu.Unlock()
	if first {
		s.cancel()
		go s.shutdown(torrents)
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	var err error
	select {
	case <-s.done:
	case <-ctx.Done():
		err = fmt.Errorf("the open swarm did not close in %v: a storage or the network does not answer", closeTimeout)
	}
	s.ln.Close()
	return err
}

func (s *Swarm) shutdown(torrents []*Torrent) {
	defer close(s.done)
	var wg sync.WaitGroup
	for _, t := range torrents {
		wg.Go(t.quit)
	}
	wg.Wait()
	s.lib.Close()
	if s.dht != nil {
		s.dht.close()
	}
	for _, c := range s.openConns() {
		c.Close()
	}
	s.wg.Wait()
	s.http.CloseIdleConnections()
}

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

// share is a torrent's part of the buffer, in bytes.
func (s *Swarm) share() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.o.Buffer / int64(max(1, s.busy))
}

// setBusy counts the torrents that have wishes.
func (s *Swarm) setBusy(by int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.busy += by
}

// public tells whether a torrent may be talked of beyond its trackers and peers.
func (s *Swarm) public(t *Torrent) bool { return s.o.Public && !t.private }

// onPeer is called by the library, under its lock, when a connection has joined a torrent.
func (s *Swarm) onPeer(pc *torrent.PeerConn) {
	t := s.torrent(pc.Torrent().InfoHash())
	if t == nil {
		return
	}
	pc.LocalLtepProtocolMap = &privateExtensions
	if s.public(t) {
		pc.LocalLtepProtocolMap = &publicExtensions
	}
	t.wake()
}

// onPeerGone is called by the library, under its lock, when a connection ended.
func (s *Swarm) onPeerGone(pc *torrent.PeerConn) {
	lib := pc.Torrent()
	if lib == nil { // it never joined one: the handshake failed
		return
	}
	if t := s.torrent(lib.InfoHash()); t != nil {
		t.wake()
	}
}

// onData is called by the library, under its lock, for each chunk that was of use, before it is written.
func (s *Swarm) onData(e torrent.ReceivedUsefulDataEvent) {
	if t := s.torrent(e.Peer.Torrent().InfoHash()); t != nil {
		t.received(e.Peer.RemoteAddr.String(), int64(len(e.Message.Piece)))
	}
}
