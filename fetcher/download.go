package fetcher

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/swarm"
)

// State is where the fetch of a blob stands.
type State string

// The states of a fetch and how they follow each other:
//
//	waiting → fetching → verifying → complete
//	               ↑         │ mismatch: suspect pieces are dropped
//	               └─────────┘
//	any of the first three → failed; failed → fetching by a new handle
const (
	Waiting   State = "waiting"
	Fetching  State = "fetching"
	Verifying State = "verifying"
	Complete  State = "complete"
	Failed    State = "failed"
)

// follows is the transition table above.
var follows = map[State][]State{
	Waiting:   {Fetching, Verifying, Complete, Failed},
	Fetching:  {Verifying, Complete, Failed, Waiting},
	Verifying: {Complete, Fetching, Failed, Waiting},
	Failed:    {Fetching, Waiting},
	Complete:  {},
}

// download is the shared state of one blob in this process: what its handles,
// the scheduler and the swarm work on.
type download struct {
	f       *Fetcher
	log     *slog.Logger
	desc    ocispec.Descriptor
	st      *store.Blob
	noPeers bool
	pieces  int
	segs    int

	up, down         *rate.Limiter // of this blob; nil: no limit
	upRate, downRate meter

	ctx    context.Context // ends with the download
	cancel context.CancelFunc
	wg     sync.WaitGroup // everything that works on the download

	kick chan struct{} // capacity 1: something the scheduler may act on

	fromOrigin, fromPeers, fromCache atomic.Int64 // bytes
	readUp                           atomic.Int64 // bytes given to peers by ranged reads
	lastPiece                        moment       // when the last one arrived
	lastPeerPiece                    moment
	begun                            moment       // when the run began
	waiters                          atomic.Int32 // who waits for all of the blob
	heldBack                         atomic.Int64 // how long the background fetch was put off, nanoseconds

	mu       sync.Mutex // guards following
	refs     int
	stopped  bool
	state    State
	err      error         // why it failed
	done     chan struct{} // closed when complete or failed; made anew by a restart
	run      *run          // nil while nothing is fetched
	note     string
	name     string // of an image it belongs to, for messages
	touched  time.Time
	announce bool // an announcement is under way
	again    bool // and another one is due after it

	origin      Origin
	originErr   error     // the last error of origin
	originRetry time.Time // when it may be asked again; zero with originErr set: never
	originFails int
	noRange     bool // the registry answers 200 to ranges
	workers     int  // registry streams of the bulk fetch

	claims    map[int]bool            // segments being fetched from the registry
	leases    map[int]lease           // segments this node was lent
	eaten     meal                    // for hungry
	keeper    keeper                  // what the blob's keeper said last
	flights   map[int]*flight         // pieces being fetched because somebody waits
	parts     map[string]*participant // members that take part, by node ID
	supplier  map[int]supplier        // who gave a piece of the current attempt
	banned    map[string]bool         // node IDs
	bannedFor map[string]BanReason    // why
	suspects  []string                // node IDs whose pieces another peer had otherwise
	doubts    map[string]time.Time    // node IDs that do not deliver, and since when
	table     *table                  // what members say the pieces contain
	wanted    map[int]wish            // pieces asked of peers
	helpers   map[string]*helper      // peers that bulk reads are asked of, by node ID
	expects   bool                    // of peers, see expect
	distrust  time.Time               // until then peers are not counted on; zero: they are
	available []uint16                // how many connected peers have each piece, a tick ago
	believed  string                  // node ID of the peer that was believed last
	attempts  int                     // digest mismatches so far
	joined    bool
	tor       *swarm.Torrent

	opens     []*openSource // open swarms
	openSince time.Time     // when the last was entered, or searched for
	seeking   int           // searches for torrents under way
	wrongMeta int           // torrents that were not of this blob
	byOpen    bool          // a piece of the current attempt came by one
}

// supplier names who gave a piece: a node ID, or "" when that is not known.
type supplier = string

// run is one activity of the scheduler, from Fetch to the end or a failure.
type run struct {
	ctx    context.Context
	cancel context.CancelFunc
}

func newDownload(f *Fetcher, desc ocispec.Descriptor, st *store.Blob) *download {
	d := &download{
		f: f, desc: desc, st: st,
		log:      f.log.With("blob", desc.Digest),
		noPeers:  f.cluster == nil,
		pieces:   st.Pieces(),
		segs:     cluster.Segments(desc.Size),
		kick:     make(chan struct{}, 1),
		refs:     1,
		state:    Waiting,
		done:     make(chan struct{}),
		touched:  time.Now(),
		claims:   map[int]bool{},
		leases:   map[int]lease{},
		doubts:   map[string]time.Time{},
		flights:  map[int]*flight{},
		parts:    map[string]*participant{},
		supplier: map[int]supplier{},
		banned:   map[string]bool{},
		up:       limiter(f.o.UploadRatePerBlob),
		down:     limiter(f.o.DownloadRatePerBlob),

		bannedFor: map[string]BanReason{},
		wanted:    map[int]wish{},
		helpers:   map[string]*helper{},
	}
	d.table = newTable(d)
	d.ctx, d.cancel = context.WithCancel(f.ctx)
	d.fromCache.Store(st.Have())
	if st.Complete() {
		d.state = Complete
		close(d.done)
	}
	return d
}

func (d *download) setState(s State) {
	if d.state == s {
		return
	}
	for _, t := range follows[d.state] {
		if t == s {
			d.state = s
			return
		}
	}
	panic(fmt.Sprintf("fetcher: %s: %s cannot follow %s", d.desc.Digest, s, d.state))
}

// retain takes a reference; false when the download has stopped.
func (d *download) retain() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return false
	}
	d.refs++
	d.touched = time.Now()
	return true
}

// release drops a reference. Without any, a fetch stops where it is, and only a
// complete blob that is in the swarm stays.
func (d *download) release() {
	d.mu.Lock()
	d.refs--
	d.touched = time.Now()
	used := d.refs > 0
	keep := used || d.tor != nil && d.state == Complete && !d.f.o.NoSeed
	d.mu.Unlock()
	if !used {
		d.leaveOpen()
	}
	if !keep {
		d.stopIfIdle(0)
	}
}

func (d *download) dead() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stopped
}

func (d *download) idleFor() time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refs > 0 || d.stopped {
		return 0
	}
	return time.Since(d.touched)
}

// stopIfIdle stops the download when nobody has used it for at least the given
// time.
func (d *download) stopIfIdle(idle time.Duration) {
	d.mu.Lock()
	if d.stopped || d.refs > 0 || time.Since(d.touched) < idle {
		d.mu.Unlock()
		return
	}
	d.stopped = true
	d.mu.Unlock()
	d.shut()
}

// stop ends the download whoever holds it; for Fetcher.Close.
func (d *download) stop() {
	d.mu.Lock()
	if d.stopped {
		d.mu.Unlock()
		return
	}
	d.stopped = true
	d.mu.Unlock()
	d.shut()
}

// shut releases what the download holds. Its pieces stay on disk.
func (d *download) shut() {
	d.mu.Lock()
	d.run = nil
	if d.state != Complete && d.state != Failed {
		d.err = ErrClosed
		d.setState(Failed)
		close(d.done)
	}
	tor := d.tor
	d.tor = nil
	d.mu.Unlock()
	d.cancel()
	d.wg.Wait()
	if tor != nil {
		tor.Drop()
	}
	d.leaveOpen()
	d.f.forget(d)
	if err := d.st.Close(); err != nil {
		d.log.Warn("closing a blob", "err", err)
	}
}

// offer gives the download a registry to ask (nil: none) and clears what an
// earlier one refused.
func (d *download) offer(ref reference.Named, o Origin) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ref != nil {
		d.name = ref.String()
	}
	if o != nil {
		d.origin, d.originErr, d.originRetry, d.originFails = o, nil, time.Time{}, 0
	}
	if d.state == Failed && !d.stopped {
		d.err, d.attempts, d.suspects, d.believed = nil, 0, nil, ""
		d.done = make(chan struct{})
		d.setState(Waiting)
	}
	d.poke()
}

// poke wakes the scheduler.
func (d *download) poke() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// start begins the background fetch unless it runs or is over.
func (d *download) start() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped || d.run != nil || d.state == Complete || d.state == Failed {
		return
	}
	d.setState(Fetching)
	d.startRun()
}

// startRun sets scheduler and verifier going. Called with d.mu held.
func (d *download) startRun() {
	r := &run{}
	r.ctx, r.cancel = context.WithCancel(d.ctx)
	d.run = r
	now := time.Now()
	d.lastPiece.set(now)
	d.lastPeerPiece.set(now)
	d.begun.set(now)
	d.wg.Go(func() { d.schedule(r) })
	d.wg.Go(func() { d.verify(r) })
}

// fail ends the fetch with err; nil-safe against a fetch that is over already.
func (d *download) fail(r *run, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.run != r || d.state == Complete || d.state == Failed {
		return
	}
	if !errors.Is(err, context.Canceled) {
		d.log.Warn("fetch failed", "err", err)
	}
	d.err = err
	d.setState(Failed)
	d.run = nil
	close(d.done)
	r.cancel()
}

// complete ends the fetch well: the digest was checked.
func (d *download) complete(r *run) {
	d.mu.Lock()
	if d.run != r {
		d.mu.Unlock()
		return
	}
	d.setState(Complete)
	d.note = ""
	d.run = nil
	var came []int
	for i := range d.supplier {
		if d.fromOpen(i) {
			came = append(came, i)
		}
	}
	d.supplier, d.byOpen = map[int]supplier{}, false
	d.claims = map[int]bool{}
	d.leases = map[int]lease{}
	close(d.done)
	d.mu.Unlock()
	d.settleOpen(came)
	d.f.holds(d)
	// The keeper learns it now, and who is new next hears of it.
	d.announceNow(d.ctx)
	r.cancel()
}

func (d *download) torrent() *swarm.Torrent {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.tor
}

// what names the blob for a person.
func (d *download) what() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.whatLocked()
}

func (d *download) whatLocked() string {
	if d.name == "" {
		return "blob " + d.desc.Digest.String()
	}
	return fmt.Sprintf("layer %s of %s", d.desc.Digest, d.name)
}
