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
	// chunkSize is what one request asks for, in bytes. All peers here are nodes of the cluster, so it need not be the 16 KiB
	// that every client accepts: with 128 KiB eight nodes spent a quarter less CPU on the same bytes.
	chunkSize = 128 << 10

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

	// retryStorage is how long a torrent does not download after its storage failed: long enough not to fetch the same
	// bytes in a loop while a disk is full, short enough that freeing space helps at once.
	retryStorage = 5 * time.Second

	// pieceHashers is how many pieces of one torrent are marked side by side.
	pieceHashers = 8

	// closeTimeout bounds Close when a Storage method does not return (a dead disk).
	closeTimeout = 10 * time.Second
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

	// Off. With the default of 64 MiB cold nodes that wait for each other's pieces stall: 256 MiB to 4 and 8 nodes took 17.6–21 s,
	// without it 11.6–12.0 s (bound 10.7 s). Our pieces are marked as soon as they are whole anyway.
	c.MaxUnverifiedBytes = 0

	// A Storage may wait for what a piece is to be checked against; with the default of 2 such pieces would keep others
	// from being marked.
	c.PieceHashersPerTorrent = pieceHashers

	// Upload whether or not the other side gives anything back: a cluster is not a market. Not seeding is NoUpload: with
	// Seed off alone the library would still upload in exchange while it downloads.
	c.Seed = o.Seed
	c.NoUpload = !o.Seed

	// The library's own rule turns connections away while no torrent needs data or has any. A cold node would refuse the
	// seeder that calls on it.
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

	// Only the fast extension (HAVE ALL, reject) and the extended handshake, which negotiates the depth of request queues.
	c.Extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitFast, pp.ExtensionBitLtep)
	c.ExtendedHandshakeClientVersion = "docker-quay"
	c.PeerID = string(s.self[:])

	// Without one the library would open a piece database in the working directory.
	c.DefaultStorage = noStorage{}

	// The download limit is applied by conn instead: given to the library, it stops dialling while the limit is reached.
	c.DownloadRateLimiter = nil
	if o.UploadLimit != nil {
		// A request larger than the burst would be refused for ever.
		if o.UploadLimit.Burst() < chunkSize {
			o.UploadLimit.SetBurst(chunkSize)
		}
		c.UploadRateLimiter = o.UploadLimit
	}

	c.Slogger = slog.New(quietHandler{s.log.Handler()})
	c.Callbacks.PeerConnAdded = append(c.Callbacks.PeerConnAdded, s.onPeer)
	c.Callbacks.SentRequest = append(c.Callbacks.SentRequest, func(e torrent.PeerRequestEvent) { s.requested(e, 1) })
	c.Callbacks.DeletedRequest = append(c.Callbacks.DeletedRequest, func(e torrent.PeerRequestEvent) { s.requested(e, -1) })
	c.Callbacks.ReceivedUsefulData = append(c.Callbacks.ReceivedUsefulData, s.onData)
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
