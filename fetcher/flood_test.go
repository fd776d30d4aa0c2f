package fetcher

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

// TestFloodOfHolds: a member that claims a hundred thousand blobs fills its own
// share of a keeper's book and no more; others fetch as before.
func TestFloodOfHolds(t *testing.T) {
	r := newRegistry(t)
	s := secret()
	keeper := newNode(t, t.TempDir(), s)
	flooder := newRogue(t, s, keeper.Addr().String())
	a := newNode(t, t.TempDir(), s, keeper.Addr().String())
	b := newNode(t, t.TempDir(), s, keeper.Addr().String())
	acquainted(t, 3, keeper, a, b)
	data, desc := r.keptBy(t, keeper.NodeID(), 3<<20, a)
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range 100 {
		hs := make([]cluster.Hold, 1000)
		for k := range hs {
			hs[k] = cluster.Hold{Digest: digest.FromString(fmt.Sprint(i, k)), Size: 1 << 20}
		}
		if got := flooder.post(t, keeper, "/quay/v1/holds", map[string]any{"holds": hs}, nil); got != http.StatusOK {
			t.Fatalf("status %d", got)
		}
	}
	if after := heap(); after > before+64<<20 {
		t.Errorf("the flood costs the keeper %d bytes", after-before)
	}
	if kept := keeper.Stats().Kept; kept > 1<<14 || kept == 0 {
		t.Errorf("%d blobs of one member are kept", kept)
	}
	r.rate.Store(15 << 20)
	x, y := a.blob(t, desc, r.origin(t)), b.blob(t, desc, r.origin(t))
	x.Fetch()
	right(t, y, data, 30*time.Second)
	right(t, x, data, 30*time.Second)
	if copies := float64(r.served.Load()) / float64(desc.Size); copies > 1.3 {
		t.Errorf("the registry gave %.2f copies", copies)
	}
}

// TestMalformedMessagesAreRefused: what is too long or makes no sense is answered
// with 400, or not at all, by every call.
func TestMalformedMessagesAreRefused(t *testing.T) {
	s := secret()
	n := newNode(t, t.TempDir(), s)
	liar := newRogue(t, s, n.Addr().String())
	dg := digest.FromString("x")
	holds := make([]cluster.Hold, 1025)
	for i := range holds {
		holds[i] = cluster.Hold{Digest: dg, Size: 1}
	}
	long := []byte(`{"digest":"` + strings.Repeat("a", 9<<20) + `"}`)
	announce := func(a cluster.Announcement) any { return map[string]any{"announcement": a} }
	for _, c := range []struct {
		name, path string
		msg        any
	}{
		{"endless announcement", "announce", long},
		{"endless holds", "holds", long},
		{"endless question", "statements", long},
		{"no JSON", "announce", []byte("}")},
		{"more bits than segments", "announce", announce(cluster.Announcement{Digest: dg, Size: 1, Held: make([]byte, 100)})},
		{"more than all", "announce", announce(cluster.Announcement{Digest: dg, Size: 1, Have: 2})},
		{"many doubts", "announce", announce(cluster.Announcement{Digest: dg, Size: 1, Doubt: make([]string, 9)})},
		{"many holds", "holds", map[string]any{"holds": holds}},
		{"a hold of no digest", "holds", map[string]any{"holds": []cluster.Hold{{Digest: "sha256:../../x", Size: 1}}}},
		{"many pieces", "statements", map[string]any{"digest": dg, "size": 1 << 30, "pieces": make([]int, 513)}},
		{"pieces below zero", "statements", map[string]any{"digest": dg, "size": 1 << 30, "pieces": []int{-1}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := liar.post(t, n, "/quay/v1/"+c.path, c.msg, nil); got != http.StatusBadRequest {
				t.Errorf("status %d", got)
			}
		})
	}
	if kept := n.Stats().Kept; kept != 0 {
		t.Errorf("%d blobs are kept", kept)
	}
}

// TestForeignAddresses: members claim a blob under addresses that are not theirs.
// Addresses of many or of nobody are refused; a stranger's gets a few connections
// from who fetches, and the fetch goes on as if they were not there.
func TestForeignAddresses(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var dials atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			dials.Add(1)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	r := newRegistry(t)
	s := secret()
	keeper := newNode(t, t.TempDir(), s)
	a := newNode(t, t.TempDir(), s, keeper.Addr().String())
	acquainted(t, 1, keeper, a)
	data, desc := r.keptBy(t, keeper.NodeID(), 24<<20, a)
	// They hold the secret, and membership has not heard of them.
	claim := func(addr string) int {
		id, err := s.Identity()
		if err != nil {
			t.Fatal(err)
		}
		stray := &rogue{id: id, client: &http.Client{Transport: &http.Transport{TLSClientConfig: id.Client("http/1.1")}}}
		defer stray.client.CloseIdleConnections()
		return stray.post(t, keeper, "/quay/v1/holds", map[string]any{"addr": addr, "holds": []cluster.Hold{{Digest: desc.Digest, Size: desc.Size}}}, nil)
	}
	for _, addr := range []string{"224.0.0.1:6881", "[ff02::1]:6881", "255.255.255.255:6881", "127.0.0.1:0", "0.0.0.0:0"} {
		if got := claim(addr); got == http.StatusOK {
			t.Errorf("%s is taken for a member's address", addr)
		}
	}
	const liars = 8
	for range liars {
		if got := claim(l.Addr().String()); got != http.StatusOK {
			t.Fatalf("status %d", got)
		}
	}
	r.rate.Store(2 << 20)
	b := a.blob(t, desc, r.origin(t))
	took := right(t, b, data, 90*time.Second)
	t.Logf("in %s, %d connections to the stranger", took.Round(time.Millisecond), dials.Load())
	// Three in the first seconds by the swarm, then ever fewer; some by calls.
	if n := dials.Load(); n > 30 {
		t.Errorf("the stranger got %d connections", n)
	}
	if dials.Load() == 0 {
		t.Error("nobody dialled the address: this test says nothing")
	}
}

// TestLyingKeeper: a keeper answers announcements with nonsense or malice. The
// fetches end well all the same, in bounded time.
func TestLyingKeeper(t *testing.T) {
	r := newRegistry(t)
	var liar *rogue
	phantoms := func(dg digest.Digest, size int64, n int) (peers []cluster.Said) {
		for i := range n {
			m := cluster.Member{ID: fmt.Sprintf("%032x", i+1), Addr: netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", 1+i%9)), Origin: true}
			peers = append(peers, cluster.Said{Member: m, Announcement: cluster.Announcement{Digest: dg, Size: size, Have: 1, Active: true, Registry: true}})
		}
		return peers
	}
	size := 8 << 20
	for _, c := range []struct {
		name string
		say  func(a cluster.Announcement) any
		most float64 // copies
	}{
		{"segments out of range", func(a cluster.Announcement) any { return cluster.Reply{Digest: a.Digest, Granted: []int{-1, 1 << 40}} }, 2.1},
		{"thousands of peers", func(a cluster.Announcement) any {
			return cluster.Reply{Digest: a.Digest, Peers: phantoms(a.Digest, a.Size, 5000)}
		}, 2.1},
		{"all to everybody", func(a cluster.Announcement) any {
			return cluster.Reply{Digest: a.Digest, Granted: []int{0, 1, 2}, Anyway: true, Nodes: 2}
		}, 2.1},
		{"nothing to anybody", func(a cluster.Announcement) any {
			return cluster.Reply{Digest: a.Digest, Nodes: 100, Complete: 50, Next: time.Hour}
		}, 2.1},
		{"nothing, and phantoms", func(a cluster.Announcement) any {
			return cluster.Reply{Digest: a.Digest, Nodes: 100, Peers: phantoms(a.Digest, a.Size, 32)}
		}, 2.1},
		{"somebody else, who is nobody", func(a cluster.Announcement) any {
			return cluster.Reply{Digest: a.Digest, Elsewhere: &cluster.Member{ID: strings.Repeat("1", 32), Addr: netip.MustParseAddrPort("127.0.0.1:9")}}
		}, 2.1},
		{"itself, elsewhere", func(a cluster.Announcement) any {
			return cluster.Reply{Digest: a.Digest, Elsewhere: &cluster.Member{ID: liar.id.ID(), Addr: liar.ln.Addr()}}
		}, 2.1},
		{"another blob", func(cluster.Announcement) any { return cluster.Reply{Digest: digest.FromString("other")} }, 2.1},
		{"an endless answer", func(cluster.Announcement) any { return nil }, 2.1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := secret()
			liar = newRogue(t, s)
			a := newNode(t, t.TempDir(), s, liar.addr())
			b := newNode(t, t.TempDir(), s, liar.addr())
			acquainted(t, 2, a, b)
			size++
			data, desc := r.keptBy(t, liar.id.ID(), size, a)
			size = len(data)
			var heard atomic.Int64
			answer := http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				var msg struct {
					Announcement cluster.Announcement `json:"announcement"`
				}
				if q.URL.Path != "/quay/v1/announce" || json.NewDecoder(q.Body).Decode(&msg) != nil {
					http.NotFound(w, q)
					return
				}
				heard.Add(1)
				reply := c.say(msg.Announcement)
				if reply == nil {
					_, _ = io.Copy(w, io.LimitReader(zeroes{}, 1<<30))
					return
				}
				_ = json.NewEncoder(w).Encode(reply)
			})
			liar.answer.Store(&answer)
			defer liar.answer.Store(nil)
			before := r.served.Load()
			x, y := a.blob(t, desc, r.origin(t)), b.blob(t, desc, r.origin(t))
			x.Fetch()
			took := right(t, y, data, 90*time.Second)
			right(t, x, data, 90*time.Second)
			copies := float64(r.served.Load()-before) / float64(desc.Size)
			t.Logf("in %s, %.2f copies", took.Round(time.Millisecond), copies)
			if heard.Load() == 0 {
				t.Error("the keeper was not asked: this test says nothing")
			}
			if copies > c.most {
				t.Errorf("the registry gave %.2f copies", copies)
			}
			if took > 30*time.Second {
				t.Errorf("it took %s", took)
			}
		})
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) { return copy(p, bytes.Repeat([]byte{'0'}, len(p))), nil }
