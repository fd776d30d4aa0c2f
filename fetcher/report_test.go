package fetcher

import (
	"encoding/json"
	"net"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// TestReport: what two nodes say of a blob that one got from the registry and the
// other from it.
func TestReport(t *testing.T) {
	reg := newRegistry(t)
	const size = 9 << 20
	desc := reg.add(random(size))
	s := trust.NewSecret()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := silent.Addr().String()
	silent.Close()
	first := newNodeWith(t, &s, func(o *Options) { o.Zone = "a" })
	if err := first.blob(t, desc, reg.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	second := newNodeWith(t, &s, func(o *Options) { o.Zone, o.Ephemeral = "b", true }, first.Addr().String(), nobody)
	b, err := second.Blob(t.Context(), reg.ref(t), desc, BlobOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := b.Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}

	// What is complete is announced in the background.
	for ctx := within(t, 10*time.Second); second.Report().Blobs[0].HoldersComplete < 2; {
		if sleep(ctx, 10*time.Millisecond) != nil {
			t.Fatal("the keeper does not know of both")
		}
	}
	r := second.Report()
	if r.Node.ID != second.NodeID() || r.Node.Addr != second.Addr().String() || r.Node.Zone != "b" || !r.Node.Passing {
		t.Errorf("itself: %+v", r.Node)
	}
	if len(r.Members) != 1 || r.Members[0] != (NodeReport{ID: first.NodeID(), Addr: first.Addr().String(), Zone: "a", Registry: r.Node.Registry}) {
		t.Errorf("members: %+v", r.Members)
	}
	if len(r.Silent) != 1 || r.Silent[0].Peer != nobody || r.Silent[0].Reason == "" || r.Silent[0].Foreign {
		t.Errorf("silent: %+v", r.Silent)
	}
	if len(r.Blobs) != 1 {
		t.Fatalf("%d blobs", len(r.Blobs))
	}
	got := r.Blobs[0]
	if got.Digest != desc.Digest || got.Image != reg.ref(t).String() || got.State != Complete || got.Size != size || got.Have != size {
		t.Errorf("the blob: %+v", got)
	}
	if got.FromPeers != size || got.FromOrigin != 0 || got.PeerShare != 1 {
		t.Errorf("all came from the peer: %+v", got)
	}
	if got.Keeper != first.NodeID() || got.KeptHere || !got.Known || got.HoldersComplete != 2 {
		t.Errorf("its keeper is the node that stays: %+v", got)
	}

	// The keeper itself: two copies, one of which came from the registry.
	kept := first.Report(desc.Digest, digest.FromString("unknown")).Blobs
	if len(kept) != 1 || !kept[0].KeptHere || kept[0].HoldersComplete != 2 || kept[0].HoldersPartial != 0 {
		t.Fatalf("the keeper says %+v", kept)
	}
	if saved := kept[0].OriginCopiesSaved; saved != 1 {
		t.Errorf("%.2f copies saved with %d segments lent", saved, kept[0].Lent)
	}
	if kept[0].Uploaded < size {
		t.Errorf("uploaded %d", kept[0].Uploaded)
	}

	// A blob that lies in the store and is not open.
	third := newNodeWith(t, nil, func(*Options) {})
	lone := third.blob(t, desc, reg.origin(t))
	if err := lone.Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	lone.Close()
	if r := third.Report(); len(r.Blobs) != 0 || r.Node.ID != "" {
		t.Errorf("nothing is open: %+v", r)
	}
	if r := third.Report(desc.Digest); len(r.Blobs) != 1 || r.Blobs[0].State != Complete || r.Blobs[0].Have != size || r.Blobs[0].Known {
		t.Errorf("in the store: %+v", r.Blobs)
	}
	text, err := json.Marshal(third.Report())
	if err != nil || string(text) != `{"node":{"id":"","addr":"","registry":true,"passing":false},"members":[],"silent":[],"blobs":[]}` {
		t.Errorf("%s, %v", text, err)
	}

	st, other := second.Stats(), first.Stats()
	if st.FromPeers != size || st.FromOrigin != 0 || st.FromCache != 0 || other.FromOrigin != size || other.Uploaded < size {
		t.Errorf("bytes: %+v and %+v", st, other)
	}
	if st.Members != 1 || st.Swarms != 1 || st.Fetches != 0 || other.Kept != 1 || st.ControlSent == 0 || st.ControlReceived == 0 {
		t.Errorf("the second: %+v; the first: %+v", st, other)
	}
	if other.LeaseRequests != 0 && other.Leased == 0 {
		t.Errorf("leases: %+v", other)
	}
}

// TestReportIsBounded: the blobs that are fetched come first, and no more than so many.
func TestReportIsBounded(t *testing.T) {
	n := newNodeWith(t, nil, func(*Options) {})
	reg := newRegistry(t)
	reg.rate.Store(1 << 20)
	var idle []*Blob
	for i := range maxReportBlobs {
		d := reg.add([]byte{byte(i), byte(i >> 8), 7})
		idle = append(idle, n.blob(t, d, nil))
	}
	busy := reg.add(random(4 << 20))
	b := n.blob(t, busy, reg.origin(t))
	b.Fetch()
	r := n.Report()
	if len(r.Blobs) != maxReportBlobs || r.BlobsLeft != 1 || r.Blobs[0].Digest != busy.Digest || r.Blobs[0].State != Fetching {
		t.Errorf("%d blobs, %d left, first %+v", len(r.Blobs), r.BlobsLeft, r.Blobs[0])
	}
	if got := n.Stats(); got.Fetches != 1 {
		t.Errorf("%d fetches", got.Fetches)
	}
	named := make([]digest.Digest, MaxReportDigests+5)
	for i := range named {
		named[i] = idle[0].Descriptor().Digest
	}
	if r := n.Report(named...); len(r.Blobs) != MaxReportDigests {
		t.Errorf("%d of %d names", len(r.Blobs), len(named))
	}
}

// TestBansAreReported: with their reasons, once each.
func TestBansAreReported(t *testing.T) {
	s := trust.NewSecret()
	n := newNodeWith(t, &s, func(*Options) {})
	b := n.blob(t, newRegistry(t).add(random(1<<20)), nil)
	const liar, sender, other = "00000000000000000000000000000001", "00000000000000000000000000000002", "00000000000000000000000000000003"
	b.d.disbelieve(liar)
	b.d.disbelieve(liar)
	b.d.ban(sender)
	b.d.mu.Lock()
	b.d.doubts[other] = time.Now()
	b.d.doubts["long ago"] = time.Now().Add(-2 * distrustPeers)
	b.d.mu.Unlock()
	got := n.Report().Blobs[0]
	if !slices.Equal(got.Banned, []BannedPeer{{liar, FalseTable}, {sender, WrongBytes}}) || !slices.Equal(got.Doubted, []string{other}) {
		t.Errorf("banned %v, doubted %v", got.Banned, got.Doubted)
	}
	if bans := n.Stats().Bans; bans[FalseTable] != 1 || bans[WrongBytes] != 1 || bans[Disputed] != 0 || len(bans) != len(banReasons) {
		t.Errorf("bans: %v", bans)
	}
}

func TestOriginCopiesSaved(t *testing.T) {
	for _, c := range []struct {
		size           int64
		complete, lent int
		want           float64
	}{
		{8 << 20, 4, 2, 3}, {8 << 20, 4, 3, 2.5}, {1 << 20, 3, 1, 2}, {8 << 20, 0, 2, 0}, {8 << 20, 4, 0, 3}, {0, 3, 0, 0},
	} {
		if got := originCopiesSaved(c.size, c.complete, c.lent); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

func TestMeter(t *testing.T) {
	var m meter
	start := time.Unix(1000, 0)
	for s := range 20 {
		m.add(start.Add(time.Duration(s)*time.Second), 500)
		m.add(start.Add(time.Duration(s)*time.Second+500*time.Millisecond), 500)
	}
	for after, want := range map[int]int64{19: 1000, 20: 1000, 22: 600, 25: 0, 1000: 0} {
		if got := m.rate(start.Add(time.Duration(after) * time.Second)); got != want {
			t.Errorf("after %d s: %d, want %d", after, got, want)
		}
	}
}

func TestHistogram(t *testing.T) {
	var c counts
	c.demanded(store.Peer, 500*time.Microsecond, nil)
	c.demanded(store.Peer, 3*time.Millisecond, nil)
	c.demanded(store.Peer, time.Minute, nil)
	c.demanded(store.Origin, time.Second, nil)
	c.demanded(store.Peer, time.Second, ErrNoSource)
	h := c.demandPeers.get()
	if h.Buckets[0] != 1 || h.Buckets[2] != 1 || h.Buckets[3] != 2 || h.Buckets[len(h.Buckets)-1] != 2 || h.Count != 3 || h.Sum < 60 {
		t.Errorf("%+v", h)
	}
	if c.demandOrigin.get().Count != 1 || c.demandFailed.Load() != 1 {
		t.Error("by source")
	}
}
