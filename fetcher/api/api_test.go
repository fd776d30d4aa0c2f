package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestSession(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	st, err := w.client.Status(ctx)
	if err != nil || st.Version != "1.2.3" || st.Mirror != "127.0.0.1:1" {
		t.Errorf("status %+v, %v", st, err)
	}
	s := w.open()
	if s.Ref().String() != w.registry.Ref("team/app:1") || s.Image.Target.Digest != w.img.Manifest.Digest ||
		s.Image.Config.Digest != w.img.Config.Digest || len(s.Image.Layers) != 2 || s.Image.Note != "" {
		t.Errorf("image %+v", s.Image)
	}
	for _, p := range s.Progress() {
		if p.State != fetcher.Waiting || p.Have != 0 {
			t.Errorf("progress before anything was asked: %+v", p)
		}
	}
	for _, d := range []ocispec.Descriptor{s.Image.Target, s.Image.Config, s.Image.Layers[0]} {
		r, err := s.Open(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if cerr := r.Close(); err != nil || cerr != nil || !bytes.Equal(b, w.content(d)) {
			t.Errorf("%s: %d bytes, %v, %v", d.Digest, len(b), err, cerr)
		}
	}
	if err := s.Fetch(ctx); err != nil {
		t.Fatal(err)
	}
	ps := s.Progress()
	if len(ps) != 3 {
		t.Fatalf("progress of %d parts", len(ps))
	}
	for _, p := range ps {
		if p.State != fetcher.Complete || p.Have != p.Size || p.FromOrigin != p.Size {
			t.Errorf("progress at the end: %+v", p)
		}
	}
	if st, err := w.client.Status(ctx); err != nil || st.Store.Blobs != 3 {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := s.Close(); err != nil || w.sessions() != 0 {
		t.Errorf("close: %v, %d sessions left", err, w.sessions())
	}
	if _, err := s.Open(ctx, s.Image.Config); err == nil || !strings.Contains(err.Error(), "no such session") {
		t.Errorf("open after close: %v", err)
	}
	if err := s.Fetch(ctx); err == nil {
		t.Error("fetch after close")
	}
	if ps := s.Progress(); ps != nil {
		t.Errorf("progress after close: %v", ps)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

// What is no part of the image is not given out of its session, though the node
// has it.
func TestPartsOnly(t *testing.T) {
	w := newWorld(t)
	s := w.open()
	if err := w.store.PutContent(digest.FromString("another's"), []byte("another's")); err != nil {
		t.Fatal(err)
	}
	for _, d := range []digest.Digest{digest.FromString("another's"), "sha256:abc", "../../status"} {
		r, err := s.Open(t.Context(), ocispec.Descriptor{Digest: d})
		if err == nil {
			r.Close()
			t.Errorf("%s was given out", d)
		}
	}
	_, err := s.Open(t.Context(), ocispec.Descriptor{Digest: digest.FromString("another's")})
	if !errors.Is(err, origin.ErrNotFound) {
		t.Errorf("error %v", err)
	}
}

func TestImageErrors(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name string
		req  func(*ImageRequest)
		want error // nil: any
	}{
		{"unknown tag", func(r *ImageRequest) { r.Ref = w.registry.Ref("team/app:2") }, origin.ErrNotFound},
		{"unknown image", func(r *ImageRequest) { r.Ref = w.registry.Ref("team/other:1") }, origin.ErrNotFound},
		{"no login", func(r *ImageRequest) { r.Credentials = nil }, origin.ErrDenied},
		{"wrong login", func(r *ImageRequest) { r.Credentials[w.registry.Addr()] = Credential{username, "wrong"} }, origin.ErrDenied},
		{"login of another host", func(r *ImageRequest) { r.Credentials = map[string]Credential{"quay.io": {username, password}} }, origin.ErrDenied},
		{"nobody there", func(r *ImageRequest) { r.Ref = "127.0.0.1:1/team/app:1" }, origin.ErrUnavailable},
		{"no name", func(r *ImageRequest) { r.Ref = "" }, nil},
		{"no such name", func(r *ImageRequest) { r.Ref = "Team/../app" }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := w.request()
			c.req(&r)
			s, err := w.client.Image(t.Context(), r)
			if err == nil {
				_ = s.Close()
				t.Fatal("opened")
			}
			if c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("%v; want %v", err, c.want)
			}
			if strings.Contains(err.Error(), password) {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
	if n := w.sessions(); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
	w.wantEmpty()
}

// A digest mismatch at the node is one at the client, by Fetch and in a stream.
func TestWrongBytes(t *testing.T) {
	w := newWorld(t)
	w.registry.SetFaults(rig.Faults{CorruptAt: layerSize / 2, CorruptLen: 1})
	s := w.open()
	r, err := s.Open(t.Context(), s.Image.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	r.Close()
	if !errors.Is(err, fetcher.ErrMismatch) || int64(len(b)) == s.Image.Layers[0].Size {
		t.Errorf("stream: %d bytes, %v", len(b), err)
	}
	if err := s.Fetch(t.Context()); !errors.Is(err, fetcher.ErrMismatch) {
		t.Errorf("fetch: %v", err)
	}
}

// The registry decides, whatever the node holds.
func TestPrivateImage(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	s := w.open()
	if err := s.Fetch(ctx); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]ImageRequest{
		"without a login":  w.requestWith("", ""),
		"with a wrong one": w.requestWith(username, "wrong"),
	} {
		if _, err := w.client.Image(ctx, r); !errors.Is(err, origin.ErrDenied) {
			t.Errorf("%s: %v", name, err)
		}
		r.SkipWebSeed = true
		if _, err := w.client.Image(ctx, r); !errors.Is(err, origin.ErrDenied) {
			t.Errorf("%s, from peers: %v", name, err)
		}
	}
	if refs, err := w.store.Refs(); err != nil || len(refs) != 1 || refs[0].Access == origin.Public {
		t.Errorf("the store knows %+v, %v", refs, err)
	}
}

// With the registry away only those get the image who could before: root, to
// whom the node belongs, and who shows the login that was accepted.
func TestRegistryAway(t *testing.T) {
	rig.RequireRoot(t)
	w := newWorld(t)
	ctx := t.Context()
	s := w.open()
	if err := s.Fetch(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.errandAs(nobody, errand{Request: w.requestWith("", "")}); !errors.Is(err, origin.ErrDenied) {
		t.Errorf("another user without a login: %v", err)
	}
	if err := w.registry.Stop(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		uid  uint32
		req  ImageRequest
		ok   bool
	}{
		{"root without a login", 0, w.requestWith("", ""), true},
		{"root", 0, w.request(), true},
		{"the login that was accepted", nobody, w.request(), true},
		{"no login", nobody, w.requestWith("", ""), false},
		{"a wrong password", nobody, w.requestWith(username, "wrong"), false},
		{"another user name", nobody, w.requestWith("other", password), false},
	} {
		err := w.errandAs(c.uid, errand{Request: c.req})
		if c.ok != (err == nil) || err != nil && !errors.Is(err, origin.ErrUnavailable) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	byDigest := w.requestWith("", "")
	byDigest.Ref = w.registry.Addr() + "/team/app@" + w.img.Manifest.Digest.String()
	if err := w.errandAs(nobody, errand{Request: byDigest}); !errors.Is(err, origin.ErrUnavailable) {
		t.Errorf("no login, by digest: %v", err)
	}
	cached, err := w.client.Image(ctx, w.request())
	if err != nil {
		t.Fatal(err)
	}
	defer cached.Close()
	if !strings.Contains(cached.Image.Note, "registry") {
		t.Errorf("note %q", cached.Image.Note)
	}
}

// A session is its opener's alone: another user who knows its name gets nothing
// and cannot end it.
func TestSessionOfAnotherUser(t *testing.T) {
	rig.RequireRoot(t)
	w := newWorld(t)
	s := w.open()
	if err := s.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	err := w.errandAs(nobody, errand{Session: s.Image.Session, Part: s.Image.Config.Digest})
	if err == nil || !strings.Contains(err.Error(), "no such session") {
		t.Errorf("another user: %v", err)
	}
	if w.sessions() != 1 {
		t.Error("another user ended the session")
	}
	if err := w.errandAs(0, errand{Session: s.Image.Session, Part: s.Image.Config.Digest}); err == nil || !strings.Contains(err.Error(), "got") {
		t.Errorf("the same user: %v", err)
	}
}

func TestSessionsExpire(t *testing.T) {
	w := newWorld(t)
	w.open()
	w.server.endIdle(time.Now().Add(sessionIdle - time.Minute))
	if w.sessions() != 1 {
		t.Fatal("the session ended early")
	}
	w.server.mu.Lock()
	for _, ss := range w.server.sessions {
		ss.busy++
	}
	w.server.mu.Unlock()
	w.server.endIdle(time.Now().Add(2 * sessionIdle))
	if w.sessions() != 1 {
		t.Fatal("the session ended though somebody reads")
	}
	w.server.mu.Lock()
	for _, ss := range w.server.sessions {
		ss.busy--
	}
	w.server.mu.Unlock()
	w.server.endIdle(time.Now().Add(2 * sessionIdle))
	if w.sessions() != 0 {
		t.Error("the session is still there")
	}
}

func TestSessionsAreLimited(t *testing.T) {
	w := newWorld(t)
	s := w.open()
	w.server.mu.Lock()
	one := w.server.sessions[s.Image.Session]
	for i := len(w.server.sessions); i < maxSessions; i++ {
		w.server.sessions[fmt.Sprint(i)] = one // ending a session twice does no harm
	}
	w.server.mu.Unlock()
	if _, err := w.client.Image(t.Context(), w.request()); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("beyond the limit: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	w.open()
}

func TestMalformedRequests(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		name, method, path, body string
		status                   int
	}{
		{"no JSON", "POST", "/quay/v1/images", "hello", 400},
		{"empty", "POST", "/quay/v1/images", "", 400},
		{"wrong type", "POST", "/quay/v1/images", `{"ref": 7}`, 400},
		{"cut", "POST", "/quay/v1/images", `{"ref": "a`, 400},
		{"too long", "POST", "/quay/v1/images", `{"ref": "` + strings.Repeat("a", maxRequest) + `"}`, 400},
		{"no reference", "POST", "/quay/v1/images", `{}`, 400},
		{"null", "POST", "/quay/v1/images", `null`, 400},
		{"unknown session", "GET", "/quay/v1/images/x/progress", "", 404},
		{"fetch of an unknown session", "POST", "/quay/v1/images/x/fetch", "", 404},
		{"unknown path", "GET", "/quay/v2/status", "", 404},
		{"wrong method", "PUT", "/quay/v1/images", "", 405},
	} {
		t.Run(c.name, func(t *testing.T) {
			req, err := http.NewRequestWithContext(t.Context(), c.method, "http://quay"+c.path, strings.NewReader(c.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := w.client.http.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, _ := io.ReadAll(resp.Body)
			if resp.StatusCode != c.status {
				t.Errorf("%s: %.200s", resp.Status, b)
			}
			if c.status == 400 {
				var f fault
				if err := json.Unmarshal(b, &f); err != nil || f.Message == "" {
					t.Errorf("the error is %.200q, %v", b, err)
				}
			}
		})
	}
	w.wantEmpty()
}

// A stream that its client leaves is not held, and the node serves on.
func TestClientGoesAway(t *testing.T) {
	w := newWorld(t)
	s := w.open()
	ctx, cancel := context.WithCancel(t.Context())
	r, err := s.Open(ctx, s.Image.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.ReadAll(r); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled stream ended with %v", err)
	}
	r.Close()
	if err := s.Fetch(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDeadSocket(t *testing.T) {
	dir := t.TempDir()
	_, _, err := Dial(t.Context(), filepath.Join(dir, "none"))
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	path := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, _, err = Dial(t.Context(), path); !errors.Is(err, syscall.ECONNREFUSED) || !strings.Contains(err.Error(), path) {
		t.Errorf("nobody listens: %v", err)
	}
	// Somebody listens who is no node.
	other, err := net.Listen("unix", filepath.Join(dir, "other"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.NotFoundHandler()}
	done := make(chan struct{})
	go func() { _ = srv.Serve(other); close(done) }()
	if _, _, err := Dial(t.Context(), other.Addr().String()); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("another server: %v", err)
	}
	srv.Close()
	<-done
}

// Sessions do not outlive the server's Close, and their clients are told.
func TestNodeEnds(t *testing.T) {
	w := newWorld(t)
	s := w.open()
	w.server.Close()
	if _, err := s.Open(t.Context(), s.Image.Config); err == nil || !strings.Contains(err.Error(), "no such session") {
		t.Errorf("open: %v", err)
	}
}

func TestFaults(t *testing.T) {
	for _, k := range kinds {
		err := fmt.Errorf("layer x: %w", &origin.Error{Op: "read", Err: k.err})
		got := overTheWire(t, err)
		if got.Error() != err.Error() || !errors.Is(got, k.err) {
			t.Errorf("%s: %v became %v", k.kind, err, got)
		}
		for _, other := range kinds {
			if errors.Is(got, other.err) != errors.Is(err, other.err) {
				t.Errorf("%s: is %s: %v", k.kind, other.kind, errors.Is(got, other.err))
			}
		}
	}
	both := overTheWire(t, errors.Join(fetcher.ErrNoSource, origin.ErrDenied))
	if !errors.Is(both, fetcher.ErrNoSource) || !errors.Is(both, origin.ErrDenied) {
		t.Errorf("of two kinds one is left: %v", both)
	}
	plain := overTheWire(t, errors.New("plain"))
	if plain.Error() != "plain" || errors.Is(plain, origin.ErrDenied) {
		t.Errorf("plain became %v", plain)
	}
	if err := (fault{Kinds: []string{"of the future"}, Message: "new"}).err(); err.Error() != "new" {
		t.Errorf("an unknown kind: %v", err)
	}
}

func overTheWire(t *testing.T, err error) error {
	t.Helper()
	b, jerr := json.Marshal(faultOf(err))
	if jerr != nil {
		t.Fatal(jerr)
	}
	var f fault
	if jerr := json.Unmarshal(b, &f); jerr != nil {
		t.Fatal(jerr)
	}
	return f.err()
}

func TestCredential(t *testing.T) {
	r := ImageRequest{Credentials: map[string]Credential{"docker.io": {"a", "b"}, "quay.io": {"c", "d"}}}
	for host, want := range map[string]string{
		"docker.io": "a", "registry-1.docker.io": "a", "index.docker.io": "a", "quay.io": "c", "other.io": "",
	} {
		if user, _, err := r.Credential(host); user != want || err != nil {
			t.Errorf("%s: %q, %v", host, user, err)
		}
	}
}
