package fetcher

import (
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// newNodeWith is newNode with other options.
func newNodeWith(t *testing.T, s *trust.Secret, set func(*Options), peers ...string) *testNode {
	t.Helper()
	dir := t.TempDir()
	st, err := store.Open(store.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	log := testLog()
	if log != nil {
		log = log.With("node", filepath.Base(dir))
	}
	o := Options{Store: st, Secret: s, Listen: "127.0.0.1", Peers: peers, Log: log}
	set(&o)
	f, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		_ = st.Close()
	})
	return &testNode{f, dir}
}

// rateOf is the rate of a whole fetch in bytes a second, what a limit lets through
// at once left out.
func rateOf(t *testing.T, b *Blob) float64 {
	begun := time.Now()
	if err := b.Wait(within(t, 30*time.Second)); err != nil {
		t.Error(err)
	}
	return float64(b.Size()-burst) / time.Since(begun).Seconds()
}

// TestRatesHold: each limit holds in a transfer of two seconds, and the sum of two blobs is what two limits per blob allow.
func TestRatesHold(t *testing.T) {
	const perSecond = 2 << 20
	none := func(*Options) {}
	for name, c := range map[string]struct {
		seeder, leecher func(*Options)
		fromRegistry    bool
		blobs           int
	}{
		"upload of the node":   {seeder: func(o *Options) { o.UploadRate = perSecond }, leecher: none, blobs: 1},
		"upload of a blob":     {seeder: func(o *Options) { o.UploadRatePerBlob = perSecond }, leecher: none, blobs: 2},
		"download of the node": {leecher: func(o *Options) { o.DownloadRate = perSecond }, seeder: none, blobs: 1},
		"download of a blob":   {leecher: func(o *Options) { o.DownloadRatePerBlob = perSecond }, seeder: none, blobs: 2},
		"of a blob, registry":  {leecher: func(o *Options) { o.DownloadRatePerBlob = perSecond }, fromRegistry: true, blobs: 2},
		"of the node is shared": {
			leecher: func(o *Options) { o.DownloadRate = 2 * perSecond; o.DownloadRatePerBlob = perSecond }, seeder: none, blobs: 2,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t)
			var descs []ocispec.Descriptor
			for i := range c.blobs {
				descs = append(descs, reg.add(random(5<<20+i)))
			}
			var leecher *testNode
			var source Origin
			if c.fromRegistry {
				leecher = newNodeWith(t, nil, c.leecher)
				source = reg.origin(t)
			} else {
				s := trust.NewSecret()
				seeder := newNodeWith(t, &s, c.seeder)
				for _, d := range descs {
					if err := seeder.blob(t, d, reg.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
						t.Fatal(err)
					}
				}
				leecher = newNodeWith(t, &s, c.leecher, seeder.Addr().String())
			}
			rates := make(chan float64, c.blobs)
			for _, d := range descs {
				b := leecher.blob(t, d, source)
				go func() { rates <- rateOf(t, b) }()
			}
			for range descs {
				r := <-rates
				t.Logf("%.2f MiB/s", r/(1<<20))
				// A limit is one from above; joining the others takes up to a second of this.
				if r < 0.4*perSecond || r > 1.2*perSecond {
					t.Errorf("%.2f MiB/s, want %.0f", r/(1<<20), float64(perSecond)/(1<<20))
				}
			}
		})
	}
}

// TestDemandCountsWithinTheLimit: reads that somebody waits for are no way around it.
func TestDemandCountsWithinTheLimit(t *testing.T) {
	t.Parallel()
	const perSecond = 2 << 20
	for name, set := range map[string]func(*Options){
		"of the node": func(o *Options) { o.DownloadRate = perSecond },
		"of a blob":   func(o *Options) { o.DownloadRatePerBlob = perSecond },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			reg := newRegistry(t)
			desc := reg.add(random(8 << 20))
			s := trust.NewSecret()
			seeder := newNodeWith(t, &s, func(*Options) {})
			if err := seeder.blob(t, desc, reg.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			leecher := newNodeWith(t, &s, set, seeder.Addr().String())
			b := leecher.blob(t, desc, nil)
			p := make([]byte, 256<<10)
			begun := time.Now()
			const n = 4 << 20
			for off := int64(0); off < n; off += int64(len(p)) {
				if _, err := b.ReadAt(within(t, 10*time.Second), p, off, Demand); err != nil {
					t.Fatal(err)
				}
			}
			least := time.Duration(float64(n-burst) / perSecond * float64(time.Second))
			if took := time.Since(begun); took < least*8/10 {
				t.Errorf("%d bytes in %v, want about %v", n, took, least)
			}
			if s := leecher.Stats(); s.DemandPeers.Count != n/uint64(len(p)) {
				t.Errorf("%d reads from peers were counted, want %d", s.DemandPeers.Count, n/len(p))
			}
		})
	}
}

func TestLimitsAreChecked(t *testing.T) {
	st, err := store.Open(store.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	for want, o := range map[string]Options{
		"upload rate is -1":        {UploadRate: -1},
		"download rate of a blob":  {DownloadRatePerBlob: -5},
		"connections is -1":        {Connections: -1},
		"connections of a blob is": {ConnectionsPerBlob: -1},
		"with 15 connections":      {Connections: 15},
	} {
		o.Store = st
		f, err := New(t.Context(), o)
		if err == nil {
			_ = f.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

// TestPlaces: the shares of the connections are never more than all, and none is empty.
func TestPlaces(t *testing.T) {
	for _, n := range []int{0, 16, 17, 100, 4096} {
		o := Options{Connections: n}
		swarm, in, out := o.places()
		most := n
		if n == 0 {
			most = DefaultConnections
		}
		if swarm+in+out > most || swarm < most/2 || in < 2 || out < 2 {
			t.Errorf("of %d: %d, %d and %d", n, swarm, in, out)
		}
	}
}

// TestInbound: a full port closes who idles for longest, and else who comes.
func TestInbound(t *testing.T) {
	l := newInbound(nil, 2)
	conn := func() net.Conn {
		a, b := net.Pipe()
		t.Cleanup(func() { a.Close(); b.Close() })
		return a
	}
	open := func(c net.Conn) bool { return c.SetDeadline(time.Time{}) == nil }
	a, b, c, d := conn(), conn(), conn(), conn()
	if !l.admit(a) || !l.admit(b) || l.admit(c) {
		t.Fatal("two busy connections leave no place")
	}
	l.state(b, http.StateIdle)
	l.state(a, http.StateIdle)
	l.state(b, http.StateActive)
	if !l.admit(c) || open(a) || !open(b) || l.count() != 2 {
		t.Error("the idle one makes room, the busy one does not")
	}
	l.state(a, http.StateClosed) // it has no place any more
	if l.admit(d) || l.count() != 2 {
		t.Error("a connection gave a place back twice")
	}
	l.state(c, http.StateClosed)
	if !l.admit(d) {
		t.Error("one that ended leaves its place")
	}
}

// TestConnectionCapKeepsFetching: a node with few connections gets a blob from many.
func TestConnectionCapKeepsFetching(t *testing.T) {
	t.Parallel()
	reg := newRegistry(t)
	data := random(12 << 20)
	desc := reg.add(data)
	s := trust.NewSecret()
	first := newNodeWith(t, &s, func(*Options) {})
	if err := first.blob(t, desc, reg.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	nodes := []*testNode{first}
	for range 4 {
		n := newNodeWith(t, &s, func(o *Options) { o.Connections, o.ConnectionsPerBlob = 16, 2 }, first.Addr().String())
		nodes = append(nodes, n)
	}
	done := make(chan error, len(nodes))
	for _, n := range nodes[1:] {
		b := n.blob(t, desc, reg.origin(t))
		go func() { done <- b.Wait(within(t, 30*time.Second)) }()
	}
	for range nodes[1:] {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for _, n := range nodes[1:] {
		s := n.Stats()
		if s.SwarmConnections > 8 || s.ConnectionsIn > 4 || s.ConnectionsOut > 4 {
			t.Errorf("%d, %d and %d connections", s.SwarmConnections, s.ConnectionsIn, s.ConnectionsOut)
		}
	}
}

// TestOwnLimitIsNoFaultOfPeers: a slow limit of this node's makes no peer count as slow.
func TestOwnLimitIsNoFaultOfPeers(t *testing.T) {
	d := &download{f: &Fetcher{}}
	if d.slowBelow() != hungryBelow {
		t.Error("without a limit")
	}
	d.f.down = limiter(1 << 20)
	d.down = limiter(100 << 10)
	if got := d.slowBelow(); got != patientShare*(100<<10) {
		t.Errorf("with limits: %v", got)
	}
}
