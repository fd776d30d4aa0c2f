package fetcher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/gossip"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/swarm"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// Version is the version of this build, set by the linker.
var Version = "dev"

// Errors that callers ask about with errors.Is. Those of the registry are in
// package origin, those of the store in package store.
var (
	// ErrMismatch: the bytes are not those of the digest, from any source.
	ErrMismatch = errors.New("content does not match its digest")
	// ErrNoSource: the registry may not be asked and no peer has what is missing.
	ErrNoSource = errors.New("no peer has it")
	// ErrClosed: the fetcher or the blob was closed.
	ErrClosed = errors.New("closed")
)

const (
	// originStreams bounds the registry connections of bulk fetches in this
	// process. A registry behind a 10 ms round trip fills 1 Gbit/s with two;
	// more serve several layers at once.
	originStreams = 6
	// burst is the size of the token bucket of both rate limits, in bytes: one
	// BitTorrent chunk must fit, and a second's worth would defeat a low limit.
	burst = 256 << 10
	// defaultPort is the port of a peer that is named without one: the first of
	// those that nodes listen on.
	defaultPort = 6881
	// idleSeed is how long a blob that nobody here uses stays in the swarm
	// after the last sign of another node's interest.
	idleSeed = 10 * time.Minute
	// maxIdleSeeds bounds how many such blobs there are; the longest idle goes.
	maxIdleSeeds = 4096
)

// Options configures a Fetcher. Only Store is required.
type Options struct {
	Store *store.Store
	// Secret is the cluster's. Without one there are no peers: no port is
	// opened, and every byte comes from the registry or the store.
	Secret *trust.Secret
	// Listen is the address (without port) of the one port that other nodes
	// reach this one at; "" is every address. Ports is the range it is taken
	// from; the zero range lets the kernel choose.
	Listen string
	Ports  trust.PortRange
	// Advertise is the address others reach this node at, when that is not the
	// one its connections come from (NAT). The zero value means they see it.
	Advertise netip.AddrPort
	// Peers are host:port addresses of other nodes; one is enough to find all. A DNS
	// name stands for all its addresses.
	Peers []string
	// LocalDiscovery finds nodes of the cluster on the networks this one is on.
	LocalDiscovery bool
	// Zone is where this node stands, in any words: others of the same zone are
	// asked first.
	Zone string
	// Ephemeral is for a process that comes and goes: others entrust nothing to it.
	Ephemeral bool
	// UploadRate and DownloadRate limit the traffic in bytes a second, with
	// peers in both directions and from the registry; 0 is no limit.
	UploadRate, DownloadRate int64
	// UploadRatePerBlob and DownloadRatePerBlob limit those of each blob.
	UploadRatePerBlob, DownloadRatePerBlob int64
	// Connections bounds the connections with other nodes, 0: 4096;
	// ConnectionsPerBlob those of BitTorrent for one blob, 0: 50. Those of membership,
	// which last for milliseconds, are not counted.
	Connections, ConnectionsPerBlob int
	// Reach says whether registries are asked by this node or through members.
	Reach Reach
	// Behalf says how registries are asked for members that cannot: host folders,
	// user agent, own registries. Credentials come from who asks. nil: they are not.
	Behalf *origin.Options
	// Open is this node's part in open BitTorrent swarms, beside that of the cluster and without its secret; nil is none.
	Open *OpenOptions
	// NoSeed gives nothing to other nodes, not even while fetching.
	NoSeed bool
	Log    *slog.Logger
}

// Origin is where a blob can be had in ranges: an *origin.Repository.
type Origin interface {
	Open(ctx context.Context, desc ocispec.Descriptor, off, n int64) (*origin.Stream, error)
}

// Fetcher fetches blobs into one store. It is safe for concurrent use.
type Fetcher struct {
	o          Options
	log        *slog.Logger
	ctx        context.Context // ends with Close
	cancel     context.CancelFunc
	wg         sync.WaitGroup
	streams    chan struct{} // bounds bulk registry connections
	up, down   *rate.Limiter // nil: no limit
	demand     atomic.Int32  // demand reads under way in this process
	lastDemand moment        // when the last one ended
	rows       atomic.Int64  // bulk reads under way
	mostRows   int           // how many there may be
	delays     delays        // of ranged reads from peers
	patience   patience      // what registries asked of the cluster
	count      counts        // for Stats

	away          unreached    // registries this node could not reach
	awayForOthers unreached    // registries it could not reach for members
	kept          atomic.Int64 // bytes of manifests kept because members asked

	// nil without a secret
	id       *trust.Identity
	listener *trust.Listener
	gossip   *gossip.Gossip
	cluster  *cluster.Cluster
	swarm    *swarm.Swarm
	http     *http.Server
	inbound  *inbound

	mu        sync.Mutex // guards following
	closed    bool
	downloads map[digest.Digest]*download
	hashes    map[metainfo.Hash]cluster.Hold // complete blobs by infohash
	errands   map[errandKey]*errand
	index     IndexFunc // nil: members are told nothing of what is in blobs

	opens openSwarms
}

// New starts a fetcher. With a secret it opens the node's port and says hello to
// the peers; it does not wait for them.
func New(ctx context.Context, o Options) (_ *Fetcher, err error) {
	if o.Store == nil {
		return nil, errors.New("fetcher: no store")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := o.checkLimits(); err != nil {
		return nil, err
	}
	if o.Secret == nil && len(o.Peers) > 0 {
		return nil, errors.New("peers are reached with the cluster's secret only: make one with `docker quay node secret` on one node, copy it to the others and name it with --secret-file")
	}
	f := &Fetcher{
		o: o, log: o.Log,
		streams:   make(chan struct{}, originStreams),
		up:        limiter(o.UploadRate),
		down:      limiter(o.DownloadRate),
		downloads: map[digest.Digest]*download{},
		hashes:    map[metainfo.Hash]cluster.Hold{},
		errands:   map[errandKey]*errand{},
	}
	f.ctx, f.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if o.Secret != nil {
		if err := f.join(); err != nil {
			return nil, err
		}
	}
	f.wg.Go(func() { f.sweep() })
	return f, nil
}

// join opens the node's port and starts membership, swarm and cluster on it.
func (f *Fetcher) join() (err error) {
	if f.id, err = f.o.Secret.Identity(); err != nil {
		return err
	}
	f.listener, err = trust.Listen(f.o.Listen, f.o.Ports, f.id)
	if err != nil {
		return err
	}
	f.gossip, err = gossip.Start(f.ctx, gossip.Options{
		Identity: f.id, Key: f.o.Secret.GossipKey(),
		Streams: f.listener.Gossip(), Packets: f.listener.Packets(),
		Advertise: f.o.Advertise, Peers: f.o.Peers, DefaultPort: defaultPort, LocalDiscovery: f.o.LocalDiscovery,
		Self:      gossip.Node{Zone: f.o.Zone, Ephemeral: f.o.Ephemeral, Origin: f.o.Reach != ThroughMembers && f.o.Behalf != nil},
		OnMessage: f.told, Log: f.log,
	})
	if err != nil {
		return err
	}
	forSwarm, in, out := f.o.places()
	f.swarm, err = swarm.New(swarm.Options{
		ID: f.id, Listener: f.listener.Swarm(), Unknown: f.connects,
		Connections: forSwarm, ConnectionsPerTorrent: f.o.perBlob(), Log: f.log,
	})
	if err != nil {
		return err
	}
	f.mostRows = min(rowsPerNode, max(out/2, 1))
	f.cluster = cluster.New(cluster.Options{
		Membership: f.gossip, PeerID: trust.PeerID, Client: f.id.Client(trust.ProtoHTTP1),
		Holder: holder{f}, Errands: behalf{f}, Body: f.limitedBody, Connections: out, Log: f.log,
	})
	f.inbound = newInbound(f.listener.HTTP(), in)
	f.http = &http.Server{
		Handler:           f.cluster.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ConnState:         f.inbound.state,
		ErrorLog:          slog.NewLogLogger(f.log.Handler(), slog.LevelDebug),
	}
	f.wg.Go(func() { _ = f.http.Serve(f.inbound) })
	return nil
}

func limiter(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), burst)
}

// Close ends every fetch, leaves the swarm and waits for what runs. The store
// stays open: it is the caller's.
func (f *Fetcher) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	all := make([]*download, 0, len(f.downloads))
	for _, d := range f.downloads {
		all = append(all, d)
	}
	f.mu.Unlock()
	f.cancel()
	if f.cluster != nil {
		f.cluster.Close()
	}
	if f.gossip != nil {
		_ = f.gossip.Close()
	}
	if f.http != nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if f.http.Shutdown(ctx) != nil {
			_ = f.http.Close()
		}
		cancel()
	}
	for _, d := range all {
		d.stop()
	}
	if f.swarm != nil {
		f.swarm.Close()
	}
	f.closeOpenSwarms()
	if f.listener != nil {
		_ = f.listener.Close()
	}
	f.wg.Wait()
	return nil
}

// Addr is the address and port this node is reached at by others; the zero value
// without a secret.
func (f *Fetcher) Addr() netip.AddrPort {
	if f.listener == nil {
		return netip.AddrPort{}
	}
	return f.listener.Addr()
}

// NodeID is this process's node ID; "" without a secret.
func (f *Fetcher) NodeID() string {
	if f.cluster == nil {
		return ""
	}
	return f.cluster.ID()
}

// Members are the other nodes that answer now.
func (f *Fetcher) Members() []cluster.Member {
	if f.cluster == nil {
		return nil
	}
	return f.cluster.Members()
}

// Store is the store the fetcher fills.
func (f *Fetcher) Store() *store.Store { return f.o.Store }

// BlobOptions says where a blob may come from.
type BlobOptions struct {
	// Origin is the registry; nil for peers only.
	Origin Origin
	// Needed says that a container cannot go on without it: the store's quota does not refuse it.
	Needed bool
}

// Blob returns a handle on a blob. It starts nothing: Fetch, Reader, ReadAt and
// Wait do. All handles of a digest share one fetch; an Origin given by a later
// one serves the earlier ones too. ref names the image in errors and may be nil.
//
// It waits, bounded by ctx, when another process is fetching the same blob into
// the same store.
func (f *Fetcher) Blob(ctx context.Context, ref reference.Named, desc ocispec.Descriptor, o BlobOptions) (*Blob, error) {
	d, err := f.download(ctx, desc, o.Needed)
	if err != nil {
		return nil, err
	}
	f.count.fromCache.Add(d.st.Have())
	d.offer(ref, o.Origin)
	return &Blob{d: d, desc: desc}, nil
}

// download returns the shared state of a blob with one more reference.
func (f *Fetcher) download(ctx context.Context, desc ocispec.Descriptor, needed bool) (*download, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("digest %q of a blob: %w", desc.Digest, err)
	}
	for {
		f.mu.Lock()
		if f.closed {
			f.mu.Unlock()
			return nil, ErrClosed
		}
		if d := f.downloads[desc.Digest]; d != nil && d.retain() {
			f.mu.Unlock()
			if d.st.Size() != desc.Size {
				d.release()
				return nil, fmt.Errorf("%s has %d bytes, not the %d that its descriptor says: %w", desc.Digest, d.st.Size(), desc.Size, ErrMismatch)
			}
			return d, nil
		}
		f.mu.Unlock()
		// Opening may wait for another process: not under the lock.
		open := f.o.Store.Blob
		if needed {
			open = f.o.Store.Need
		}
		st, err := open(ctx, desc.Digest, desc.Size)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
		d := newDownload(f, desc, st)
		f.mu.Lock()
		if other := f.downloads[desc.Digest]; f.closed || other != nil && !other.dead() {
			f.mu.Unlock()
			d.stop()
			continue
		}
		f.downloads[desc.Digest] = d
		f.mu.Unlock()
		return d, nil
	}
}

// forget drops a download that has stopped.
func (f *Fetcher) forget(d *download) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.downloads[d.desc.Digest] == d {
		delete(f.downloads, d.desc.Digest)
	}
}

// sweep stops seeds that nobody has asked for in a while.
func (f *Fetcher) sweep() {
	t := time.NewTicker(idleSeed / 10)
	defer t.Stop()
	for {
		select {
		case <-f.ctx.Done():
			return
		case <-t.C:
		}
		f.mu.Lock()
		var idle []*download
		for _, d := range f.downloads {
			if d.idleFor() > idleSeed {
				idle = append(idle, d)
			}
		}
		f.mu.Unlock()
		for _, d := range idle {
			d.stopIfIdle(idleSeed)
		}
	}
}

// demanded notes a demand read; the function it returns notes its end.
func (f *Fetcher) demanded() (done func()) {
	f.demand.Add(1)
	return func() {
		f.lastDemand.set(time.Now())
		f.demand.Add(-1)
	}
}

// hot reports whether somebody waits for a demand read, or has done so within
// the last quiet.
func (f *Fetcher) hot(quiet time.Duration) bool {
	return f.demand.Load() > 0 || quiet > 0 && f.lastDemand.before(time.Now()) < quiet
}

// yield waits while demand reads have the word, for at most limit.
func (f *Fetcher) yield(ctx context.Context, quiet, limit time.Duration) {
	if !f.hot(quiet) {
		return
	}
	const step = 5 * time.Millisecond
	t := time.NewTimer(step)
	defer t.Stop()
	for ; limit > 0 && f.hot(quiet); limit -= step {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			t.Reset(step)
		}
	}
}
