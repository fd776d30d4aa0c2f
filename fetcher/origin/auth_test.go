package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// public name of a fake with TLS: httptest's certificate is also for example.com, which is not loopback.
const example = "example.com"

// openAs opens the fake under a name that is not loopback.
func (f *fake) openAs(t *testing.T, o Options) *Repository {
	t.Helper()
	if o.HostDirs == nil && f.server.TLS != nil {
		o.HostDirs = []string{certs(t, example, "ca.crt", certPEM(f.server))}
	}
	r := open(t, newClient(t, o, nil), example+"/"+f.repo)
	for _, ep := range r.endpoints {
		dial := ep.transport.DialContext
		ep.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			if strings.HasPrefix(addr, example+":") {
				addr = f.host()
			}
			return dial(ctx, network, addr)
		}
	}
	return r
}

func challenge(realm string) func(*fake) {
	return status("/v2/", 401, http.Header{"Www-Authenticate": {fmt.Sprintf(`Bearer realm=%q,service="s"`, realm)}}, "")
}

func login(string) (string, string, error) { return "user", "secret-of-user", nil }

// TestNothingLeaks: a credential and the headers of hosts.toml reach the registry and nobody else.
func TestNothingLeaks(t *testing.T) {
	var mu sync.Mutex
	var got []http.Header
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		got = append(got, r.Header.Clone())
		mu.Unlock()
		w.Header().Set("Content-Range", "bytes 0-9/300000")
		w.WriteHeader(206)
		io.WriteString(w, "0123456789")
	}))
	defer other.Close()
	f := newFake(t, false, func(f *fake) { f.redirect, f.token, f.storage = true, "t1", other })
	root := certs(t, f.host(), "hosts.toml", fmt.Appendf(nil, "server = \"http://%s\"\n[header]\n  X-Secret = \"s\"\n", f.host()))
	r := f.open(t, Options{Credentials: login, HostDirs: []string{root}}, nil)
	for range 2 {
		s, err := r.Open(testContext(t), f.layerDesc, 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, s)
		s.Close()
	}
	if len(got) != 2 {
		t.Fatalf("storage saw %d requests", len(got))
	}
	for _, h := range got {
		if h.Get("Authorization") != "" || h.Get("X-Secret") != "" || h.Get("Range") != "bytes=0-9" || h.Get("Accept-Encoding") != "identity" {
			t.Errorf("storage got %v", h)
		}
	}
	blobs := f.requests()
	last := blobs[len(blobs)-1]
	if last.Header.Get("Authorization") != "Bearer t1" || last.Header.Get("X-Secret") != "s" || last.Header.Get("User-Agent") != "docker-quay" {
		t.Errorf("the registry got %v", last.Header)
	}
}

// TestDowngrade: nothing goes from HTTPS to plain HTTP unless the user says so.
func TestDowngrade(t *testing.T) {
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Range", "bytes 0-9/300000")
		w.WriteHeader(206)
		io.WriteString(w, "0123456789")
	}))
	defer plain.Close()
	t.Run("redirect", func(t *testing.T) {
		f := newFake(t, true, func(f *fake) { f.redirect, f.storage = true, plain })
		s, err := f.openAs(t, Options{}).Open(testContext(t), f.layerDesc, 0, 10)
		if !errors.Is(err, ErrTLS) || !strings.Contains(err.Error(), "--insecure") || strings.Contains(err.Error(), "sig=") {
			t.Fatalf("got %v, %v", s, err)
		}
		s, err = f.openAs(t, Options{Insecure: true}).Open(testContext(t), f.layerDesc, 0, 10)
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
	})
	t.Run("token service", func(t *testing.T) {
		f := newFake(t, true, challenge(plain.URL+"/token"))
		_, _, err := f.openAs(t, Options{Credentials: login}).Manifest(testContext(t), "latest")
		if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "plain HTTP") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("token service that redirects", func(t *testing.T) {
		seen := make(chan struct{}, 1)
		thief := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { seen <- struct{}{} }))
		defer thief.Close()
		service := httptest.NewServer(http.RedirectHandler(thief.URL, http.StatusTemporaryRedirect))
		defer service.Close()
		f := newFake(t, false, challenge(service.URL))
		_, _, err := f.open(t, Options{Credentials: login}, nil).Manifest(testContext(t), "latest")
		if !errors.Is(err, ErrDenied) || len(seen) > 0 {
			t.Fatalf("got %v, %d at the thief", err, len(seen))
		}
	})
	t.Run("plain server", func(t *testing.T) {
		f := newFake(t, false, nil)
		_, _, err := f.openAs(t, Options{}).Manifest(testContext(t), "latest")
		if !errors.Is(err, ErrTLS) || !strings.Contains(err.Error(), "speaks plain HTTP") {
			t.Fatalf("got %v", err)
		}
		if _, _, err = f.openAs(t, Options{Insecure: true}).Manifest(testContext(t), "latest"); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("unknown authority", func(t *testing.T) {
		f := newFake(t, true, nil)
		empty := []string{t.TempDir()}
		_, _, err := f.openAs(t, Options{HostDirs: empty}).Manifest(testContext(t), "latest")
		if !errors.Is(err, ErrTLS) || !strings.Contains(err.Error(), filepath.Join(empty[0], example, "ca.crt")) {
			t.Fatalf("got %v", err)
		}
		if _, _, err = f.openAs(t, Options{HostDirs: empty, Insecure: true}).Manifest(testContext(t), "latest"); err != nil {
			t.Fatal(err)
		}
	})
}

func TestTokenService(t *testing.T) {
	dead := httptest.NewServer(nil)
	dead.Close()
	for _, tc := range []struct {
		name  string
		vices func(*fake)
		want  error
		text  string
	}{
		{"refuses", func(f *fake) { f.token, f.tokenStatus = "t", 401 }, ErrDenied, "UNAUTHORIZED: who are you"},
		{"fails", func(f *fake) { f.token, f.tokenStatus = "t", 500 }, ErrUnavailable, "token service answered 500"},
		{"is busy", func(f *fake) { f.token, f.tokenStatus = "t", 429 }, ErrRateLimited, "429"},
		{"is away", challenge(dead.URL), ErrUnavailable, "refused"},
		{"is garbage", challenge("http://%zz"), ErrUnexpected, ""},
		{"has an unknown scheme", status("/v2/", 401, http.Header{"Www-Authenticate": {`Negotiate x`}}, ""), ErrDenied, "401"},
		{"wants a password", status("/v2/", 401, http.Header{"Www-Authenticate": {`Basic realm="x"`}}, ""), ErrDenied, "docker login"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake(t, false, tc.vices)
			_, _, err := f.open(t, Options{}, nil).Manifest(testContext(t), "latest")
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("got %v", err)
			}
			if n := len(f.requests()); n > 2*(defaultLimits.retries+1) {
				t.Errorf("%d requests", n)
			}
		})
	}
	t.Run("token runs out", func(t *testing.T) {
		f := newFake(t, false, func(f *fake) { f.token = "t1" })
		r := f.open(t, Options{}, nil)
		for i := range 3 {
			var wg sync.WaitGroup
			for range 4 {
				wg.Go(func() {
					if _, err := read(t, r, f, 0, 10); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			f.mu.Lock()
			f.token = fmt.Sprintf("new%d", i)
			f.mu.Unlock()
		}
		if n := f.count("/token"); n != 3 {
			t.Errorf("%d tokens were fetched for 3 lifetimes", n)
		}
	})
	t.Run("a cancelled caller spoils nothing", func(t *testing.T) {
		hang := make(chan struct{})
		var once sync.Once
		f := newFake(t, false, func(f *fake) {
			f.token = "t1"
			f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path == "/token" {
					once.Do(func() { close(hang); <-r.Context().Done() })
				}
				return false
			}
		})
		r := f.open(t, Options{}, nil)
		ctx, cancel := context.WithCancel(testContext(t))
		done := make(chan error)
		go func() { _, _, err := r.Manifest(ctx, "latest"); done <- err }()
		<-hang
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		if _, _, err := r.Manifest(testContext(t), "latest"); err != nil {
			t.Fatal(err)
		}
	})
}

// TestHelper: docker's credential helpers, with an identity token, and broken.
func TestHelper(t *testing.T) {
	bin := t.TempDir()
	helper := func(script string) {
		if err := os.WriteFile(filepath.Join(bin, "docker-credential-quaytest"), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"credsStore":"quaytest"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	forms := make(chan string, 10)
	f := newFake(t, false, func(f *fake) {
		f.token = "t1"
		f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path == "/token" {
				forms <- r.FormValue("grant_type") + " " + r.FormValue("refresh_token") + " " + r.FormValue("scope")
			}
			return false
		}
	})
	helper(`cat >/dev/null; echo '{"ServerURL":"x","Username":"<token>","Secret":"identity"}'`)
	r := f.open(t, Options{DockerConfigDir: dir}, nil)
	if _, _, err := r.Manifest(testContext(t), "latest"); err != nil {
		t.Fatal(err)
	}
	if got := <-forms; got != "refresh_token identity repository:test/image:pull" {
		t.Errorf("the token service got %q", got)
	}
	if !private(r.Access()) {
		t.Errorf("Access() = %q", r.Access())
	}

	helper(`cat >/dev/null; echo 'the vault is locked'; exit 1`)
	r = f.open(t, Options{DockerConfigDir: dir}, nil)
	if _, _, err := r.Manifest(testContext(t), "latest"); err != nil || r.Access() != Public {
		t.Errorf("public image with a broken helper: %v, %q", err, r.Access())
	}
	g := newFake(t, false, func(f *fake) { f.token, f.tokenStatus = "t", 401 })
	if _, _, err := g.open(t, Options{DockerConfigDir: dir}, nil).Manifest(testContext(t), "latest"); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "the vault is locked") {
		t.Errorf("got %v", err)
	}
}

func TestHubLogin(t *testing.T) {
	find := dockerCredentials(dockerConfig(t, hubKey, "me", "pw"))
	for _, host := range []string{"docker.io", "registry-1.docker.io", "index.docker.io"} {
		if user, secret, err := find(host); user != "me" || secret != "pw" || err != nil {
			t.Errorf("%s: %q %q %v", host, user, secret, err)
		}
	}
	if user, secret, err := find("quay.io"); user+secret != "" || err != nil {
		t.Errorf("quay.io: %q %q %v", user, secret, err)
	}
	r := open(t, newClient(t, Options{}, nil), "alpine")
	if u := r.endpoints[0].url("library/alpine", "x"); u.String() != "https://registry-1.docker.io/v2/library/alpine/x" {
		t.Errorf("Docker Hub is %s", u)
	}
}

// TestHostDirs: which folder counts, and that mirrors are asked in their order and left alone when they are down.
func TestHostDirs(t *testing.T) {
	down := httptest.NewServer(nil)
	down.Close()
	refuses := newFake(t, false, status("/v2/", 404, nil, ""))
	blobsOnly := newFake(t, false, nil)
	f := newFake(t, false, nil)
	toml := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n[host.\"http://%s\"]\n[host.\"http://%s\"]\n  capabilities = [\"pull\"]\n",
		f.host(), down.Listener.Addr(), refuses.host(), blobsOnly.host())
	general := certs(t, "_default", "hosts.toml", []byte("server = \"http://127.0.0.1:1\"\n"))
	root := certs(t, "registry.test", "hosts.toml", []byte(toml))
	r := open(t, newClient(t, Options{HostDirs: []string{general, root}}, nil), "registry.test/test/image")
	if len(r.endpoints) != 4 {
		t.Fatalf("%d hosts", len(r.endpoints))
	}
	if _, _, err := r.Manifest(testContext(t), "latest"); err != nil {
		t.Fatal(err)
	}
	if _, err := read(t, r, f, 5, 5); err != nil {
		t.Fatal(err)
	}
	if a, b, c := refuses.count("/v2/"), blobsOnly.count("/v2/"), f.count("/v2/"); a != 2 || b != 1 || c != 1 {
		t.Errorf("the hosts saw %d, %d, %d requests, want 2, 1, 1", a, b, c)
	}
	if n := r.client.Stats().Requests; n != 5 {
		t.Errorf("%d requests: the mirror that is down was asked again", n)
	}
	t.Run("read again", func(t *testing.T) {
		c := newClient(t, Options{HostDirs: []string{root}}, func(l *limits) { l.hostsFresh = 0 })
		if n := len(open(t, c, "registry.test/x").endpoints); n != 4 {
			t.Fatalf("%d hosts", n)
		}
		os.WriteFile(filepath.Join(root, "registry.test", "hosts.toml"), []byte("server = \"http://127.0.0.1:1\"\n"), 0o644)
		if n := len(open(t, c, "registry.test/x").endpoints); n != 1 {
			t.Fatalf("%d hosts", n)
		}
	})
	t.Run("bad certificate", func(t *testing.T) {
		c := newClient(t, Options{HostDirs: []string{certs(t, "registry.test", "ca.crt", []byte("garbage"))}}, nil)
		if _, err := c.hostsOf("registry.test"); err == nil || !strings.Contains(err.Error(), "ca.crt") {
			t.Fatalf("got %v", err)
		}
	})
	if _, err := New(Options{HostDirs: []string{"relative"}}); err == nil {
		t.Error("a relative folder is accepted")
	}
}
