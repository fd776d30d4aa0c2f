package fetcher

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// maxReportBlobs bounds the blobs of a report that nobody named; the active ones
	// come first.
	maxReportBlobs = 100
	// MaxReportDigests bounds those that somebody names: an image of 512 layers.
	MaxReportDigests = 512
	// maxReportMembers bounds the members in a report, maxReportPeers the banned and
	// doubted ones of a blob.
	maxReportMembers = 1000
	maxReportPeers   = 32
)

// Report is what a node knows of its neighbours and of the blobs it shares. Rates
// are bytes a second over the last five seconds, sizes are bytes.
type Report struct {
	Node NodeReport `json:"node"`
	// Members are the other nodes that answer, by ID; MembersLeft more are not listed.
	Members     []NodeReport `json:"members"`
	MembersLeft int          `json:"members_left,omitempty"`
	// Silent are the configured peers that did not answer when last tried.
	Silent []SilentPeer `json:"silent"`
	// Blobs are those that were asked for, or those that this node fetches, then
	// those that it shares; BlobsLeft more are not listed.
	Blobs     []BlobReport `json:"blobs"`
	BlobsLeft int          `json:"blobs_left,omitempty"`
}

// NodeReport is one node.
type NodeReport struct {
	ID   string `json:"id"`
	Addr string `json:"addr"`
	Zone string `json:"zone,omitempty"`
	// Registry tells that the node asks registries also for others, Passing that it belongs to a
	// process that comes and goes, such as a pull.
	Registry bool `json:"registry"`
	Passing  bool `json:"passing"`
}

// SilentPeer is a configured peer without an answer.
type SilentPeer struct {
	// Peer is as it was configured.
	Peer   string `json:"peer"`
	Reason string `json:"reason"`
	// Foreign tells that it has another cluster secret.
	Foreign bool `json:"foreign,omitempty"`
}

// BlobReport is one blob as this node and its keeper see it.
type BlobReport struct {
	Digest digest.Digest `json:"digest"`
	// Image is one that the blob belongs to; "" when this node was asked by members
	// only.
	Image string `json:"image,omitempty"`
	State State  `json:"state"`
	// Seeding tells that the blob is in the swarm.
	Seeding bool  `json:"seeding"`
	Size    int64 `json:"size"`
	Have    int64 `json:"have"`
	// FromOrigin, FromPeers and Uploaded are since the blob was opened.
	FromOrigin int64 `json:"from_origin"`
	FromPeers  int64 `json:"from_peers"`
	Uploaded   int64 `json:"uploaded"`
	DownRate   int64 `json:"down_rate"`
	UpRate     int64 `json:"up_rate"`
	// Connections is the number of nodes connected for this blob.
	Connections int `json:"connections"`
	// Keeper is the node that keeps the list of those who have the blob; KeptHere
	// that it is this one. Known tells that it has answered, and that the
	// four numbers after it say something.
	Keeper   string `json:"keeper,omitempty"`
	KeptHere bool   `json:"kept_here,omitempty"`
	Known    bool   `json:"known"`
	// HoldersComplete and HoldersPartial are the nodes with all of the blob, and those
	// that are getting it, this one among them.
	HoldersComplete int `json:"holders_complete"`
	HoldersPartial  int `json:"holders_partial"`
	// Lent is how many segments of 4 MiB were lent to nodes so far.
	Lent int `json:"lent"`
	// OriginCopiesSaved is how many times the blob did not have to come from the
	// registry: the copies that nodes have, less what they were lent. As its
	// keeper knows.
	OriginCopiesSaved float64 `json:"origin_copies_saved"`
	// PeerShare is the part of the blob, 0 to 1, that came to this node from peers.
	PeerShare float64 `json:"peer_share"`
	// Leases are the segments this node gets from the registry, Owners the nodes that
	// ask it for reads of others.
	Leases []int    `json:"leases,omitempty"`
	Owners []string `json:"owners,omitempty"`
	// Banned are peers that are not asked any more, Doubted those that did not
	// deliver and are not asked for a while.
	Banned  []BannedPeer `json:"banned,omitempty"`
	Doubted []string     `json:"doubted,omitempty"`
	// Note says in a few words what the fetch waits for, or why it failed.
	Note string `json:"note,omitempty"`
}

// BannedPeer is a peer that is not asked for a blob any more, by node ID.
type BannedPeer struct {
	ID     string    `json:"id"`
	Reason BanReason `json:"reason"`
}

// Report describes the node and the named blobs, as far as they are here, or without
// names those it fetches and shares. It asks nobody else; at most MaxReportDigests
// names count.
func (f *Fetcher) Report(blobs ...digest.Digest) Report {
	r := Report{
		Node:    NodeReport{Zone: f.o.Zone, Registry: f.o.Reach != ThroughMembers, Passing: f.o.Ephemeral},
		Members: []NodeReport{}, Silent: []SilentPeer{}, Blobs: []BlobReport{},
	}
	if f.cluster != nil {
		self := f.gossip.Self()
		r.Node.ID, r.Node.Addr, r.Node.Registry = self.ID, addrOf(self.Addr), self.Origin
		if r.Node.Addr == "" {
			r.Node.Addr = addrOf(f.Addr())
		}
		ms := f.Members()
		r.MembersLeft = max(len(ms)-maxReportMembers, 0)
		for _, m := range ms[:len(ms)-r.MembersLeft] {
			r.Members = append(r.Members, NodeReport{ID: m.ID, Addr: addrOf(m.Addr), Zone: m.Zone, Registry: m.Origin, Passing: m.Ephemeral})
		}
		for peer, err := range f.gossip.Silent() {
			r.Silent = append(r.Silent, SilentPeer{Peer: peer, Reason: err.Error(), Foreign: trust.Foreign(err)})
		}
		slices.SortFunc(r.Silent, func(a, b SilentPeer) int { return cmp.Compare(a.Peer, b.Peer) })
	}
	if len(blobs) > 0 {
		for _, dg := range blobs[:min(len(blobs), MaxReportDigests)] {
			if b, ok := f.reportOf(dg); ok {
				r.Blobs = append(r.Blobs, b)
			}
		}
		return r
	}
	ds := f.all()
	type ranked struct {
		d *download
		activity
	}
	all := make([]ranked, 0, len(ds))
	now := time.Now()
	for _, d := range ds {
		if a, ok := d.activity(now); ok {
			all = append(all, ranked{d, a})
		}
	}
	slices.SortFunc(all, func(a, b ranked) int {
		return cmp.Or(-cmp.Compare(a.rank, b.rank), -cmp.Compare(a.rate, b.rate), -a.touched.Compare(b.touched), cmp.Compare(a.d.desc.Digest, b.d.desc.Digest))
	})
	r.BlobsLeft = max(len(all)-maxReportBlobs, 0)
	for _, a := range all[:len(all)-r.BlobsLeft] {
		r.Blobs = append(r.Blobs, a.d.report(now))
	}
	return r
}

// addrOf writes an address, "" when it is not known.
func addrOf(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// activity orders the blobs of a report.
type activity struct {
	rank    int // 2: fetched, 1: somebody uses it, 0: only shared
	rate    int64
	touched time.Time
}

func (d *download) activity(now time.Time) (a activity, ok bool) {
	a.rate = d.downRate.rate(now) + d.upRate.rate(now)
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.run != nil:
		a.rank = 2
	case d.refs > 0:
		a.rank = 1
	}
	a.touched = d.touched
	return a, !d.stopped
}

// reportOf is one blob that was named; ok is false when this node has nothing of it.
func (f *Fetcher) reportOf(dg digest.Digest) (b BlobReport, ok bool) {
	f.mu.Lock()
	d := f.downloads[dg]
	f.mu.Unlock()
	if d != nil && !d.dead() {
		return d.report(time.Now()), true
	}
	i, err := f.o.Store.Stat(dg)
	if err != nil || i.Size == 0 {
		return b, false
	}
	b = BlobReport{Digest: dg, State: Waiting, Size: i.Size, Have: i.Have}
	if i.Complete {
		b.State = Complete
	}
	f.keeperOf(&b, keeper{})
	return b, true
}

// report describes a blob that is open.
func (d *download) report(now time.Time) BlobReport {
	p := d.progress(d.desc)
	b := BlobReport{
		Digest: p.Digest, State: p.State, Note: p.Note, Size: p.Size, Have: p.Have,
		FromOrigin: p.FromOrigin, FromPeers: p.FromPeers, Uploaded: p.Uploaded, Connections: p.Peers,
		DownRate: d.downRate.rate(now), UpRate: d.upRate.rate(now),
	}
	if p.Size > 0 {
		b.PeerShare = min(float64(p.FromPeers)/float64(p.Size), 1)
	}
	d.mu.Lock()
	b.Image, b.Seeding = d.name, d.tor != nil && !d.f.o.NoSeed
	for s := range d.leases {
		b.Leases = append(b.Leases, s)
	}
	for _, o := range d.keeper.owners {
		b.Owners = append(b.Owners, o.ID)
	}
	for id, why := range d.bannedFor {
		if len(b.Banned) < maxReportPeers {
			b.Banned = append(b.Banned, BannedPeer{id, why})
		}
	}
	for id, since := range d.doubts {
		if now.Sub(since) <= distrustPeers && len(b.Doubted) < maxReportPeers {
			b.Doubted = append(b.Doubted, id)
		}
	}
	k := d.keeper
	d.mu.Unlock()
	slices.Sort(b.Leases)
	slices.Sort(b.Owners)
	slices.Sort(b.Doubted)
	slices.SortFunc(b.Banned, func(a, b BannedPeer) int { return cmp.Compare(a.ID, b.ID) })
	if !d.noPeers {
		d.f.keeperOf(&b, k)
	}
	return b
}

// keeperOf fills in what a blob's keeper knows: its own book when it is this node,
// else what it said last.
func (f *Fetcher) keeperOf(b *BlobReport, last keeper) {
	if f.cluster == nil {
		return
	}
	b.Keeper = f.cluster.Keeper(b.Digest).ID
	b.KeptHere = b.Keeper == f.cluster.ID()
	k := cluster.Kept{Nodes: last.nodes, Complete: last.complete, Lent: last.lent}
	b.Known = !last.answered.IsZero()
	if b.KeptHere {
		if now, ok := f.cluster.Kept(b.Digest); ok {
			k, b.Known = now, true
		}
	}
	b.HoldersComplete, b.HoldersPartial, b.Lent = k.Complete, max(k.Nodes-k.Complete, 0), k.Lent
	b.OriginCopiesSaved = originCopiesSaved(b.Size, k.Complete, k.Lent)
}

// originCopiesSaved is how many copies of a blob nodes have beyond what they were
// lent of it, which was one copy at least: a node that is alone gets it without
// asking, and a list that was rebuilt has forgotten.
func originCopiesSaved(size int64, complete, lent int) float64 {
	if size <= 0 {
		return 0
	}
	return max(float64(complete)-max(float64(lent)/float64(cluster.Segments(size)), 1), 0)
}
