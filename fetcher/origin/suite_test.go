package origin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var quiet = log.New(io.Discard, "", 0)

// fixture is a registry that has the content, and a way in.
type fixture struct {
	content
	repository func(t *testing.T) *Repository
	access     func(string) bool // what Access must be like
	hidden     bool              // the registry tells no sizes
	missing    error             // the last word on what is not there; nil is ErrNotFound
}

func public(a string) bool  { return a == Public }
func private(a string) bool { return len(a) == 64 }

// TestFakes runs the suite on registries with one vice each: a client must not see the difference.
func TestFakes(t *testing.T) {
	login := func(string) (string, string, error) { return "user", "secret", nil }
	for _, tc := range []struct {
		name    string
		vices   func(*fake)
		options Options
		access  func(string) bool
	}{
		{name: "plain", access: public},
		{name: "chunked", vices: func(f *fake) { f.chunked = true }, access: public},
		{name: "no ranges", vices: func(f *fake) { f.noRanges = true }, access: public},
		{name: "no ranges, chunked", vices: func(f *fake) { f.noRanges, f.chunked = true, true }, access: public},
		{name: "cuts", vices: func(f *fake) { f.cut = 10_000 }, access: public},
		{name: "cuts, chunked", vices: func(f *fake) { f.cut, f.chunked = 10_000, true }, access: public},
		{name: "signed redirects", vices: func(f *fake) { f.redirect = true }, access: public},
		{name: "signed redirects for one use", vices: func(f *fake) { f.redirect, f.serves, f.cut = true, 1, 50_000 }, access: public},
		{name: "anonymous token", vices: func(f *fake) { f.token = "t1" }, access: public},
		{name: "token for a login", vices: func(f *fake) { f.token = "t1" }, options: Options{Credentials: login}, access: private},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake(t, false, tc.vices)
			suite(t, fixture{content: f.content, access: tc.access, hidden: f.noRanges && f.chunked, repository: func(t *testing.T) *Repository { return f.open(t, tc.options, nil) }})
		})
	}
}

// TestMirror runs it on a mirror, with the registry itself away.
func TestMirror(t *testing.T) {
	f := newFake(t, false, nil)
	dead := httptest.NewServer(nil)
	upstream := dead.Listener.Addr().String()
	dead.Close()
	root := certs(t, upstream, "hosts.toml", fmt.Appendf(nil, "[host.\"http://%s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", f.host()))
	suite(t, fixture{content: f.content, access: public, missing: ErrUnavailable, repository: func(t *testing.T) *Repository {
		return open(t, newClient(t, Options{HostDirs: []string{t.TempDir(), root}}, nil), upstream+"/"+f.repo)
	}})
	for _, r := range f.requests() {
		if got := query(t, r).Get("ns"); got != upstream {
			t.Fatalf("the mirror was asked with ns=%q, want %q", got, upstream)
		}
	}
}

// suite is what every registry must be good for.
func suite(t *testing.T, f fixture) {
	if f.missing == nil {
		f.missing = ErrNotFound
	}
	t.Run("manifest", func(t *testing.T) {
		r := f.repository(t)
		for _, ref := range []string{"latest", string(f.desc.Digest)} {
			desc, text, err := r.Manifest(testContext(t), ref)
			if err != nil {
				t.Fatal(err)
			}
			if desc.Digest != f.desc.Digest || desc.Size != f.desc.Size || desc.MediaType != f.desc.MediaType || !bytes.Equal(text, f.manifest) {
				t.Fatalf("%s: got %v", ref, desc)
			}
		}
		if !f.access(r.Access()) {
			t.Errorf("Access() = %q", r.Access())
		}
	})
	t.Run("unknown", func(t *testing.T) {
		_, _, err := f.repository(t).Manifest(testContext(t), "no-such-tag")
		var e *Error
		if !errors.Is(err, f.missing) || !errors.As(err, &e) || e.Hint == "" {
			t.Fatalf("got %v", err)
		}
		if strings.ContainsAny(err.Error(), "\n\r") {
			t.Errorf("not one line: %q", err)
		}
	})
	t.Run("ranges", func(t *testing.T) {
		r := f.repository(t)
		size := f.layerDesc.Size
		var wg sync.WaitGroup
		for _, c := range [][2]int64{{0, size}, {0, -1}, {0, 1}, {0, 65536}, {65536, 131072}, {size - 1, 1}, {size - 5, -1}, {size, 0}, {size, -1}, {7, 0}} {
			wg.Go(func() {
				s, err := r.Open(testContext(t), f.layerDesc, c[0], c[1])
				if err != nil {
					t.Errorf("range %v: %v", c, err)
					return
				}
				defer s.Close()
				if !s.Whole() && s.Offset() != c[0] || s.Whole() && (s.Offset() != 0 || s.Length() != size) {
					t.Errorf("range %v: from %d for %d, whole %v", c, s.Offset(), s.Length(), s.Whole())
				}
				got, err := io.ReadAll(s)
				if err != nil {
					t.Errorf("range %v: %v", c, err)
				}
				if want := f.layer[s.Offset() : s.Offset()+s.Length()]; !bytes.Equal(got, want) {
					t.Errorf("range %v: got %s, want %s", c, sum(got), sum(want))
				}
			})
		}
		wg.Wait()
	})
	t.Run("stat", func(t *testing.T) {
		r := f.repository(t)
		desc, err := r.Stat(testContext(t), f.layerDesc.Digest)
		if f.hidden {
			if !errors.Is(err, ErrUnexpected) {
				t.Fatalf("got %v, %v", desc, err)
			}
			return
		}
		if err != nil || desc.Size != f.layerDesc.Size || desc.Digest != f.layerDesc.Digest {
			t.Fatalf("got %v, %v", desc, err)
		}
		if desc, err := r.Stat(testContext(t), digest.FromString("")); err != nil || desc.Size != 0 {
			t.Errorf("empty: %v, %v", desc, err)
		}
		if _, err := r.Stat(testContext(t), digest.FromString("nobody has this")); !errors.Is(err, f.missing) {
			t.Errorf("got %v", err)
		}
		accepted := r.client.Accepted(r.Name(), r.Access())
		if accepted != (r.Access() != Public) || r.client.Accepted(r.Name(), accessName("x", "y", "z")) || r.client.Accepted(r.Name(), "") {
			t.Errorf("Accepted() = %v for %q", accepted, r.Access())
		}
		if stranger := newClient(t, Options{}, nil); stranger.Accepted(r.Name(), r.Access()) {
			t.Error("a client without the credential is accepted")
		}
	})
	t.Run("outside", func(t *testing.T) {
		for _, c := range [][2]int64{{-1, 1}, {f.layerDesc.Size + 1, -1}, {1, f.layerDesc.Size}, {1 << 62, 1 << 62}} {
			if _, err := f.repository(t).Open(testContext(t), f.layerDesc, c[0], c[1]); err == nil {
				t.Errorf("range %v: no error", c)
			}
		}
	})
	t.Run("another size", func(t *testing.T) {
		for _, by := range []int64{-1000, 1000} {
			desc := f.layerDesc
			desc.Size += by
			s, err := f.repository(t).Open(testContext(t), desc, 0, -1)
			if err == nil {
				_, err = io.Copy(io.Discard, s)
				s.Close()
			}
			if !errors.Is(err, ErrMismatch) && f.missing == ErrNotFound {
				t.Errorf("size %+d: got %v", by, err)
			}
		}
	})
	t.Run("unknown blob", func(t *testing.T) {
		_, err := f.repository(t).Open(testContext(t), ocispec.Descriptor{Digest: digest.FromString("nobody has this"), Size: 5}, 0, -1)
		if !errors.Is(err, f.missing) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(testContext(t))
		s, err := f.repository(t).Open(ctx, f.layerDesc, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := io.ReadFull(s, make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if _, err = io.Copy(io.Discard, s); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
		if _, _, err := f.repository(t).Manifest(ctx, "latest"); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("closed", func(t *testing.T) {
		s, err := f.repository(t).Open(testContext(t), f.layerDesc, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		s.Close()
		if _, err := s.Read(make([]byte, 1)); err == nil {
			t.Error("a closed stream can be read")
		}
	})
}

// status answers all requests to a path with one status.
func status(path string, code int, header http.Header, body string) func(*fake) {
	return func(f *fake) {
		f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, path) {
				return false
			}
			for k, v := range header {
				w.Header()[k] = v
			}
			w.WriteHeader(code)
			io.WriteString(w, body)
			return true
		}
	}
}
