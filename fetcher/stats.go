package fetcher

import (
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/store"
)

// BanReason says why a peer is not asked for a blob any more.
type BanReason string

// The reasons, all of them proven but Disputed.
const (
	// WrongBytes: what it sent is not what the digest, or the registry, says.
	WrongBytes BanReason = "wrong-bytes"
	// FalseTable: what it signed that pieces contain is not what they do.
	FalseTable BanReason = "false-table"
	// Disputed: pieces of its own differ again and again from what another member
	// signed, and no registry can tell who of the two is right.
	Disputed BanReason = "disputed"
)

// banReasons are all of them, in the order of counts.bans.
var banReasons = [...]BanReason{WrongBytes, FalseTable, Disputed}

// DemandBuckets are the upper bounds of Histogram.Buckets in seconds: from a read
// on loopback to one that several deadlines have passed for.
var DemandBuckets = [...]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// Histogram counts durations.
type Histogram struct {
	// Buckets[i] counts those of at most DemandBuckets[i] seconds, those in the
	// buckets before it included.
	Buckets [len(DemandBuckets)]uint64
	Count   uint64
	// Sum is in seconds.
	Sum float64
}

// Stats is what a fetcher does now and has done since it was made. Nothing in it
// grows with the number of blobs or members.
type Stats struct {
	// Members is the number of other live nodes, Swarms that of the blobs this node
	// shares or fetches, Fetches that of the blobs it fetches, Kept that of the
	// blobs whose list it keeps as their keeper.
	Members, Swarms, Fetches, Kept int
	// Connections with other nodes: of BitTorrent, of HTTP by others, and of HTTP
	// to others. Those of membership, which last for milliseconds, are not counted.
	SwarmConnections, ConnectionsIn, ConnectionsOut int
	// FromOrigin and FromPeers are bytes of pieces that were fetched, FromCache
	// those that were here already when somebody asked for a blob.
	FromOrigin, FromPeers, FromCache int64
	// Uploaded is bytes given to other nodes.
	Uploaded int64
	// Leases is how many segments are lent to this node now; LeaseRequests how
	// often it asked for some, Leased how many it got in all.
	Leases                int
	LeaseRequests, Leased int64
	// DemandPeers and DemandOrigin are the reads that somebody waited for, by
	// where the bytes came from; DemandFailed counts those that failed.
	DemandPeers, DemandOrigin Histogram
	DemandFailed              int64
	// Hedges counts the reads for which a second source was asked, since the first
	// took too long.
	Hedges int64
	// WrongPieces counts pieces from peers that were not what they should be; Bans
	// how often a peer was banned from a blob for that.
	WrongPieces int64
	Bans        map[BanReason]int64
	// ControlSent and ControlReceived are bytes of messages between members, which
	// are no part of blobs. Those of membership are not counted.
	ControlSent, ControlReceived int64
	// RegistryPauses counts how often a registry asked this node, or another one,
	// for patience; RegistriesPaused is how many are being left alone now.
	RegistryPauses   int64
	RegistriesPaused int
}

// counts are the sums behind Stats. The zero value is ready.
type counts struct {
	fromOrigin, fromPeers, fromCache atomic.Int64
	uploaded                         atomic.Int64
	asked, lent                      atomic.Int64
	demandPeers, demandOrigin        histogram
	demandFailed                     atomic.Int64
	hedges, wrong                    atomic.Int64
	bans                             [len(banReasons)]atomic.Int64
}

// arrived counts a piece.
func (c *counts) arrived(src store.Source, n int) {
	if src == store.Peer {
		c.fromPeers.Add(int64(n))
	} else {
		c.fromOrigin.Add(int64(n))
	}
}

// demanded counts a read that somebody waited for.
func (c *counts) demanded(src store.Source, took time.Duration, err error) {
	switch {
	case err != nil:
		c.demandFailed.Add(1)
	case src == store.Peer:
		c.demandPeers.add(took)
	default:
		c.demandOrigin.add(took)
	}
}

func (c *counts) banned(why BanReason) {
	for i, r := range banReasons {
		if r == why {
			c.bans[i].Add(1)
		}
	}
}

type histogram struct {
	mu sync.Mutex // guards following
	h  Histogram
}

func (h *histogram) add(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := d.Seconds()
	for i := len(DemandBuckets) - 1; i >= 0 && s <= DemandBuckets[i]; i-- {
		h.h.Buckets[i]++
	}
	h.h.Count++
	h.h.Sum += s
}

func (h *histogram) get() Histogram {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.h
}

// Stats takes a snapshot.
func (f *Fetcher) Stats() Stats {
	c := &f.count
	s := Stats{
		FromOrigin: c.fromOrigin.Load(), FromPeers: c.fromPeers.Load(), FromCache: c.fromCache.Load(),
		Uploaded: c.uploaded.Load(), LeaseRequests: c.asked.Load(), Leased: c.lent.Load(),
		DemandPeers: c.demandPeers.get(), DemandOrigin: c.demandOrigin.get(), DemandFailed: c.demandFailed.Load(),
		Hedges: c.hedges.Load(), WrongPieces: c.wrong.Load(), Bans: make(map[BanReason]int64, len(banReasons)),
	}
	for i, r := range banReasons {
		s.Bans[r] = c.bans[i].Load()
	}
	s.RegistryPauses, s.RegistriesPaused = f.patience.counts()
	for _, d := range f.all() {
		d.mu.Lock()
		s.Leases += len(d.leases)
		if d.run != nil {
			s.Fetches++
		}
		d.mu.Unlock()
	}
	if f.cluster != nil {
		s.Members = len(f.Members())
		s.Kept = f.cluster.Blobs()
		s.ControlSent, s.ControlReceived = f.cluster.Calls()
		s.ConnectionsOut = f.cluster.Connections()
		s.ConnectionsIn = f.inbound.count()
		s.Swarms, s.SwarmConnections = f.swarm.Torrents(), f.swarm.Connections()
	}
	return s
}

// all returns the downloads of this process.
func (f *Fetcher) all() []*download {
	f.mu.Lock()
	defer f.mu.Unlock()
	ds := make([]*download, 0, len(f.downloads))
	for _, d := range f.downloads {
		ds = append(ds, d)
	}
	return ds
}

// counts returns how often registries asked for patience, and how many wait now.
func (p *patience) counts() (times int64, now int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := time.Now()
	for _, until := range p.until {
		if t.Before(until) {
			now++
		}
	}
	return p.times, now
}

// meterSeconds is over how many seconds a rate is taken.
const meterSeconds = 5

// meter is a rate over the last few whole seconds. The zero value is ready.
type meter struct {
	mu   sync.Mutex // guards following
	at   [meterSeconds + 1]int64
	seen [meterSeconds + 1]int64
}

// add notes n bytes.
func (m *meter) add(now time.Time, n int64) {
	s := now.Unix()
	i := s % int64(len(m.at))
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.at[i] != s {
		m.at[i], m.seen[i] = s, 0
	}
	m.seen[i] += n
}

// rate returns bytes a second over the last meterSeconds, the one that has just
// begun left out.
func (m *meter) rate(now time.Time) int64 {
	s := now.Unix()
	m.mu.Lock()
	defer m.mu.Unlock()
	var sum int64
	for i, at := range m.at {
		if at < s && at >= s-meterSeconds {
			sum += m.seen[i]
		}
	}
	return sum / meterSeconds
}
