package origin

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Nothing on this machine or its link is connected to on behalf of others, by whatever name, but for registries that the
// configuration names.
func TestOnBehalfLooksOutward(t *testing.T) {
	for addr, want := range map[string]bool{
		"127.0.0.1": true, "::1": true, "::ffff:127.0.0.1": true, "127.9.9.9": true, "0.0.0.0": true, "::": true,
		"169.254.169.254": true, "fe80::1%eth0": true, "224.0.0.1": true, "fd00:ec2::254": true, "100.100.100.200": true,
		"192.0.2.1": false, "10.0.0.1": false, "fd00::1": false, "2001:db8::1": false,
	} {
		if got := inward(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
	f := newFake(t, false, nil)
	port := f.host()[strings.LastIndexByte(f.host(), ':'):]
	for _, test := range []struct {
		name, host string
		o          Options
		ok         bool
	}{
		{"an address", f.host(), Options{}, false},
		{"a name", "localhost" + port, Options{}, false},
		{"its own registry", f.host(), Options{Own: []string{f.host()}}, true},
		{"its own by name", "localhost" + port, Options{Own: []string{"localhost" + port}}, true},
		{"another of its own", f.host(), Options{Own: []string{"127.0.0.1:1"}}, false},
		{"one with a folder", f.host(), Options{HostDirs: []string{certs(t, f.host(), "hosts.toml", []byte("server = \"http://"+f.host()+"\"\n"))}}, true},
		{"a mirror on loopback", "registry.test", Options{HostDirs: []string{certs(t, "registry.test", "hosts.toml",
			[]byte("server = \"http://127.0.0.1:1\"\n[host.\"http://"+f.host()+"\"]\n"))}}, false},
		{"a general mirror", "registry.test", Options{HostDirs: []string{certs(t, "_default", "hosts.toml",
			[]byte("server = \"http://"+f.host()+"\"\n"))}}, false},
		{"insecure changes nothing", f.host(), Options{Insecure: true}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := len(f.requests())
			test.o.OnBehalf = true
			r := open(t, newClient(t, test.o, nil), test.host+"/test/image")
			_, _, err := r.Manifest(testContext(t), "latest")
			if test.ok != (err == nil) || err != nil && !errors.Is(err, ErrUnavailable) {
				t.Errorf("got %v", err)
			}
			if n := len(f.requests()) - before; !test.ok && n != 0 {
				t.Errorf("%d requests were made", n)
			}
		})
	}
}

// A registry that may be asked cannot lead to what may not, by a redirect or by its token service.
func TestOnBehalfIsNotLedInward(t *testing.T) {
	inner := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("was asked") }))
	defer inner.Close()
	f := newFake(t, false, func(f *fake) {
		f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			switch {
			case strings.Contains(r.URL.Path, "/blobs/"):
				http.Redirect(w, r, inner.URL+"/latest/meta-data", http.StatusTemporaryRedirect)
			case strings.HasSuffix(r.URL.Path, "/private"):
				w.Header().Set("Www-Authenticate", fmt.Sprintf("Bearer realm=%q,service=\"x\"", inner.URL+"/token"))
				w.WriteHeader(http.StatusUnauthorized)
			default:
				return false
			}
			return true
		}
	})
	r := open(t, newClient(t, Options{OnBehalf: true, Own: []string{f.host()}}, nil), f.host()+"/test/image")
	if _, _, err := r.Manifest(testContext(t), "latest"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Stat(testContext(t), f.layerDesc.Digest); !errors.Is(err, errInward) {
		t.Error(err)
	}
	if _, _, err := r.Manifest(testContext(t), "private"); !errors.Is(err, errInward) {
		t.Error(err)
	}
}

// What lets this node in stays out of what is asked for others.
func TestOnBehalfLendsNothing(t *testing.T) {
	f := newFake(t, false, nil)
	root := certs(t, f.host(), "hosts.toml", fmt.Appendf(nil, "server = \"http://%[1]s\"\n[host.\"http://%[1]s\"]\n  [host.\"http://%[1]s\".header]\n    Authorization = \"Basic bm9kZTpub2Rl\"\n    X-Token = \"node\"\n", f.host()))
	for _, behalf := range []bool{false, true} {
		before := len(f.requests())
		r := open(t, newClient(t, Options{OnBehalf: behalf, HostDirs: []string{root}}, nil), f.host()+"/test/image")
		if _, _, err := r.Manifest(testContext(t), "latest"); err != nil {
			t.Fatal(err)
		}
		for _, q := range f.requests()[before:] {
			if lent := q.Header.Get("Authorization") != "" || q.Header.Get("X-Token") != ""; lent == behalf {
				t.Errorf("on behalf %v: headers %v", behalf, q.Header)
			}
		}
		if public := r.Access() == Public; public != behalf {
			t.Errorf("on behalf %v: access %q", behalf, r.Access())
		}
	}
}

func TestLoginFor(t *testing.T) {
	hub, _ := reference.ParseNormalizedNamed("debian")
	own, _ := reference.ParseNormalizedNamed("registry.test/app")
	for _, test := range []struct {
		ref  reference.Named
		host string
		want bool
	}{
		{hub, "registry-1.docker.io", true}, {hub, "docker.io", true}, {hub, "mirror.test", false},
		{own, "registry.test", true}, {own, "registry-1.docker.io", false}, {own, "registry.test:5000", false},
	} {
		if _, secret, err := LoginFor(test.ref, "alice", "sesame")(test.host); err != nil || (secret != "") != test.want {
			t.Errorf("%s at %s: %q, %v", test.ref, test.host, secret, err)
		}
	}
	c := newClient(t, Options{Credentials: LoginFor(hub, "alice", "sesame")}, nil)
	if user, secret, access := c.Login(hub); user != "alice" || secret != "sesame" || !c.Accepted(hub, access) {
		t.Errorf("%q %q %q", user, secret, access)
	}
	if user, secret, access := c.Login(own); user+secret+access != "" {
		t.Errorf("%q %q %q", user, secret, access)
	}
}

func TestCheck(t *testing.T) {
	c := newContent()
	if err := Check(c.desc, c.manifest); err != nil {
		t.Error(err)
	}
	if d, err := Describe(c.manifest); err != nil || d.Digest != c.desc.Digest || d.MediaType != c.desc.MediaType || d.Size != c.desc.Size {
		t.Errorf("%+v, %v", d, err)
	}
	for name, change := range map[string]func(*ocispec.Descriptor){
		"size":         func(d *ocispec.Descriptor) { d.Size++ },
		"digest":       func(d *ocispec.Descriptor) { d.Digest = digest.FromString("other") },
		"no digest":    func(d *ocispec.Descriptor) { d.Digest = "sha256:" },
		"another kind": func(d *ocispec.Descriptor) { d.MediaType = ocispec.MediaTypeImageIndex },
		"no type":      func(d *ocispec.Descriptor) { d.MediaType = "" },
	} {
		d := c.desc
		if change(&d); !errors.Is(Check(d, c.manifest), ErrMismatch) {
			t.Errorf("%s: %v", name, Check(d, c.manifest))
		}
	}
	if _, err := Describe([]byte("no manifest")); !errors.Is(err, ErrMismatch) {
		t.Error(err)
	}
}
