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
	"net/netip"
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
	mu    sync.Mutex
	blob  []byte
	have  int64
	heard []Member
}

func (h *memory) digest() digest.Digest { return digest.FromBytes(h.blob) }

func (h *memory) Announced(_ context.Context, from Member, a Announcement) Announcement {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.heard = append(h.heard, from)
	if a.Digest != h.digest() {
		return Announcement{Digest: a.Digest, Absent: true}
	}
	return Announcement{Digest: a.Digest, Size: int64(len(h.blob)), Have: h.have}
}

func (h *memory) ReadHeld(_ context.Context, w io.Writer, d digest.Digest, off, n int64, _ bool) error {
	if d != h.digest() || off+n > h.have {
		return ErrNotHeld
	}
	_, err := w.Write(h.blob[off : off+n])
	return err
}

// node starts a member on loopback that knows the given peers.
func node(t *testing.T, s trust.Secret, h Holder, peers ...string) (*Cluster, string) {
	t.Helper()
	id, err := s.Identity()
	if err != nil {
		t.Fatal(err)
	}
	l, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	c := New(Options{
		ID: id.ID(), PeerID: trust.PeerID, Client: id.Client(trust.ProtoHTTP1),
		Port: l.Addr().Port(), Peers: peers, Holder: h,
	})
	srv := &http.Server{Handler: c.Handler()}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l.HTTP()) }()
	t.Cleanup(func() {
		c.Close()
		_ = srv.Close()
		_ = l.Close()
		<-served
	})
	return c, l.Addr().String()
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

// One address is enough for every node to find every other.
func TestMembershipSpreads(t *testing.T) {
	s := trust.NewSecret()
	a, addr := node(t, s, &memory{})
	b, _ := node(t, s, &memory{}, addr)
	c, _ := node(t, s, &memory{}, addr)
	for _, n := range []*Cluster{a, b, c} {
		eventually(t, "two members each", func() bool { return len(n.Members()) == 2 })
	}
}

// A stranger learns nothing and is not learned of.
func TestOtherSecretIsNoMember(t *testing.T) {
	a, addr := node(t, trust.NewSecret(), &memory{})
	b, _ := node(t, trust.NewSecret(), &memory{}, addr)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	b.Ready(ctx)
	if got := append(a.Members(), b.Members()...); len(got) != 0 {
		t.Fatalf("members across secrets: %v", got)
	}
	err := b.ReadAt(ctx, Member{ID: a.ID(), Addr: netip.MustParseAddrPort(addr)}, digest.FromString("x"), make([]byte, 1), 0, false)
	if err == nil || errors.Is(err, ErrNotHeld) {
		t.Fatalf("a stranger got an answer: %v", err)
	}
}

func TestAnnounceAndRead(t *testing.T) {
	s := trust.NewSecret()
	h := &memory{blob: make([]byte, 1<<20)}
	_, _ = rand.Read(h.blob)
	h.have = 1 << 19
	_, addr := node(t, s, h)
	b, _ := node(t, s, &memory{}, addr)
	eventually(t, "a member", func() bool { return len(b.Members()) == 1 })

	said := b.Announce(t.Context(), Announcement{Digest: h.digest(), Size: int64(len(h.blob))})
	if len(said) != 1 || said[0].Have != h.have {
		t.Fatalf("answers: %+v", said)
	}
	if said := b.Announce(t.Context(), Announcement{Digest: digest.FromString("other")}); len(said) != 0 {
		t.Fatalf("absent blobs are not answers: %+v", said)
	}
	p := make([]byte, 4096)
	if err := b.ReadAt(t.Context(), said[0].Member, h.digest(), p, 8192, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(p, h.blob[8192:8192+4096]) {
		t.Fatal("other bytes")
	}
	if err := b.ReadAt(t.Context(), said[0].Member, h.digest(), p, h.have, false); !errors.Is(err, ErrNotHeld) {
		t.Fatalf("reading what is not held: %v", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.heard) == 0 || h.heard[0].ID != b.ID() {
		t.Fatalf("the sender is %v, want %s", h.heard, b.ID())
	}
}

// A member that goes away is not counted on after it failed to answer.
func TestMemberThatDoesNotAnswerIsDropped(t *testing.T) {
	s := trust.NewSecret()
	id, _ := s.Identity()
	l, err := trust.Listen("127.0.0.1", trust.PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	gone := New(Options{ID: id.ID(), PeerID: trust.PeerID, Client: id.Client(trust.ProtoHTTP1), Port: l.Addr().Port(), Holder: &memory{}})
	srv := &http.Server{Handler: gone.Handler()}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l.HTTP()) }()
	b, _ := node(t, s, &memory{}, l.Addr().String())
	eventually(t, "a member", func() bool { return len(b.Members()) == 1 })
	gone.Close()
	_ = srv.Close()
	_ = l.Close()
	<-served
	if said := b.Announce(t.Context(), Announcement{Digest: digest.FromString("x")}); len(said) != 0 {
		t.Fatalf("answer from the dead: %v", said)
	}
	if m := b.Members(); len(m) != 0 {
		t.Fatalf("members: %v", m)
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
	_, addr := node(t, trust.NewSecret(), h)
	_ = addr
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
			var a announce
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
		var a announce
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
