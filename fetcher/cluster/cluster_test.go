package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memory is a Holder with one blob.
type memory struct {
	blob []byte
	have int64
}

func (h *memory) digest() digest.Digest { return digest.FromBytes(h.blob) }

func (h *memory) ReadHeld(_ context.Context, w io.Writer, _ func([]Statement), d digest.Digest, off, n int64, _ bool) error {
	if d != h.digest() || off+n > h.have {
		return ErrNotHeld
	}
	_, err := w.Write(h.blob[off : off+n])
	return err
}

func (h *memory) Statements(context.Context, digest.Digest, int64, []int) []Statement { return nil }

func (h *memory) Complete() []Hold {
	if len(h.blob) == 0 || h.have < int64(len(h.blob)) {
		return nil
	}
	return []Hold{{h.digest(), int64(len(h.blob))}}
}

// list is a Membership that a test sets.
type list struct {
	mu      sync.Mutex
	self    Member
	members []Member
	changed chan struct{}
}

func (l *list) Self() Member { return l.self }

func (l *list) Members() []Member {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.members
}

func (l *list) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

func (l *list) set(ms []Member) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.members = slices.DeleteFunc(slices.Clone(ms), func(m Member) bool { return m.ID == l.self.ID })
	slices.SortFunc(l.members, func(a, b Member) int { return compareIDs(a.ID, b.ID) })
	close(l.changed)
	l.changed = make(chan struct{})
}

// node is a member on loopback.
type node struct {
	*Cluster
	list *list
	stop func()
}

func newNode(t *testing.T, s trust.Secret, h Holder) *node {
	t.Helper()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	ms := &list{self: Member{ID: id.ID(), Addr: l.Addr(), Origin: true}, changed: make(chan struct{})}
	c := New(Options{Membership: ms, PeerID: trust.PeerID, Client: id.Client(trust.ProtoHTTP1), Holder: h})
	srv := &http.Server{Handler: c.Handler()}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l.HTTP()) }()
	n := &node{Cluster: c, list: ms}
	n.stop = sync.OnceFunc(func() {
		c.Close()
		_ = srv.Close()
		_ = l.Close()
		<-served
	})
	t.Cleanup(n.stop)
	return n
}

// meet makes nodes know each other.
func meet(nodes ...*node) {
	var ms []Member
	for _, n := range nodes {
		ms = append(ms, n.list.self)
	}
	for _, n := range nodes {
		n.list.set(ms)
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A stranger learns nothing.
func TestOtherSecretGetsNothing(t *testing.T) {
	h := &memory{blob: make([]byte, 1000), have: 1000}
	a := newNode(t, trust.NewSecret(), h)
	b := newNode(t, trust.NewSecret(), &memory{})
	meet(a, b)
	_, err := b.ReadAt(t.Context(), a.list.self, h.digest(), make([]byte, 1), 0, ReadOptions{})
	if err == nil || errors.Is(err, ErrNotHeld) {
		t.Fatalf("a stranger got an answer: %v", err)
	}
	if _, err := b.Statements(t.Context(), a.list.self, h.digest(), 1000, []int{0}); err == nil {
		t.Fatal("a stranger got a piece table")
	}
	ans, err := b.Announce(t.Context(), Announcement{Digest: h.digest(), Size: 1000, Active: true, Registry: true, Want: 1})
	if err != nil || len(ans.Peers) != 0 {
		t.Fatalf("a stranger was named %v: %v", ans.Peers, err)
	}
}

// Whoever asks, the same node keeps a blob's list; it names those that take part
// to each other and lends each segment once.
func TestAnnounce(t *testing.T) {
	s := trust.NewSecret()
	var nodes []*node
	for range 4 {
		nodes = append(nodes, newNode(t, s, &memory{}))
	}
	meet(nodes...)
	a := Announcement{Digest: digest.FromString("x"), Size: 16 * SegmentSize, Active: true, Registry: true, Want: 3}
	lent := map[int]string{}
	for _, n := range nodes {
		ans, err := n.Announce(t.Context(), a)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range ans.Granted {
			if lent[s] != "" {
				t.Errorf("segment %d is lent to %s and %s", s, lent[s], n.ID())
			}
			lent[s] = n.ID()
		}
	}
	if len(lent) != 4*grantShared {
		t.Errorf("%d segments lent", len(lent))
	}
	ans, err := nodes[0].Announce(t.Context(), a)
	if err != nil || len(ans.Peers) != 3 || len(ans.Owners) != 4 || ans.Nodes != 4 {
		t.Fatalf("%d peers, %d owners, %d nodes: %v", len(ans.Peers), len(ans.Owners), ans.Nodes, err)
	}
}

// When the keeper goes away the next in rank takes over, and learns from those
// that announce themselves what is out.
func TestKeeperDies(t *testing.T) {
	s := trust.NewSecret()
	var nodes []*node
	for range 4 {
		nodes = append(nodes, newNode(t, s, &memory{}))
	}
	meet(nodes...)
	d := digest.FromString("x")
	keeper := nodes[0].Keeper(d)
	var rest []*node
	for _, n := range nodes {
		if n.ID() == keeper.ID {
			n.stop()
		} else {
			rest = append(rest, n)
		}
	}
	meet(rest...) // membership notices
	a := Announcement{Digest: d, Size: 16 * SegmentSize, Active: true, Registry: true, Claimed: NewBitmap(16)}
	a.Claimed.Set(0)
	if _, err := rest[0].Announce(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	b := Announcement{Digest: d, Size: 16 * SegmentSize, Active: true, Registry: true, Want: 3}
	eventually(t, "segments are lent by the next keeper", func() bool {
		ans, err := rest[1].Announce(t.Context(), b)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(ans.Granted, 0) {
			t.Fatal("a segment that is out was lent again")
		}
		return len(ans.Granted) > 0 && len(ans.Peers) == 1
	})
}

// A keeper hears of complete blobs, and names who holds them.
func TestHoldersAreNamed(t *testing.T) {
	s := trust.NewSecret()
	h := &memory{blob: make([]byte, 1<<20)}
	_, _ = rand.Read(h.blob)
	h.have = 1 << 20
	a, b, c := newNode(t, s, h), newNode(t, s, &memory{}), newNode(t, s, &memory{})
	meet(a, b, c)
	var ans Reply
	eventually(t, "the holder is named", func() bool {
		var err error
		if ans, err = b.Announce(t.Context(), Announcement{Digest: h.digest(), Size: 1 << 20, Active: true, Registry: true, Want: 2}); err != nil {
			t.Fatal(err)
		}
		return len(ans.Peers) == 1
	})
	if p := ans.Peers[0]; p.ID != a.ID() || !p.Complete() || len(ans.Granted) != 0 {
		t.Fatalf("%+v", ans)
	}
	p := make([]byte, 4096)
	if _, err := b.ReadAt(t.Context(), ans.Peers[0].Member, h.digest(), p, 8192, ReadOptions{}); err != nil || !bytes.Equal(p, h.blob[8192:8192+4096]) {
		t.Fatal("other bytes", err)
	}
	if _, err := b.ReadAt(t.Context(), c.list.self, h.digest(), p, 0, ReadOptions{}); !errors.Is(err, ErrNotHeld) {
		t.Fatalf("reading what is not held: %v", err)
	}
}

func TestStatements(t *testing.T) {
	s := trust.NewSecret()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	d := digest.FromString("x")
	st := Sign(id, d, 1<<20, []int{0, 2}, []PieceSum{{1}, {2}})
	raw := statementsFor([]Statement{st})
	said, err := statementsIn(raw)
	if err != nil || len(said) != 1 || !said[0].Verify(d, 1<<20) || said[0].By != id.ID() || said[0].Sums[1] != (PieceSum{2}) {
		t.Fatalf("%+v: %v", said, err)
	}
	for name, change := range map[string]func(*Statement){
		"sum":    func(s *Statement) { s.Raw[0]++ },
		"piece":  func(s *Statement) { s.Pieces[0] = 1 },
		"signer": func(s *Statement) { s.By = strings.Repeat("0", 32) },
		"key":    func(s *Statement) { s.Key[3]++ },
	} {
		t.Run(name, func(t *testing.T) {
			said, _ := statementsIn(raw)
			change(&said[0])
			if said[0].Verify(d, 1<<20) {
				t.Fatal("a changed statement is believed")
			}
		})
	}
	if said[0].Verify(digest.FromString("y"), 1<<20) {
		t.Fatal("a statement about another blob is believed")
	}
}

// Every node computes the same owners; shares are even; a node that leaves moves
// only its own segments.
func TestRank(t *testing.T) {
	d := digest.FromString("blob")
	nodes := []string{"a", "b", "c", "d", "e"}
	count := map[string]int{}
	const segments = 2000
	for s := range segments {
		owner := Owner(d, s, nodes)
		count[owner]++
		for _, n := range nodes {
			if r := Rank(d, s, n, nodes); (r == 0) != (n == owner) {
				t.Fatalf("segment %d: %s has rank %d, owner is %s", s, n, r, owner)
			}
		}
		if owner != "c" {
			if now := Owner(d, s, []string{"e", "a", "d", "b"}); now != owner {
				t.Fatalf("segment %d moved from %s to %s when c left", s, owner, now)
			}
		}
	}
	for n, c := range count {
		if math.Abs(float64(c)-segments/5) > segments/5*0.15 {
			t.Errorf("%s owns %d of %d", n, c, segments)
		}
	}
	if r := Rank(d, 0, "stranger", nodes); r != len(nodes) {
		t.Errorf("rank of a stranger: %d", r)
	}
}

func TestHostileMessages(t *testing.T) {
	h := &memory{blob: []byte("x")}
	for name, body := range map[string]string{
		"no JSON":         "}",
		"no digest":       `{"size":1}`,
		"negative size":   fmt.Sprintf(`{"digest":%q,"size":-1}`, h.digest()),
		"huge size":       fmt.Sprintf(`{"digest":%q,"size":%d}`, h.digest(), int64(math.MaxInt64)),
		"more than all":   fmt.Sprintf(`{"digest":%q,"size":1,"have":2}`, h.digest()),
		"too many bits":   fmt.Sprintf(`{"digest":%q,"size":1,"held":"AAAAAAAA"}`, h.digest()),
		"endless":         `{"digest":"` + strings.Repeat("a", maxMessage) + `"}`,
		"path for digest": `{"digest":"sha256:../../../../etc/passwd","size":1}`,
	} {
		t.Run(name, func(t *testing.T) {
			var a Announcement
			err := decode(strings.NewReader(body), &a)
			if err == nil {
				err = a.validate()
			}
			if !errors.Is(err, ErrMessage) {
				t.Fatalf("accepted: %v", err)
			}
		})
	}
}

func FuzzAnnouncement(f *testing.F) {
	good, _ := json.Marshal(Announcement{Digest: digest.FromString("x"), Size: 9 << 20, Have: 4 << 20, Held: Bitmap{1}, Claimed: Bitmap{2}})
	f.Add(good)
	f.Add([]byte(`{"digest":"sha256:00","size":1e99}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var a Announcement
		if decode(bytes.NewReader(b), &a) != nil || a.validate() != nil {
			return
		}
		if a.Have > a.Size || len(a.Held) > len(NewBitmap(Segments(a.Size))) {
			t.Fatalf("accepted %+v", a)
		}
	})
}

func FuzzRange(f *testing.F) {
	f.Add("bytes=0-1")
	f.Add("bytes=5-18446744073709551615")
	f.Fuzz(func(t *testing.T, s string) {
		off, n, err := parseRange(s)
		if err == nil && (off < 0 || n <= 0 || n > maxRead || off+n < off) {
			t.Fatalf("%q: %d bytes at %d", s, n, off)
		}
	})
}
