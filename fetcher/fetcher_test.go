package fetcher

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// The torrent library keeps one global goroutine for its log levels.
		goleak.IgnoreAnyFunction("github.com/anacrolix/torrent.(*Client).statusUpdated"),
		// A ping of memberlist's under way when its node was closed ends by itself.
		goleak.IgnoreAnyFunction("github.com/hashicorp/memberlist.(*Memberlist).probeNode"))
}

// registry is a registry with blobs in memory that counts what it gives.
type registry struct {
	*httptest.Server
	served   atomic.Int64
	requests atomic.Int64
	noRanges atomic.Bool
	delay    atomic.Int64 // of each blob request, nanoseconds
	rate     atomic.Int64 // bytes a second of each body; 0 is no limit

	mu    sync.Mutex
	blobs map[digest.Digest][]byte
	wrong map[digest.Digest]bool // one byte off
	deny  bool
}

func newRegistry(t *testing.T) *registry {
	r := &registry{blobs: map[digest.Digest][]byte{}, wrong: map[digest.Digest]bool{}}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (r *registry) add(b []byte) ocispec.Descriptor {
	r.mu.Lock()
	defer r.mu.Unlock()
	d := digest.FromBytes(b)
	r.blobs[d] = b
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: int64(len(b))}
}

func (r *registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	if q.URL.Path == "/v2/" {
		return
	}
	r.requests.Add(1)
	d := digest.Digest(q.URL.Path[strings.LastIndexByte(q.URL.Path, '/')+1:])
	r.mu.Lock()
	b, ok := r.blobs[d]
	if r.wrong[d] {
		b = bytes.Clone(b)
		b[len(b)/2] ^= 1
	}
	deny := r.deny
	r.mu.Unlock()
	switch {
	case deny:
		w.WriteHeader(http.StatusForbidden)
		return
	case !ok:
		w.WriteHeader(http.StatusNotFound)
		return
	}
	time.Sleep(time.Duration(r.delay.Load()))
	if r.noRanges.Load() {
		q.Header.Del("Range")
	}
	http.ServeContent(counting{w, r}, q, "", time.Time{}, bytes.NewReader(b))
}

type counting struct {
	http.ResponseWriter
	r *registry
}

func (c counting) Write(p []byte) (int, error) {
	c.r.served.Add(int64(len(p))) // before: who has the last byte may look at once
	n, err := c.ResponseWriter.Write(p)
	c.r.served.Add(int64(n - len(p)))
	if rate := c.r.rate.Load(); rate > 0 {
		time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
	}
	return n, err
}

func (r *registry) ref(t *testing.T) reference.Named {
	ref, err := reference.ParseNormalizedNamed(strings.TrimPrefix(r.URL, "http://") + "/test/image:1")
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func (r *registry) origin(t *testing.T) *origin.Repository {
	c, err := origin.New(origin.Options{HostDirs: []string{}, Credentials: func(string) (string, string, error) { return "", "", nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	repo, err := c.Repository(r.ref(t))
	if err != nil {
		t.Fatal(err)
	}
	return repo
}

type testNode struct {
	*Fetcher
	dir string
}

func testLog() *slog.Logger {
	if os.Getenv("QUAY_TEST_LOG") != "" {
		return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return nil
}

func newNode(t *testing.T, dir string, s *trust.Secret, peers ...string) *testNode {
	t.Helper()
	st, err := store.Open(store.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	log := testLog()
	if log != nil {
		log = log.With("node", filepath.Base(dir))
	}
	f, err := New(t.Context(), Options{Store: st, Secret: s, Listen: "127.0.0.1", Peers: peers, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = f.Close()
		_ = st.Close()
	})
	return &testNode{f, dir}
}

func (n *testNode) blob(t *testing.T, desc ocispec.Descriptor, o Origin) *Blob {
	t.Helper()
	b, err := n.Blob(t.Context(), nil, desc, BlobOptions{Origin: o})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1, byte(n), byte(n >> 8), byte(n >> 16)}).Read(b)
	return b
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func contentOf(t *testing.T, b *Blob) []byte {
	t.Helper()
	f, err := b.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// Each size comes whole, once, and right: none, less than a piece, pieces and a
// bit, many segments.
func TestRegistryAlone(t *testing.T) {
	r := newRegistry(t)
	for _, size := range []int{0, 1, 1000, 256 << 10, 256<<10 + 1, 9<<20 + 7} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			n := newNode(t, t.TempDir(), nil)
			data := random(size)
			desc := r.add(data)
			before := r.served.Load()
			b := n.blob(t, desc, r.origin(t))
			if err := b.Wait(within(t, 20*time.Second)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(contentOf(t, b), data) {
				t.Fatal("other bytes")
			}
			if got := r.served.Load() - before; got != int64(size) {
				t.Errorf("registry gave %d bytes of a blob of %d", got, size)
			}
			p := b.Progress()
			if p.State != Complete || p.FromOrigin != int64(size) || p.Have != int64(size) {
				t.Errorf("progress: %+v", p)
			}
		})
	}
}

// What is here is not fetched again.
func TestSecondFetchIsFromTheStore(t *testing.T) {
	r := newRegistry(t)
	data := random(5 << 20)
	desc := r.add(data)
	dir := t.TempDir()
	for i := range 2 {
		st, err := store.Open(store.Options{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		f, err := New(t.Context(), Options{Store: st, Log: testLog()})
		if err != nil {
			t.Fatal(err)
		}
		var o Origin
		if i == 0 {
			o = r.origin(t)
		}
		b, err := f.Blob(t.Context(), nil, desc, BlobOptions{Origin: o})
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Wait(within(t, 10*time.Second)); err != nil {
			t.Fatal(err)
		}
		_ = b.Close()
		_ = f.Close()
		_ = st.Close()
	}
	if got := r.served.Load(); got != int64(len(data)) {
		t.Errorf("registry gave %d bytes", got)
	}
}

// A fetch that is broken off goes on where it was.
func TestResume(t *testing.T) {
	r := newRegistry(t)
	r.rate.Store(20 << 20)
	data := random(24 << 20)
	desc := r.add(data)
	dir := t.TempDir()
	func() {
		st, _ := store.Open(store.Options{Dir: dir})
		defer st.Close()
		f, err := New(t.Context(), Options{Store: st})
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b, err := f.Blob(t.Context(), nil, desc, BlobOptions{Origin: r.origin(t)})
		if err != nil {
			t.Fatal(err)
		}
		b.Fetch()
		for b.Progress().Have < 8<<20 {
			<-b.Changed()
		}
	}()
	r.rate.Store(0)
	n := newNode(t, dir, nil)
	b := n.blob(t, desc, r.origin(t))
	if cached := b.Progress().FromCache; cached < 8<<20 {
		t.Fatalf("only %d bytes survived", cached)
	}
	if err := b.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	// The cut may cost the pieces and socket buffers of each stream in flight.
	if got, most := r.served.Load(), int64(len(data))+streamsPerBlob*(4<<20); got > most {
		t.Errorf("registry gave %d bytes of %d", got, len(data))
	}
	if !bytes.Equal(contentOf(t, b), data) {
		t.Fatal("other bytes")
	}
}

// Reads anywhere come right at once, whatever else goes on.
func TestDemandReads(t *testing.T) {
	for _, bulk := range []bool{false, true} {
		t.Run(fmt.Sprintf("bulk=%v", bulk), func(t *testing.T) {
			r := newRegistry(t)
			r.rate.Store(30 << 20)
			data := random(16<<20 + 123)
			desc := r.add(data)
			b := newNode(t, t.TempDir(), nil).blob(t, desc, r.origin(t))
			if bulk {
				b.Fetch()
			}
			var g errgroup.Group
			for w := range 4 {
				g.Go(func() error {
					rng := rand.New(rand.NewPCG(uint64(w), 1))
					for range 10 {
						p := make([]byte, 1+rng.IntN(100_000))
						off := rng.Int64N(desc.Size - int64(len(p)))
						if _, err := b.ReadAt(within(t, 10*time.Second), p, off, Demand); err != nil {
							return err
						}
						if !bytes.Equal(p, data[off:off+int64(len(p))]) {
							return fmt.Errorf("other bytes at %d", off)
						}
					}
					return nil
				})
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			tail := make([]byte, 200)
			n, err := b.ReadAt(t.Context(), tail, desc.Size-100, Demand)
			if n != 100 || err != io.EOF || !bytes.Equal(tail[:n], data[desc.Size-100:]) {
				t.Errorf("read over the end: %d, %v", n, err)
			}
		})
	}
}

// A registry that knows no ranges is read once, whole.
func TestRegistryWithoutRanges(t *testing.T) {
	r := newRegistry(t)
	r.noRanges.Store(true)
	data := random(20 << 20)
	desc := r.add(data)
	b := newNode(t, t.TempDir(), nil).blob(t, desc, r.origin(t))
	if err := b.Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, b), data) {
		t.Fatal("other bytes")
	}
	if got := r.served.Load(); got > 2*int64(len(data)) {
		t.Errorf("registry gave %d bytes of %d", got, len(data))
	}
}

// Wrong bytes from the registry end in an error, and their end is not handed out.
func TestRegistryWithWrongBytes(t *testing.T) {
	r := newRegistry(t)
	data := random(3 << 20)
	desc := r.add(data)
	r.wrong[desc.Digest] = true
	b := newNode(t, t.TempDir(), nil).blob(t, desc, r.origin(t))
	rd := b.Reader(within(t, 20*time.Second))
	got, err := io.ReadAll(rd)
	_ = rd.Close()
	if !errors.Is(err, ErrMismatch) {
		t.Fatalf("err = %v", err)
	}
	if len(got) >= len(data) {
		t.Error("all of a wrong blob was handed out")
	}
	if b.Complete() {
		t.Error("a wrong blob is complete")
	}
	// The registry mends its ways, and so does the blob.
	r.mu.Lock()
	r.wrong[desc.Digest] = false
	r.mu.Unlock()
	n := b.d.f
	again, err := n.Blob(t.Context(), nil, desc, BlobOptions{Origin: r.origin(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
}

func TestRefusals(t *testing.T) {
	r := newRegistry(t)
	desc := ocispec.Descriptor{Digest: digest.FromString("nowhere"), Size: 1000}
	n := newNode(t, t.TempDir(), nil)
	if err := n.blob(t, desc, r.origin(t)).Wait(within(t, 10*time.Second)); !errors.Is(err, origin.ErrNotFound) {
		t.Errorf("unknown blob: %v", err)
	}
	other := ocispec.Descriptor{Digest: digest.FromString("elsewhere"), Size: 1000}
	if err := n.blob(t, other, nil).Wait(within(t, 10*time.Second)); !errors.Is(err, ErrNoSource) {
		t.Errorf("no source: %v", err)
	}
	if _, err := n.blob(t, desc, r.origin(t)).ReadAt(within(t, 10*time.Second), make([]byte, 10), 0, Demand); !errors.Is(err, origin.ErrNotFound) {
		t.Errorf("read of an unknown blob: %v", err)
	}
	if _, err := n.Blob(t.Context(), nil, ocispec.Descriptor{Digest: "sha256:../../x", Size: 1}, BlobOptions{}); err == nil {
		t.Error("a path was taken for a digest")
	}
	if _, err := New(t.Context(), Options{Store: n.Store(), Peers: []string{"127.0.0.1:1"}}); err == nil || !strings.Contains(err.Error(), "node secret") {
		t.Errorf("peers without a secret: %v", err)
	}
}

func secret() *trust.Secret {
	s := trust.NewSecret()
	return &s
}

// Cold nodes that start at once take one copy from the registry between them.
func TestCrowdTakesOneCopy(t *testing.T) {
	for _, size := range []int{100_000, 3 << 20, 48 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r := newRegistry(t)
			r.rate.Store(15 << 20)
			data := random(size)
			desc := r.add(data)
			s := secret()
			first := newNode(t, filepath.Join(t.TempDir(), "a"), s)
			nodes := []*testNode{first}
			for _, name := range []string{"b", "c"} {
				nodes = append(nodes, newNode(t, filepath.Join(t.TempDir(), name), s, first.Addr().String()))
			}
			for _, n := range nodes {
				for len(n.Members()) < 2 {
					time.Sleep(5 * time.Millisecond)
				}
			}
			var g errgroup.Group
			for _, n := range nodes {
				b := n.blob(t, desc, r.origin(t))
				g.Go(func() error { return b.Wait(within(t, 30*time.Second)) })
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			if got := r.served.Load(); float64(got) > 1.1*float64(size) {
				t.Errorf("registry gave %.2f copies", float64(got)/float64(size))
			}
		})
	}
}

// A node that may not ask the registry gets all from a peer that has it.
func TestPeersOnly(t *testing.T) {
	r := newRegistry(t)
	data := random(20 << 20)
	desc := r.add(data)
	s := secret()
	a := newNode(t, filepath.Join(t.TempDir(), "a"), s)
	if err := a.blob(t, desc, r.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	b := newNode(t, filepath.Join(t.TempDir(), "b"), s, a.Addr().String())
	blob := b.blob(t, desc, nil)
	p := make([]byte, 5000)
	if _, err := blob.ReadAt(within(t, 5*time.Second), p, 11<<20, Demand); err != nil || !bytes.Equal(p, data[11<<20:11<<20+5000]) {
		t.Fatalf("demand read from a peer: %v", err)
	}
	if err := blob.Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, blob), data) {
		t.Fatal("other bytes")
	}
	if got := r.served.Load(); got != int64(len(data)) {
		t.Errorf("registry gave %d bytes", got)
	}
	if pr := blob.Progress(); pr.FromPeers != int64(len(data)) {
		t.Errorf("progress: %+v", pr)
	}
}

// TestSeedOfWhatIsHere: a blob that was complete when it was opened was never
// fetched by this process, and is given to others all the same.
func TestSeedOfWhatIsHere(t *testing.T) {
	r := newRegistry(t)
	data := random(3 << 20)
	desc := r.add(data)
	s := secret()
	dir := filepath.Join(t.TempDir(), "a")
	before := newNode(t, dir, s)
	if err := before.blob(t, desc, r.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := before.Close(); err != nil {
		t.Fatal(err)
	}
	a := newNode(t, dir, s)
	if err := a.blob(t, desc, nil).Wait(within(t, 5*time.Second)); err != nil {
		t.Fatal(err)
	}
	b := newNode(t, filepath.Join(t.TempDir(), "b"), s, a.Addr().String())
	blob := b.blob(t, desc, nil)
	if err := blob.Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, blob), data) {
		t.Error("other bytes")
	}
}

// A peer whose disk lies is found out: the blob comes right all the same.
func TestPeerWithWrongBytes(t *testing.T) {
	for _, withRegistry := range []bool{true, false} {
		t.Run(fmt.Sprintf("registry=%v", withRegistry), func(t *testing.T) {
			r := newRegistry(t)
			data := random(12 << 20)
			desc := r.add(data)
			s := secret()
			honest := newNode(t, filepath.Join(t.TempDir(), "honest"), s)
			liar := newNode(t, filepath.Join(t.TempDir(), "liar"), s, honest.Addr().String())
			for _, n := range []*testNode{honest, liar} {
				if err := n.blob(t, desc, r.origin(t)).Wait(within(t, 20*time.Second)); err != nil {
					t.Fatal(err)
				}
			}
			spoil(t, liar.dir, int64(len(data)))
			var o Origin
			peers := []string{liar.Addr().String(), honest.Addr().String()}
			if withRegistry {
				o = r.origin(t)
				peers = peers[:1]
			}
			b := newNode(t, filepath.Join(t.TempDir(), "victim"), s, peers...).blob(t, desc, o)
			if err := b.Wait(within(t, 40*time.Second)); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(contentOf(t, b), data) {
				t.Fatal("other bytes")
			}
			b.d.mu.Lock()
			defer b.d.mu.Unlock()
			if b.d.banned[honest.NodeID()] && !b.d.banned[liar.NodeID()] {
				t.Errorf("banned: %v, the liar is %s", b.d.banned, liar.NodeID())
			}
		})
	}
}

// spoil changes every piece of the one blob below a store.
func spoil(t *testing.T, dir string, size int64) {
	t.Helper()
	found := false
	err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || info.IsDir() || info.Size() != size {
			return err
		}
		found = true
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		for off := int64(1000); off < size; off += 256 << 10 {
			if _, err := f.WriteAt([]byte("lies"), off); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil || !found {
		t.Fatalf("spoil: %v, found %v", err, found)
	}
}

// Who has another secret gets nothing, not even the knowledge that it is there.
func TestStrangerGetsNothing(t *testing.T) {
	r := newRegistry(t)
	desc := r.add(random(1 << 20))
	a := newNode(t, filepath.Join(t.TempDir(), "a"), secret())
	if err := a.blob(t, desc, r.origin(t)).Wait(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	b := newNode(t, filepath.Join(t.TempDir(), "b"), secret(), a.Addr().String())
	blob := b.blob(t, desc, nil)
	err := blob.Wait(within(t, 20*time.Second))
	if !errors.Is(err, ErrNoSource) {
		t.Fatalf("err = %v", err)
	}
	if have := blob.Progress().Have; have != 0 {
		t.Fatalf("a stranger got %d bytes", have)
	}
}

// A member that dies with a share does not hold up the others for long.
func TestShareOfADeadNodeIsHandedOn(t *testing.T) {
	r := newRegistry(t)
	r.rate.Store(10 << 20)
	data := random(32 << 20)
	desc := r.add(data)
	s := secret()
	a := newNode(t, filepath.Join(t.TempDir(), "a"), s)
	b := newNode(t, filepath.Join(t.TempDir(), "b"), s, a.Addr().String())
	for len(a.Members()) < 1 || len(b.Members()) < 1 {
		time.Sleep(5 * time.Millisecond)
	}
	blob := a.blob(t, desc, r.origin(t))
	blob.Fetch()
	dying := b.blob(t, desc, r.origin(t))
	dying.Fetch()
	for dying.Progress().Have < 6<<20 {
		<-dying.Changed()
	}
	_ = b.Close()
	if err := blob.Wait(within(t, 25*time.Second)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(contentOf(t, blob), data) {
		t.Fatal("other bytes")
	}
}

func TestStatesFollowTheTable(t *testing.T) {
	all := []State{Waiting, Fetching, Verifying, Complete, Failed}
	for _, from := range all {
		for _, to := range all {
			allowed := from == to
			for _, f := range follows[from] {
				allowed = allowed || f == to
			}
			func() {
				d := &download{state: from}
				defer func() {
					if p := recover(); (p == nil) != allowed {
						t.Errorf("%s → %s: allowed %v, panic %v", from, to, allowed, p)
					}
				}()
				d.setState(to)
			}()
		}
	}
}
