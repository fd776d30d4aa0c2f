package fetcher

import (
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// forger is a member that signs for wrong content and, unless mute, sends that very
// content: its disk was changed after the blob was checked.
func forger(t *testing.T, s *trust.Secret, r *registry, desc ocispec.Descriptor, mute bool, peers ...string) *testNode {
	t.Helper()
	before := newNode(t, t.TempDir(), s)
	if err := before.blob(t, desc, r.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	_ = before.Close()
	_ = before.o.Store.Close()
	spoil(t, before.dir, desc.Size)
	st, err := store.Open(store.Options{Dir: before.dir})
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Store: st, Secret: s, Listen: "127.0.0.1", Peers: peers, Log: testLog()}
	if mute {
		o.UploadRatePerBlob = 1
	}
	f, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		_ = st.Close()
	})
	return &testNode{f, before.dir}
}

// TestLieInThePieceTable: a member signs for other content than the blob has, and
// sends it. The digest shows it; the blob completes right, by the registry or, when
// that may not be asked, by the honest peer.
func TestLieInThePieceTable(t *testing.T) {
	r := newRegistry(t)
	data := random(6 << 20)
	desc := r.add(data)
	for _, c := range []struct {
		name             string
		registry, honest bool
		mute             bool
	}{
		{name: "registry", registry: true},
		{name: "registry and an honest peer", registry: true, honest: true},
		{name: "an honest peer", honest: true},
		{name: "an honest peer, and the liar sends nothing", honest: true, mute: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := secret()
			var others []*testNode
			var at []string
			if c.honest { // it has the blob before it knows the liar
				n := newNode(t, t.TempDir(), s)
				right(t, n.blob(t, desc, r.origin(t)), data, 20*time.Second)
				others, at = append(others, n), append(at, n.Addr().String())
			}
			liar := forger(t, s, r, desc, c.mute, at...)
			others = append(others, liar)
			victim := newNode(t, t.TempDir(), s, liar.Addr().String())
			acquainted(t, len(others), append(others, victim)...)
			known(t, desc.Digest, len(others), append(others, victim)...)
			var o Origin
			if c.registry {
				o = r.origin(t)
			}
			b := victim.blob(t, desc, o)
			took := right(t, b, data, 90*time.Second)
			t.Logf("in %s, liar banned for %q", took.Round(time.Millisecond), banned(b, liar))
			if why := banned(b, others[0]); c.honest && (why == WrongBytes || why == FalseTable) {
				t.Errorf("the honest node is banned for %s", why)
			}
			if !c.mute && !c.honest && banned(b, liar) != FalseTable {
				t.Errorf("the liar is banned for %q", banned(b, liar))
			}
		})
	}
}

// TestStatementsOfNobody: what is not signed by who it names is not learnt, and
// neither is anything about pieces that the blob does not have.
func TestStatementsOfNobody(t *testing.T) {
	r := newRegistry(t)
	data := random(1 << 20)
	desc := r.add(data)
	n := newNode(t, t.TempDir(), secret())
	b := n.blob(t, desc, nil)
	id, err := n.o.Secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	sums := []cluster.PieceSum{sha256.Sum256([]byte("x")), sha256.Sum256([]byte("y"))}
	good := cluster.Sign(id, desc.Digest, desc.Size, []int{0, 1}, sums)
	renamed, other, beyond := good, cluster.Sign(id, desc.Digest, desc.Size+1, []int{0, 1}, sums), cluster.Sign(id, desc.Digest, desc.Size, []int{16, 1 << 40}, sums)
	renamed.By = n.NodeID()
	for name, said := range map[string]cluster.Statement{"signed by another": renamed, "about another blob": other, "about pieces beyond the end": beyond} {
		if got := b.d.table.learn([]cluster.Statement{said}); got != 0 || len(b.d.table.words) != 0 {
			t.Errorf("%s: %d learnt, %d words", name, got, len(b.d.table.words))
		}
	}
	if got := b.d.table.learn([]cluster.Statement{good}); got != 2 {
		t.Errorf("%d learnt of a good statement about 2 pieces", got)
	}
	// Who was found out is not heard any more, whoever passes it on.
	b.d.disbelieve(id.ID())
	if got := b.d.table.learn([]cluster.Statement{good}); got != 0 || len(b.d.table.words) != 0 {
		t.Errorf("%d learnt of a liar, %d words", got, len(b.d.table.words))
	}
	if fmt.Sprint(b.d.bannedFor[id.ID()]) != string(FalseTable) {
		t.Errorf("banned for %q", b.d.bannedFor[id.ID()])
	}
}
