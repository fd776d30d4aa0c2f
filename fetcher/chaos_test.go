package fetcher

import (
	"context"
	"net/http"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"
)

// mood is how a registry behaves at the moment: one link for all, and what a test
// does to requests.
type mood struct {
	r    *registry
	link *rate.Limiter

	mu     sync.Mutex // guards following
	gone   bool
	refuse func(w http.ResponseWriter) bool // nil: nobody
	asked  []time.Time                      // blob requests
}

// moody puts a link of so many bytes a second in front of a registry.
func (r *registry) moody(bytesPerSecond int) *mood {
	m := &mood{r: r, link: rate.NewLimiter(rate.Limit(bytesPerSecond), 256<<10)}
	r.Config.Handler = m
	return m
}

func (m *mood) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	m.mu.Lock()
	gone, refuse := m.gone, m.refuse
	if q.URL.Path != "/v2/" {
		m.asked = append(m.asked, time.Now())
	}
	m.mu.Unlock()
	if gone {
		panic(http.ErrAbortHandler)
	}
	if q.URL.Path != "/v2/" && refuse != nil && refuse(w) {
		return
	}
	m.r.ServeHTTP(onLink{w, m, q.Context()}, q)
}

type onLink struct {
	http.ResponseWriter
	m   *mood
	ctx context.Context
}

func (l onLink) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		k := min(len(p), 64<<10)
		if err := l.m.link.WaitN(l.ctx, k); err != nil {
			return n, err
		}
		l.m.mu.Lock()
		gone := l.m.gone
		l.m.mu.Unlock()
		if gone {
			panic(http.ErrAbortHandler)
		}
		m, err := l.ResponseWriter.Write(p[:k])
		n += m
		if err != nil {
			return n, err
		}
		p = p[k:]
	}
	return n, nil
}

func (m *mood) set(f func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f()
}

// crash ends a node as a power cut would: its port is gone before it could say
// goodbye.
func (n *testNode) crash() {
	_ = n.listener.Close()
	_ = n.Close()
}

// crowd is n nodes that know each other; set changes the options of the i-th.
func crowd(t *testing.T, n int, set func(i int, o *Options)) []*testNode {
	t.Helper()
	s := secret()
	var nodes []*testNode
	for i := range n {
		var peers []string
		if i > 0 {
			peers = []string{nodes[0].Addr().String()}
		}
		nodes = append(nodes, newNodeWith(t, s, func(o *Options) {
			if set != nil {
				set(i, o)
			}
		}, peers...))
	}
	acquainted(t, n-1, nodes...)
	return nodes
}

// TestCrashesSlowAndLate: of six nodes two die half way, the blob's keeper among
// them, one has a slow link and one comes late. Everybody who lives gets the blob,
// and the registry gives little more than one copy.
func TestCrashesSlowAndLate(t *testing.T) {
	const size, link = 48 << 20, 12 << 20
	r := newRegistry(t)
	data := random(size)
	desc := r.add(data)
	r.moody(link)
	nodes := crowd(t, 6, func(i int, o *Options) {
		if i == 5 {
			o.DownloadRate = link / 4
		}
	})
	dying := map[string]bool{nodes[0].cluster.Keeper(desc.Digest).ID: true}
	for _, n := range nodes[:5] {
		if len(dying) < 2 {
			dying[n.NodeID()] = true
		}
	}
	delete(dying, nodes[5].NodeID()) // stays slow
	var alive, dead []*Blob
	for _, n := range nodes {
		b := n.blob(t, desc, r.origin(t))
		b.Fetch()
		if dying[n.NodeID()] {
			dead = append(dead, b)
		} else {
			alive = append(alive, b)
		}
	}
	begun := time.Now()
	eventually(t, "half is there", func() bool { return alive[0].Progress().Have > size/2 })
	for _, b := range dead {
		(&testNode{Fetcher: b.d.f}).crash()
	}
	var at string
	for _, n := range nodes {
		if !dying[n.NodeID()] {
			at = n.Addr().String()
		}
	}
	late := newNode(t, t.TempDir(), nodes[0].o.Secret, at).blob(t, desc, r.origin(t))
	alive = append(alive, late)
	for _, b := range alive {
		right(t, b, data, 90*time.Second)
	}
	copies := float64(r.served.Load()) / size
	t.Logf("%d of %d nodes died; all others done in %s, %.2f copies", len(dead), len(nodes), time.Since(begun).Round(time.Millisecond), copies)
	if copies > 1.5 {
		t.Errorf("the registry gave %.2f copies", copies)
	}
}

// TestRegistryGoneAfterOneCopy: as soon as the nodes have one copy between them the
// registry goes away, one node is slow and one comes after that.
func TestRegistryGoneAfterOneCopy(t *testing.T) {
	const size, link = 32 << 20, 12 << 20
	r := newRegistry(t)
	data := random(size)
	desc := r.add(data)
	m := r.moody(link)
	nodes := crowd(t, 4, func(i int, o *Options) {
		if i == 3 {
			o.DownloadRate = link / 4
		}
	})
	var all []*Blob
	for _, n := range nodes {
		b := n.blob(t, desc, r.origin(t))
		b.Fetch()
		all = append(all, b)
	}
	eventually(t, "one copy is among the nodes", func() bool {
		for i := range all[0].d.pieces {
			held := false
			for _, b := range all {
				held = held || b.d.st.Has(i)
			}
			if !held {
				return false
			}
		}
		return true
	})
	m.set(func() { m.gone = true })
	all = append(all, newNode(t, t.TempDir(), nodes[0].o.Secret, nodes[1].Addr().String()).blob(t, desc, r.origin(t)))
	begun := time.Now()
	for _, b := range all {
		right(t, b, data, 90*time.Second)
	}
	copies := float64(r.served.Load()) / size
	t.Logf("done %s after the registry went, %.2f copies", time.Since(begun).Round(time.Millisecond), copies)
	if copies > 1.3 {
		t.Errorf("the registry gave %.2f copies", copies)
	}
}

// TestRateLimitSlowsAll: the registry asks one node for patience, and all keep from
// it until that is over.
func TestRateLimitSlowsAll(t *testing.T) {
	const size, wait = 64 << 20, 4 * time.Second
	r := newRegistry(t)
	data := random(size)
	desc := r.add(data)
	m := r.moody(12 << 20)
	nodes := crowd(t, 4, nil)
	var all []*Blob
	for _, n := range nodes {
		b := n.blob(t, desc, r.origin(t))
		b.Fetch()
		all = append(all, b)
	}
	eventually(t, "an eighth is there", func() bool { return all[0].Progress().Have > size/8 })
	var refused time.Time
	m.set(func() {
		m.refuse = func(w http.ResponseWriter) bool {
			m.mu.Lock()
			defer m.mu.Unlock()
			if !refused.IsZero() {
				return false
			}
			refused = time.Now()
			w.Header().Set("Retry-After", "4")
			w.WriteHeader(http.StatusTooManyRequests)
			return true
		}
	})
	for _, b := range all {
		right(t, b, data, 60*time.Second)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if refused.IsZero() {
		t.Fatal("nobody was refused")
	}
	early, later := 0, 0
	for _, at := range m.asked {
		// The word takes a moment: what was on its way by then does not count.
		switch since := at.Sub(refused); {
		case since > 500*time.Millisecond && since < wait-500*time.Millisecond:
			early++
		case since > 0:
			later++
		}
	}
	t.Logf("%d requests during the pause, %d after it", early, later)
	if early > 0 {
		t.Errorf("%d requests while the registry was to be left alone", early)
	}
	if later == 0 {
		t.Error("nobody asked again: this test says nothing")
	}
	if copies := float64(r.served.Load()) / size; copies > 1.3 {
		t.Errorf("the registry gave %.2f copies", copies)
	}
}
