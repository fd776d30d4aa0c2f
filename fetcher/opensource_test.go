package fetcher

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/tracker"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// announceAt is the URL of a tracker on loopback.
func announceAt(t *testing.T) string {
	srv := httptest.NewServer(tracker.New(tracker.Options{}))
	t.Cleanup(srv.Close)
	return srv.URL + "/announce"
}

// torrentOf publishes bytes as the layer desc, which a liar's are not of.
func torrentOf(t *testing.T, b []byte, desc ocispec.Descriptor, announce string) *published.Torrent {
	t.Helper()
	is := desc
	is.Digest = desc.Digest.Algorithm().FromBytes(b)
	p, err := published.Make(t.Context(), published.MakeOptions{
		Layer: is, Trackers: []string{announce}, Private: true,
		Open: func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	claim := *p
	claim.Layer = desc
	return &claim
}

// newOpenNode is a node in open swarms on loopback.
func newOpenNode(t *testing.T, s *trust.Secret, o Options) *Fetcher {
	t.Helper()
	st, err := store.Open(store.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	o.Store, o.Secret, o.Listen, o.Log = st, s, "127.0.0.1", testLog()
	o.Open = &OpenOptions{Listen: "127.0.0.1"}
	f, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		_ = st.Close()
	})
	return f
}

// seedOpen has a node fetch a blob and give it to the open swarm.
func seedOpen(t *testing.T, f *Fetcher, reg *registry, desc ocispec.Descriptor, p *published.Torrent) *Blob {
	t.Helper()
	b := openBlob(t, f, desc, reg.origin(t))
	if err := b.Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := b.d.addTorrent(p, true); err != nil {
		t.Fatal(err)
	}
	return b
}

func openBlob(t *testing.T, f *Fetcher, desc ocispec.Descriptor, o Origin) *Blob {
	t.Helper()
	b, err := f.Blob(t.Context(), nil, desc, BlobOptions{Origin: o})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// Two nodes that share no secret: one has the layer, the other has the torrent and may not ask the registry.
func TestOpenSwarmAlone(t *testing.T) {
	reg := newRegistry(t)
	content := random(9<<20 + 12345)
	desc := reg.add(content)
	p := torrentOf(t, content, desc, announceAt(t))
	seed := seedOpen(t, newOpenNode(t, nil, Options{}), reg, desc, p)
	served := reg.served.Load()

	f := newOpenNode(t, nil, Options{})
	b := openBlob(t, f, desc, nil)
	if err := b.d.addTorrent(p, true); err != nil {
		t.Fatal(err)
	}
	// A read before there is anything begins the fetch and waits for it.
	head := make([]byte, 100)
	if _, err := b.ReadAt(within(t, 20*time.Second), head, 5<<20, Demand); err != nil || !bytes.Equal(head, content[5<<20:5<<20+100]) {
		t.Fatal(err)
	}
	if err := b.Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, b), content) {
		t.Error("other bytes")
	}
	if n := reg.served.Load() - served; n != 0 {
		t.Errorf("the registry gave %d bytes", n)
	}
	if pr := b.Progress(); pr.FromPeers != desc.Size || pr.FromOrigin != 0 {
		t.Errorf("%+v", pr)
	}
	if pr := seed.Progress(); pr.Uploaded < desc.Size {
		t.Errorf("uploaded %d", pr.Uploaded)
	}
}

// A node without open swarms opens no port for them, and says why it takes no torrent.
func TestNoOpenSwarm(t *testing.T) {
	reg := newRegistry(t)
	content := random(1 << 20)
	desc := reg.add(content)
	p := torrentOf(t, content, desc, announceAt(t))
	b := newNode(t, t.TempDir(), nil).blob(t, desc, nil)
	if err := b.d.addTorrent(p, true); !errors.Is(err, errNoOpen) {
		t.Errorf("%v", err)
	}
	f := newOpenNode(t, nil, Options{})
	b = openBlob(t, f, desc, reg.origin(t))
	if err := b.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if f.opens.private != nil || f.opens.public != nil {
		t.Error("an open swarm began without need")
	}
}

// The metainfo has the right form and the hashes of something else, which its swarm sends: the blob comes from the registry all the same.
func TestWrongMetainfo(t *testing.T) {
	for _, registry := range []bool{true, false} {
		t.Run(map[bool]string{true: "registry", false: "another torrent"}[registry], func(t *testing.T) {
			reg := newRegistry(t)
			content, other := random(32<<20), random(32<<20)
			for i := range other {
				other[i] ^= 0x55
			}
			desc, lie := reg.add(content), reg.add(other)
			announce := announceAt(t)
			seedOpen(t, newOpenNode(t, nil, Options{}), reg, lie, torrentOf(t, other, lie, announce))
			wrong, right := torrentOf(t, other, desc, announce), torrentOf(t, content, desc, announce)
			f := newOpenNode(t, nil, Options{})
			var source Origin
			if registry {
				source = reg.origin(t)
				reg.rate.Store(8 << 20)
			}
			b := openBlob(t, f, desc, source)
			if err := b.d.addTorrent(wrong, true); err != nil {
				t.Fatal(err)
			}
			if !registry {
				seedOpen(t, newOpenNode(t, nil, Options{}), reg, desc, right)
				if err := b.d.addTorrent(right, true); err != nil {
					t.Fatal(err)
				}
			}
			if err := b.Wait(within(t, 60*time.Second)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(contentOf(t, b), content) {
				t.Error("other bytes")
			}
			if b.Progress().FromPeers == 0 {
				t.Error("nothing came from the wrong torrent: the test shows nothing")
			}
			if name := torrentSupplier + wrong.InfoHash.HexString(); !b.d.banned[name] {
				t.Error("the wrong torrent is still used")
			}
			if err := b.d.addTorrent(wrong, true); err == nil {
				t.Error("the wrong torrent was taken again")
			}
		})
	}
}

// With nothing but a wrong torrent the fetch fails, and says that the bytes are wrong.
func TestOnlyWrongMetainfo(t *testing.T) {
	reg := newRegistry(t)
	content, other := random(2<<20), random(2<<20 + 1)[:2<<20]
	desc, lie := reg.add(content), reg.add(other)
	announce := announceAt(t)
	seedOpen(t, newOpenNode(t, nil, Options{}), reg, lie, torrentOf(t, other, lie, announce))
	b := openBlob(t, newOpenNode(t, nil, Options{}), desc, nil)
	if err := b.d.addTorrent(torrentOf(t, other, desc, announce), true); err != nil {
		t.Fatal(err)
	}
	if err := b.Wait(within(t, 30*time.Second)); !errors.Is(err, ErrMismatch) {
		t.Errorf("%v", err)
	}
}

// A swarm that has everything and sends nothing costs the registry's fetch nothing to speak of.
func TestSilentOpenSwarm(t *testing.T) {
	reg := newRegistry(t)
	content := random(64 << 20)
	desc := reg.add(content)
	p := torrentOf(t, content, desc, announceAt(t))
	seedOpen(t, newOpenNode(t, nil, Options{UploadRate: 1}), reg, desc, p)
	fetch := func(torrent bool) time.Duration {
		b := openBlob(t, newOpenNode(t, nil, Options{}), desc, reg.origin(t))
		if torrent {
			if err := b.d.addTorrent(p, true); err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(10 * time.Second); b.Progress().Peers == 0; {
				if time.Now().After(end) {
					t.Fatal("no peer")
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		begun := time.Now()
		if err := b.Wait(within(t, 30*time.Second)); err != nil {
			t.Fatal(err)
		}
		return time.Since(begun)
	}
	reg.rate.Store(8 << 20) // of each of two streams: four seconds
	alone := fetch(false)
	with := fetch(true)
	t.Logf("alone %s, beside a silent swarm %s", alone, with)
	// On a quiet machine the two are equal; a fetch that waited for the swarm would never end.
	if with > alone*3/2+time.Second {
		t.Errorf("%s alone, %s beside a silent swarm", alone, with)
	}
}

// Within a trust domain members get from a node what it has from the registry, and what came by a torrent only when its digest was checked.
func TestOpenPiecesAreNotVouchedFor(t *testing.T) {
	reg := newRegistry(t)
	content := random(8 << 20)
	desc := reg.add(content)
	p := torrentOf(t, content, desc, announceAt(t))
	seedOpen(t, newOpenNode(t, nil, Options{}), reg, desc, p)
	secret := trust.NewSecret()
	f := newOpenNode(t, &secret, Options{})
	b := openBlob(t, f, desc, nil)
	if err := b.d.addTorrent(p, true); err != nil {
		t.Fatal(err)
	}
	b.d.enter()
	// One piece by the torrent, without a fetch that would complete the blob.
	ctx := within(t, 20*time.Second)
	for !b.d.st.Has(3) {
		b.d.wishOpen(3, 3)
		if sleep(ctx, 10*time.Millisecond) != nil {
			t.Fatal("piece 3 does not come")
		}
	}
	for len(b.d.supplierOf(3)) == 0 && sleep(ctx, time.Millisecond) == nil {
	}
	if by := b.d.supplierOf(3); !strings.HasPrefix(by, torrentSupplier) {
		t.Fatalf("piece 3 is by %q", by)
	}
	if said := b.d.table.statements([]int{3}); len(said) != 0 {
		t.Errorf("vouched for: %v", said)
	}
	off, n := b.d.st.PieceRange(3)
	if err := (holder{f}).ReadHeld(ctx, io.Discard, nil, desc.Digest, off, n, false); err == nil {
		t.Error("a member got it")
	}
	if err := b.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if said := b.d.table.statements([]int{3}); len(said) != 1 {
		t.Errorf("not vouched for when all was checked: %v", said)
	}
}

// Trackers that only a torrent names may not have this node ask itself, or its cloud.
func TestElsewhere(t *testing.T) {
	for tracker, want := range map[string]bool{
		"http://127.0.0.1:6969/announce": false, "http://localhost/announce": false, "udp://[::1]:6969": false,
		"http://169.254.169.254/latest/meta-data": false, "http://[fe80::1]/announce": false, "http://0.0.0.0/announce": false,
		"http://[::ffff:127.0.0.1]/announce": false, "http:///announce": false, "http://name.invalid/announce": false,
		"http://10.1.2.3:6969/announce": true, "http://192.0.2.7/announce": true, "udp://[2001:db8::1]:6969": true,
	} {
		if got := elsewhere(t.Context(), tracker); got != want {
			t.Errorf("%s: %v", tracker, got)
		}
	}
}

func (d *download) supplierOf(i int) supplier {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.supplier[i]
}
