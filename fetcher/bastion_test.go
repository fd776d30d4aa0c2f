package fetcher

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// team is a registry with one image, for alice alone unless it is public.
type team struct {
	*httptest.Server
	index, manifest, config, layer []byte

	mu       sync.Mutex
	public   bool
	requests []string // method, path and user of each
}

var linux = ocispec.Platform{OS: "linux", Architecture: "amd64"}

func newTeam(t *testing.T) *team {
	r := &team{config: []byte(`{"architecture":"amd64","os":"linux"}`), layer: random(1 << 20)}
	desc := func(mediaType string, b []byte) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	}
	r.manifest = jsonOf(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: desc(ocispec.MediaTypeImageConfig, r.config),
		Layers: []ocispec.Descriptor{desc(ocispec.MediaTypeImageLayerGzip, r.layer)},
	})
	m := desc(ocispec.MediaTypeImageManifest, r.manifest)
	m.Platform = &linux
	r.index = jsonOf(t, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{m},
	})
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func jsonOf(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (r *team) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	user, password, _ := q.BasicAuth()
	r.mu.Lock()
	r.requests = append(r.requests, q.Method+" "+q.URL.Path+" "+user)
	public := r.public
	r.mu.Unlock()
	if !public && (user != "alice" || password != "sesame") {
		w.Header().Set("Www-Authenticate", `Basic realm="team"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	what := q.URL.Path[strings.LastIndexByte(q.URL.Path, '/')+1:]
	for _, b := range [][]byte{r.index, r.manifest, r.config, r.layer} {
		if what != digest.FromBytes(b).String() && (what != "1" || !bytes.Equal(b, r.index)) {
			continue
		}
		switch {
		case bytes.Equal(b, r.index):
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		case bytes.Equal(b, r.manifest):
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		}
		http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(b))
		return
	}
	w.WriteHeader(http.StatusNotFound)
}

// asked is how many requests there were by a user since the last call; "" is nobody.
func (r *team) asked(user string) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, q := range r.requests {
		if strings.HasSuffix(q, " "+user) {
			n++
		}
	}
	r.requests = nil
	return n
}

func (r *team) host() string { return strings.TrimPrefix(r.URL, "http://") }

func (r *team) ref(t *testing.T, tag string) reference.Named {
	t.Helper()
	ref, err := reference.ParseNormalizedNamed(r.host() + "/team/app" + tag)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

// client asks with a login; "" is none.
func client(t *testing.T, user, password string) *origin.Client {
	t.Helper()
	c, err := origin.New(origin.Options{HostDirs: []string{}, MaxRetries: -1, Credentials: func(string) (string, string, error) { return user, password, nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// bastionNode starts a node of a cluster with the options that matter here.
func bastionNode(t *testing.T, s *trust.Secret, o Options) *testNode {
	t.Helper()
	dir := t.TempDir()
	st, err := store.Open(store.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	o.Store, o.Secret, o.Listen, o.Log = st, s, "127.0.0.1", testLog()
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

// gateway is a member that asks the registry for others, and a bastion beside it.
func gateway(t *testing.T, r *team) (member, bastion *testNode) {
	t.Helper()
	s := secret()
	member = bastionNode(t, s, Options{Behalf: &origin.Options{HostDirs: []string{}, Own: []string{r.host()}}})
	bastion = bastionNode(t, s, Options{Reach: ThroughMembers, Peers: []string{member.Addr().String()}})
	return member, bastion
}

func nothingIn(t *testing.T, n *testNode) {
	t.Helper()
	refs, err := n.Store().Refs()
	blobs, berr := n.Store().List()
	if err != nil || berr != nil || len(refs) != 0 || len(blobs) != 0 {
		t.Errorf("the store has %d names and %d blobs, %v %v", len(refs), len(blobs), err, berr)
	}
}

// A bastion pulls a private image that no member has, by its tag: the member asks the registry with the user's
// credentials, and fetches the layers for it.
func TestBastionPulls(t *testing.T) {
	r := newTeam(t)
	member, bastion := gateway(t, r)
	img, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: client(t, "alice", "sesame"), Platform: linux})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if img.Target.Digest != digest.FromBytes(r.index) || img.Note != "" {
		t.Errorf("target %s, note %q", img.Target.Digest, img.Note)
	}
	if img.Access() == "" || img.Access() == origin.Public {
		t.Errorf("access %q", img.Access())
	}
	if err := img.Fetch(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	for _, p := range img.Progress() {
		if p.State != Complete || p.FromOrigin != 0 {
			t.Errorf("%+v", p)
		}
	}
	if info, err := member.Store().Stat(digest.FromBytes(r.layer)); err != nil || !info.Complete {
		t.Errorf("the member has %+v, %v", info, err)
	}
}

// A program on a bastion reads of a layer that no member has begun to fetch.
func TestBastionReads(t *testing.T) {
	r := newTeam(t)
	_, bastion := gateway(t, r)
	c := client(t, "alice", "sesame")
	repo, err := c.Repository(r.ref(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	desc := ocispec.Descriptor{Digest: digest.FromBytes(r.layer), Size: int64(len(r.layer))}
	b, err := bastion.Layer(t.Context(), r.ref(t, ""), desc, Way{Repository: repo, Client: c})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	p := make([]byte, 1000)
	begun := time.Now()
	if _, err := b.ReadAt(within(t, 20*time.Second), p, 700_000, Demand); err != nil || !bytes.Equal(p, r.layer[700_000:701_000]) {
		t.Errorf("%v, or wrong bytes", err)
	}
	t.Logf("the first read took %s", time.Since(begun))
	// With peers only, no member is asked for anything.
	other, err := bastion.Layer(t.Context(), r.ref(t, ""), ocispec.Descriptor{Digest: digest.FromBytes(r.config), Size: int64(len(r.config))}, Way{Repository: repo, Client: c, PeersOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if _, err := other.ReadAt(within(t, 20*time.Second), p[:10], 0, Demand); !errors.Is(err, ErrNoSource) {
		t.Error(err)
	}
}

// The registry's refusal is final through a member, and nothing of the image is kept anywhere.
func TestBastionIsRefused(t *testing.T) {
	r := newTeam(t)
	member, bastion := gateway(t, r)
	for _, login := range [][2]string{{"", ""}, {"mallory", "guess"}} {
		_, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: client(t, login[0], login[1])})
		if !errors.Is(err, origin.ErrDenied) || errors.Is(err, origin.ErrUnavailable) || !strings.Contains(err.Error(), "asked through node") {
			t.Errorf("%q: %v", login, err)
		}
	}
	if _, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":2"), ImageOptions{Origin: client(t, "alice", "sesame")}); !errors.Is(err, origin.ErrNotFound) {
		t.Error(err)
	}
	nothingIn(t, bastion)
	nothingIn(t, member)
	if r.asked("") == 0 {
		t.Error("the registry was never asked")
	}
}

// A member has credentials of its own and an image of theirs; a question without them gets the registry's word, not its.
func TestMemberLendsNoCredential(t *testing.T) {
	r := newTeam(t)
	member, bastion := gateway(t, r)
	mine, err := member.Image(t.Context(), r.ref(t, ":1"), ImageOptions{Origin: client(t, "alice", "sesame"), Platform: linux})
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	r.asked("alice")
	if _, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: client(t, "", "")}); !errors.Is(err, origin.ErrDenied) {
		t.Error(err)
	}
	if n := r.asked("alice"); n != 0 {
		t.Errorf("the registry was asked %d times with the member's credential", n)
	}
}

// Nobody reaches the registry: what members saw is told, taken only when asked for, and only by who may have it.
func TestOffline(t *testing.T) {
	r := newTeam(t)
	member, bastion := gateway(t, r)
	mine, err := member.Image(t.Context(), r.ref(t, ":1"), ImageOptions{Origin: client(t, "alice", "sesame"), Platform: linux})
	if err != nil {
		t.Fatal(err)
	}
	if err := mine.Fetch(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	mine.Close()
	r.Close()
	target := digest.FromBytes(r.index).String()
	nobody := func(store.Ref) bool { return false }
	as := func(c *origin.Client) func(store.Ref) bool {
		return func(s store.Ref) bool { return c.Accepted(r.ref(t, ":1"), s.Access) }
	}
	alice, mallory := client(t, "alice", "sesame"), client(t, "mallory", "guess")
	for _, test := range []struct {
		name string
		o    ImageOptions
		says string // in the error; "": there is none
		not  string
	}{
		{"not asked for", ImageOptions{Origin: alice, AllowCached: as(alice)}, "use --offline to take the digest " + target, ""},
		{"another user", ImageOptions{Origin: mallory, AllowCached: as(mallory), Offline: true}, "not available", target},
		{"nobody", ImageOptions{Origin: client(t, "", ""), AllowCached: nobody, Offline: true}, "not available", target},
		{"the user who was let in", ImageOptions{Origin: alice, AllowCached: as(alice), Offline: true}, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.o.Platform = linux
			img, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":1"), test.o)
			if test.says != "" {
				if !errors.Is(err, origin.ErrUnavailable) || !strings.Contains(err.Error(), test.says) || test.not != "" && strings.Contains(err.Error(), test.not) {
					t.Error(err)
				}
				nothingIn(t, bastion)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer img.Close()
			if !strings.Contains(img.Note, "using "+target) || !strings.Contains(img.Note, "ago") {
				t.Errorf("note %q", img.Note)
			}
			if err := img.Fetch(within(t, 20*time.Second)); err != nil {
				t.Error(err)
			}
		})
	}
	// From now on it is in this node's own store, so --offline is not needed.
	if img, err := bastion.Image(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: alice, AllowCached: as(alice), Platform: linux}); err != nil {
		t.Error(err)
	} else {
		_ = img.Close()
	}
}

// A node that may ask the registry itself does, and finds out that it is away before it asks a member for what that saw.
func TestDirectNodeOffline(t *testing.T) {
	r := newTeam(t)
	r.public = true
	member, _ := gateway(t, r)
	if _, _, err := member.Manifest(t.Context(), r.ref(t, ":1"), ImageOptions{Origin: client(t, "", "")}); err != nil {
		t.Fatal(err)
	}
	r.Close()
	other := bastionNode(t, member.o.Secret, Options{Peers: []string{member.Addr().String()}})
	_, _, err := other.Manifest(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: client(t, "", ""), AllowCached: func(s store.Ref) bool { return s.Access == origin.Public }})
	if !errors.Is(err, origin.ErrUnavailable) || !strings.Contains(err.Error(), "use --offline") {
		t.Error(err)
	}
	desc, _, err := other.Manifest(within(t, 20*time.Second), r.ref(t, ":1"), ImageOptions{Origin: client(t, "", ""), Offline: true, AllowCached: func(s store.Ref) bool { return s.Access == origin.Public }})
	if err != nil || desc.Digest != digest.FromBytes(r.index) {
		t.Errorf("%s, %v", desc.Digest, err)
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "a moment", 90 * time.Second: "90 s", 3 * time.Minute: "3 min", 3*time.Hour + time.Minute: "3 h", 100 * time.Hour: "4 days",
	} {
		if got := span(d); got != want {
			t.Errorf("%s: %s", d, got)
		}
	}
}

// What a member says is a manifest must be one, of the kind it says.
func TestHostileManifests(t *testing.T) {
	image := []byte(`{"schemaVersion":2,"config":{},"layers":[]}`)
	for name, a := range map[string]cluster.Answer{
		"no JSON":      {MediaType: ocispec.MediaTypeImageManifest, Body: []byte("manifest")},
		"another kind": {MediaType: ocispec.MediaTypeImageIndex, Body: image},
		"no type":      {Body: image},
		"both at once": {MediaType: ocispec.MediaTypeImageManifest, Body: []byte(`{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}`)},
	} {
		a.Digest, a.Source = digest.FromBytes(a.Body), cluster.FromRegistry
		var r reply
		if err := r.take(cluster.Member{}, a, cluster.Question{}, ""); err == nil || r.live != nil || r.seen != nil {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
	var r reply
	for _, age := range []int64{7200, 60, 3600} {
		if err := r.take(cluster.Member{}, cluster.Answer{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(image), Body: image, Source: cluster.FromCache, Age: age}, cluster.Question{}, ""); err != nil {
			t.Fatal(err)
		}
	}
	if r.live != nil || r.seen == nil || r.seen.age != time.Minute {
		t.Errorf("the newest that was seen is %+v", r.seen)
	}
}
