package swarm

import (
	"context"
	"log/slog"
	"time"

	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/anacrolix/torrent/storage"
	"golang.org/x/time/rate"
)

const (
	// dialTimeout bounds TCP connect plus TLS handshake. Nodes of a cluster are near; with the library's 20 s a dead peer would
	// hold one of the half-open places for as long.
	dialTimeout = 5 * time.Second

	// protocolTimeout bounds the BitTorrent handshake (one round trip, after TLS); the library's default.
	protocolTimeout = 4 * time.Second

	// retryPeers is how often an incomplete torrent tries its missing peers: dials are one-shot in the library, and a peer
	// refuses a torrent that it does not know yet. Each pause is between 3/4 and 5/4 of this, so that nodes started together do
	// not keep dialling each other at the same moment.
	retryPeers = time.Second

	// retryKeep is how many tries in a row are retryPeers apart: in the first seconds of a flash crowd a peer may not have the
	// torrent yet. Then each pause is twice the one before, up to retryMost, until the peer is connected: an address at which
	// nobody answers, or a stranger that somebody advertised, gets two packets a minute from a node and not sixty.
	retryKeep = 3
	retryMost = 30 * time.Second

	// maxPeers bounds the addresses that one torrent keeps; a new one takes the place of the one that failed most often.
	maxPeers = 256

	// maxNodes bounds the addresses of which is remembered who answered; it is learnt again by dialling.
	maxNodes = 1 << 14

	// lostPause is how long a torrent waits after it cut its connections for pieces that are gone, until it dials anew: the library lets go
	// of a connection only when its goroutine has ended. A torrent that was complete waits as long before it cuts them, since pieces go
	// many at a time, and often come back at once.
	lostPause = 100 * time.Millisecond
)

// libraryConfig is the configuration of the torrent library. Each line that leaves its default has its reason.
func (s *Swarm) libraryConfig(o Options) *torrent.ClientConfig {
	c := torrent.NewDefaultClientConfig()

	// Peers come from the caller and connections from our TLS listener and dialer; everything by which the
	// library would talk to anyone else is off. (These also stop it from opening any socket of its own.)
	c.DisableTCP = true
	c.DisableUTP = true
	c.NoDHT = true
	c.DisableTrackers = true
	c.NoDefaultPortForwarding = true
	c.DisableWebtorrent = true
	c.DisableWebseeds = true // the origin is the caller's; the library's web seed ignores Retry-After and over-fetches
	c.DisablePEX = true

	// TLS encrypts already. Obfuscation on top costs CPU, and would hide the handshake that conn checks.
	c.HeaderObfuscationPolicy = torrent.HeaderObfuscationPolicy{Preferred: false, RequirePreferred: true}

	// Nothing is uploaded, to nobody: the library keeps all peers choked and does not answer their requests.
	c.NoUpload = true

	// The library's own rule turns connections away while no torrent needs data. A node that has everything would refuse those that want to
	// know.
	c.AlwaysWantConns = true

	// Two nodes that dial each other at once keep one connection, the same one on both sides.
	c.DropDuplicatePeerIds = true

	// Not limited: the default of 10 dials a second would take half a minute for 30 layers and 10 peers. The
	// library's bound on half-open connections (25 per torrent, 100 in all) remains.
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 0)
	if n := o.ConnectionsPerTorrent; n > 0 {
		c.EstablishedConnsPerTorrent = n
		c.HalfOpenConnsPerTorrent = min(c.HalfOpenConnsPerTorrent, n)
	}
	c.NominalDialTimeout = dialTimeout
	c.HandshakesTimeout = protocolTimeout

	// No extensions. By the fast one (BEP 6) nodes would allow each other requests of some pieces, and then reject them; the extended
	// handshake (BEP 10) is for metadata, which every node makes itself, and for the queues of requests.
	c.Extensions = pp.NewPeerExtensionBytes()
	c.PeerID = string(s.self[:])

	// Without one the library would open a piece database in the working directory.
	c.DefaultStorage = noStorage{}

	c.Slogger = slog.New(quietHandler{s.log.Handler()})
	c.Callbacks.PeerConnAdded = append(c.Callbacks.PeerConnAdded, onPeer)
	return c
}

// noStorage refuses torrents that bring no storage of their own; there are none.
type noStorage struct{ storage.ClientImpl }

// quietHandler hands the library's warnings and errors on at level Debug, and drops the rest: what matters to a user
// is said by this package, and the library calls ordinary events, such as a peer that hangs up, errors.
type quietHandler struct{ next slog.Handler }

func (h quietHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && h.next.Enabled(ctx, slog.LevelDebug)
}

func (h quietHandler) Handle(ctx context.Context, r slog.Record) error {
	if !h.Enabled(ctx, r.Level) { // the library does not always ask first
		return nil
	}
	r.Level = slog.LevelDebug
	return h.next.Handle(ctx, r)
}

func (h quietHandler) WithAttrs(a []slog.Attr) slog.Handler { return quietHandler{h.next.WithAttrs(a)} }
func (h quietHandler) WithGroup(n string) slog.Handler      { return quietHandler{h.next.WithGroup(n)} }
