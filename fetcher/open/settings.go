package open

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
	// dialTimeout bounds TCP connect. Open peers are often gone or behind NAT; with the library's 20 s each would hold one of the
	// half-open places for as long.
	dialTimeout = 8 * time.Second
	// protocolTimeout bounds the BitTorrent handshake: two or three round trips around the world when the peer obfuscates it.
	protocolTimeout = 6 * time.Second
	// idleTimeout ends a connection on which nothing is heard: peers keep one alive every two minutes (BEP 3).
	idleTimeout = 150 * time.Second

	// torrentConnections bounds the connections of one torrent: the library's default, and what other clients do.
	torrentConnections = 50
	// torrentHalfOpen and totalHalfOpen bound dials in progress, which are what routers at home choke on.
	torrentHalfOpen = 10
	totalHalfOpen   = 40
	// maxReserve bounds the peer addresses that the library keeps of one torrent beside ours.
	maxReserve = 100

	// retryStorage is how long a torrent does not download after its storage failed: long enough not to fetch the same
	// bytes in a loop while a disk is full, short enough that freeing space helps at once.
	retryStorage = 5 * time.Second
	// closeTimeout bounds Close when a Storage method does not return (a dead disk).
	closeTimeout = 10 * time.Second

	// peerIDPrefix begins our peer ID, in the way that most clients name themselves (BEP 20). The rest is random: strangers learn nothing
	// by which to know this node again.
	peerIDPrefix = "-QY0100-"
	// agent is what trackers and peers are told we are.
	agent = "docker-quay"
)

// The extensions of BEP 10 that we offer: metadata (BEP 9) so that a magnet link is enough, and peer exchange (BEP 11) in public swarms
// only. Not hole punching, which has nodes dial on a peer's word.
var (
	privateExtensions = extensions(pp.ExtensionNameMetadata)
	publicExtensions  = extensions(pp.ExtensionNameMetadata, pp.ExtensionNamePex)
)

func extensions(names ...pp.ExtensionName) torrent.LocalLtepProtocolMap {
	return torrent.LocalLtepProtocolMap{Index: names, NumBuiltin: len(names)}
}

// libraryConfig is the configuration of the torrent library. Each line that leaves its default has its reason.
func (s *Swarm) libraryConfig() *torrent.ClientConfig {
	c := torrent.NewDefaultClientConfig()

	// Connections come from our listener and dialer, which count and bound them; DHT and trackers are ours, too. (These also
	// stop the library from opening any socket of its own.)
	c.DisableTCP = true
	c.DisableUTP = true
	c.NoDHT = true
	c.PeriodicallyAnnounceTorrentsToDht = false
	c.DisableTrackers = true // see the package comment
	c.NoDefaultPortForwarding = true
	c.DisableWebtorrent = true
	c.DisableWebseeds = true // see the package comment

	c.DisablePEX = !s.o.Public
	if s.o.Public && !s.o.noLocalDiscovery {
		c.LocalServiceDiscovery = &torrent.LocalServiceDiscoveryConfig{}
	}

	// Plain first: the bytes are public. Peers that insist on obfuscation get it.
	c.HeaderObfuscationPolicy = torrent.HeaderObfuscationPolicy{Preferred: false, RequirePreferred: false}

	// Off: what is not checked yet is bounded by our buffers, and the library's own bound makes cold peers stall that wait for each
	// other's pieces.
	c.MaxUnverifiedBytes = 0

	// Upload whether or not the other side gives anything back. Not seeding is NoUpload: with Seed off alone the library would still
	// upload in exchange while it downloads.
	c.Seed = s.o.Seed
	c.NoUpload = !s.o.Seed

	c.DropDuplicatePeerIds = true
	// A complete node that keeps a complete peer's connection holds a place that a downloader could have.
	c.DropMutuallyCompletePeers = true

	c.EstablishedConnsPerTorrent = min(torrentConnections, s.o.MaxConnections)
	c.HalfOpenConnsPerTorrent = torrentHalfOpen
	c.TotalHalfOpenConns = totalHalfOpen
	c.TorrentPeersHighWater = maxReserve
	c.NominalDialTimeout = dialTimeout
	c.HandshakesTimeout = protocolTimeout
	// Strangers that fail handshakes or ask for torrents that are not here are slowed down.
	c.DisableAcceptRateLimiting = s.loopback

	c.Extensions = pp.NewPeerExtensionBytes(pp.ExtensionBitFast, pp.ExtensionBitLtep)
	c.ExtendedHandshakeClientVersion = agent
	c.Bep20 = peerIDPrefix

	// Without one the library would open a piece database in the working directory.
	c.DefaultStorage = noStorage{}

	// The download limit is applied by conn instead: given to the library, it stops dialling while the limit is reached.
	c.DownloadRateLimiter = nil
	if up := s.o.UploadLimit; up != nil {
		// A request larger than the burst would be refused for ever.
		if up.Burst() < chunkSize {
			up.SetBurst(chunkSize)
		}
		c.UploadRateLimiter = up
	}
	// The default of 10 dials a second is right for strangers; this is the same, said here.
	c.DialRateLimiter = rate.NewLimiter(10, 10)

	c.Slogger = slog.New(quietHandler{s.log.Handler()})
	c.Callbacks.PeerConnAdded = append(c.Callbacks.PeerConnAdded, s.onPeer)
	c.Callbacks.PeerConnClosed = s.onPeerGone
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
