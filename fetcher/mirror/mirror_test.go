package mirror_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/mirror"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestManifests(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	for _, what := range []string{"1", w.img.Manifest.Digest.String()} {
		a := w.get(w.url("team/app/manifests/" + what))
		w.wantWhole(a, w.img.Manifest)
		if ct := a.Header.Get("Content-Type"); ct != w.img.Manifest.MediaType {
			t.Errorf("%s: media type %q", what, ct)
		}
		head := w.do(http.MethodHead, w.url("team/app/manifests/"+what))
		if head.StatusCode != http.StatusOK || len(head.body) != 0 || head.ContentLength != w.img.Manifest.Size ||
			head.Header.Get("Docker-Content-Digest") != w.img.Manifest.Digest.String() {
			t.Errorf("HEAD %s: %s, length %d, %v", what, head.Status, head.ContentLength, head.Header)
		}
	}
	a := w.get(w.mirror.URL + "/v2/")
	if a.StatusCode != http.StatusOK || a.Header.Get("Docker-Distribution-Api-Version") != "registry/2.0" {
		t.Errorf("the root of the API: %s, %v", a.Status, a.Header)
	}
}

func TestBlobs(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	layer := w.img.Layers[0]
	// Without its manifest the mirror has to ask for the size.
	head := w.do(http.MethodHead, w.blob(layer))
	if head.StatusCode != http.StatusOK || head.ContentLength != layer.Size || head.Header.Get("Accept-Ranges") != "bytes" {
		t.Errorf("HEAD: %s, %v", head.Status, head.Header)
	}
	if u, err := w.store.Usage(); err != nil || u.Blobs != 0 {
		t.Errorf("HEAD left %+v in the store, %v", u, err)
	}
	w.wantWhole(w.get(w.blob(layer)), layer)
	w.wantWhole(w.get(w.url("team/app/manifests/1")), w.img.Manifest)
	w.wantWhole(w.get(w.blob(w.img.Config)), w.img.Config)
	w.wantWhole(w.get(w.blob(w.img.Layers[1])), w.img.Layers[1])

	w.registry.ResetStats()
	w.wantWhole(w.get(w.blob(layer)), layer)
	if s := w.registry.Stats(); s.Blobs != 0 {
		t.Errorf("%d bytes of a blob that is here were fetched again", s.Blobs)
	}
}

// A repository may be called like an endpoint.
func TestRepositoryNames(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	for _, name := range []string{"team/manifests", "blobs/manifests/blobs", "manifests"} {
		w.push(name, "1")
		w.wantWhole(w.get(w.url(name+"/manifests/1")), w.img.Manifest)
		w.wantWhole(w.get(w.url(name+"/blobs/"+w.img.Config.Digest.String())), w.img.Config)
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	absent := digest.FromString("absent").String()
	for _, c := range []struct {
		name, url string
		status    int
		code      string
	}{
		{"no ns", w.mirror.URL + "/v2/team/app/manifests/1", 400, "NAME_UNKNOWN"},
		{"ns is no host", w.mirror.URL + "/v2/app/manifests/1?ns=team", 400, "NAME_INVALID"},
		{"ns with a path", w.url("app/manifests/1") + "%2Fteam", 400, "NAME_INVALID"},
		{"ns with a login", w.mirror.URL + "/v2/team/app/manifests/1?ns=user:secret@" + w.registry.Addr(), 400, "NAME_INVALID"},
		{"unknown tag", w.url("team/app/manifests/2"), 404, "MANIFEST_UNKNOWN"},
		{"unknown image", w.url("team/other/manifests/1"), 404, "MANIFEST_UNKNOWN"},
		{"unknown manifest", w.url("team/app/manifests/" + absent), 404, "MANIFEST_UNKNOWN"},
		{"unknown blob", w.url("team/app/blobs/" + absent), 404, "MANIFEST_UNKNOWN"},
		{"no tag", w.url("team/app/manifests/-"), 404, "MANIFEST_UNKNOWN"},
		{"no digest", w.url("team/app/blobs/1"), 404, "MANIFEST_UNKNOWN"},
		{"unknown algorithm", w.url("team/app/blobs/md5:d41d8cd98f00b204e9800998ecf8427e"), 404, "MANIFEST_UNKNOWN"},
		{"short digest", w.url("team/app/blobs/sha256:abc"), 404, "MANIFEST_UNKNOWN"},
		{"name with a tag", w.url("team/app:1/manifests/1"), 400, "NAME_INVALID"},
		{"name with a digest", w.url("team/app@" + absent + "/manifests/1"), 400, "NAME_INVALID"},
		{"upper case", w.url("Team/app/manifests/1"), 400, "NAME_INVALID"},
		{"dots", w.url("team/%2e%2e/app/manifests/1"), 400, "NAME_INVALID"},
		{"escaped dots", w.url("..%2f..%2fetc/manifests/1"), 400, "NAME_INVALID"},
		{"digest with dots", w.url("team/app/blobs/..%2f..%2f..%2fetc%2fpasswd"), 404, "NAME_UNKNOWN"},
		{"zero byte", w.url("team/app%00/manifests/1"), 400, "NAME_INVALID"},
		{"tags", w.url("team/app/tags/list"), 404, "NAME_UNKNOWN"},
		{"catalog", w.url("_catalog"), 404, "NAME_UNKNOWN"},
		{"no name", w.url("manifests/1"), 404, "NAME_UNKNOWN"},
		{"no what", w.url("team/app/manifests/"), 404, "NAME_UNKNOWN"},
		{"outside", w.mirror.URL + "/v1/?ns=" + w.registry.Addr(), 404, "NAME_UNKNOWN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := *w
			w.T = t
			w.wantError(w.get(c.url), c.status, c.code)
		})
	}
	for _, method := range []string{http.MethodPut, http.MethodPost, http.MethodPatch, http.MethodDelete} {
		w.wantError(w.do(method, w.url("team/app/manifests/1")), http.StatusMethodNotAllowed, "UNSUPPORTED")
	}
	if u, err := w.store.Usage(); err != nil || u.Blobs != 0 {
		t.Errorf("refused requests left %+v in the store, %v", u, err)
	}
}

// The mirror has the node's logins and no others, and what the registry refuses
// to the node is not served.
func TestDenied(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{Username: "user", Password: "secret"}, nil)
	w.wantError(w.get(w.url("team/app/manifests/1")), http.StatusForbidden, "DENIED")
	w.wantError(w.get(w.blob(w.img.Layers[0])), http.StatusForbidden, "DENIED")
	a := w.get(w.blob(w.img.Layers[0]), "Authorization", "Basic dXNlcjpzZWNyZXQ=")
	w.wantError(a, http.StatusForbidden, "DENIED")
	if u, err := w.store.Usage(); err != nil || u.Blobs != 0 {
		t.Errorf("refused requests left %+v in the store, %v", u, err)
	}
}

// A blob that is here because of one repository is not served under the name
// of another that does not have it.
func TestBlobOfAnotherRepository(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	w.wantWhole(w.get(w.url("team/app/manifests/1")), w.img.Manifest)
	w.wantWhole(w.get(w.blob(w.img.Layers[0])), w.img.Layers[0])
	a := w.get(w.url("team/other/blobs/" + w.img.Layers[0].Digest.String()))
	w.wantError(a, http.StatusNotFound, "MANIFEST_UNKNOWN")
}

func TestRegistryAway(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	w.wantWhole(w.get(w.url("team/app/manifests/1")), w.img.Manifest)
	w.wantWhole(w.get(w.blob(w.img.Layers[0])), w.img.Layers[0])
	if err := w.registry.Stop(); err != nil {
		t.Fatal(err)
	}
	w.wantWhole(w.get(w.url("team/app/manifests/1")), w.img.Manifest)
	w.wantWhole(w.get(w.url("team/app/manifests/"+w.img.Manifest.Digest.String())), w.img.Manifest)
	w.wantWhole(w.get(w.blob(w.img.Layers[0])), w.img.Layers[0])
	w.wantError(w.get(w.url("team/app/manifests/2")), http.StatusBadGateway, "UNAVAILABLE")
	w.wantError(w.get(w.url("team/app/blobs/"+digest.FromString("absent").String())), http.StatusBadGateway, "UNAVAILABLE")
	// The manifest told its size: that it cannot be had shows in a cut.
	if a := w.get(w.blob(w.img.Layers[1])); a.StatusCode == http.StatusOK && a.err == nil {
		t.Errorf("a layer that nobody has: %s, %d bytes, no error", a.Status, len(a.body))
	}
}

func TestRateLimited(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	w.registry.SetFaults(rig.Faults{RateLimited: -1})
	w.wantError(w.get(w.url("team/app/manifests/1")), http.StatusTooManyRequests, "TOOMANYREQUESTS")
}

// Wrong bytes never make a complete body, whole or in ranges over the last
// piece, and do not stay.
func TestWrongBytes(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	layer := w.img.Layers[0]
	w.registry.SetFaults(rig.Faults{CorruptAt: layerSize / 2, CorruptLen: 1})
	w.wantWhole(w.get(w.url("team/app/manifests/1")), w.img.Manifest)
	for _, rng := range []string{"", "bytes=0-", fmt.Sprintf("bytes=%d-", layer.Size-1)} {
		var header []string
		if rng != "" {
			header = []string{"Range", rng}
		}
		a := w.get(w.blob(layer), header...)
		if a.err == nil {
			t.Errorf("range %q: a complete body (%s, %d bytes) of a wrong blob", rng, a.Status, len(a.body))
		}
		if !errors.Is(a.err, io.ErrUnexpectedEOF) && !strings.Contains(fmt.Sprint(a.err), "reset") {
			t.Errorf("range %q: ended with %v instead of a cut connection", rng, a.err)
		}
	}
	if i, err := w.store.Stat(layer.Digest); err == nil && i.Complete {
		t.Error("the wrong blob is complete in the store")
	}
	w.registry.SetFaults(rig.Faults{})
	w.wantWhole(w.get(w.blob(layer)), layer)
}

func TestAllow(t *testing.T) {
	refused := errors.New("not you")
	w := newWorld(t, rig.RegistryOptions{}, func(o *mirror.Options) {
		o.Allow = func(r *http.Request) error {
			if r.Header.Get("X-Friend") == "" {
				return refused
			}
			return nil
		}
	})
	for _, path := range []string{"/v2/", "/v2/team/app/manifests/1"} {
		w.wantError(w.get(w.mirror.URL+path), http.StatusForbidden, "DENIED")
	}
	w.wantWhole(w.get(w.url("team/app/manifests/1"), "X-Friend", "yes"), w.img.Manifest)
}

// A client that goes away does not hold anything up, and what came stays.
func TestClientGoesAway(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	c, err := net.Dial("tcp", w.mirror.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(c, "GET /v2/team/app/blobs/%s?ns=%s HTTP/1.1\r\nHost: mirror\r\n\r\n", w.img.Layers[0].Digest, w.registry.Addr())
	if _, err := io.ReadFull(c, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	c.Close()
	w.wantWhole(w.get(w.blob(w.img.Layers[0])), w.img.Layers[0])
}

// Ranges as clients see them; parseRange has the table of what is one.
func TestRanges(t *testing.T) {
	w := newWorld(t, rig.RegistryOptions{}, nil)
	layer := w.img.Layers[0]
	whole := w.content(layer)
	for _, c := range []struct {
		header   string
		off, end int64
	}{
		{"bytes=0-0", 0, 1},
		{"bytes=262143-262144", 262143, 262145},        // over the seam of two pieces
		{"bytes=4194300-8388700", 4194300, 8388701},    // over three segments
		{"bytes=-1", layerSize - 1, layerSize},         // the last byte waits for the digest
		{"bytes=9437184-", 9437184, layerSize},         // from a piece's start to the end
		{"bytes=9437000-99999999", 9437000, layerSize}, // beyond the end
		{"bytes=-99999999", 0, layerSize},              // longer than it is
		{fmt.Sprintf("bytes=0-%d", layerSize-1), 0, layerSize},
	} {
		a := w.get(w.blob(layer), "Range", c.header)
		want := fmt.Sprintf("bytes %d-%d/%d", c.off, c.end-1, layerSize)
		if a.StatusCode != http.StatusPartialContent || a.err != nil || a.Header.Get("Content-Range") != want || a.ContentLength != c.end-c.off {
			t.Errorf("%s: %s, %q, length %d, %v", c.header, a.Status, a.Header.Get("Content-Range"), a.ContentLength, a.err)
		}
		if !bytes.Equal(a.body, whole[c.off:c.end]) {
			t.Errorf("%s: %d other bytes", c.header, len(a.body))
		}
	}
	for _, header := range []string{"bytes=0-1,5-6", "bytes=9-5", "lines=1-2"} {
		w.wantWhole(w.get(w.blob(layer), "Range", header), layer)
	}
	for _, header := range []string{fmt.Sprintf("bytes=%d-", layerSize), "bytes=-0"} {
		a := w.get(w.blob(layer), "Range", header)
		w.wantError(a, http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID")
		if cr := a.Header.Get("Content-Range"); cr != fmt.Sprintf("bytes */%d", layerSize) {
			t.Errorf("%s: Content-Range %q", header, cr)
		}
	}
	if head := w.do(http.MethodHead, w.blob(layer), "Range", "bytes=0-9"); len(head.body) != 0 || head.StatusCode/100 != 2 {
		t.Errorf("HEAD with a range: %s, %d bytes", head.Status, len(head.body))
	}
}

// On loopback it is the user at the other end who counts.
func TestLocalUsers(t *testing.T) {
	rig.RequireRoot(t)
	w := newWorld(t, rig.RegistryOptions{}, func(o *mirror.Options) { o.Allow = mirror.LocalUsers(0) })
	w.wantWhole(w.get(w.url("team/app/manifests/1")), w.img.Manifest)
	for uid, want := range map[uint32]string{0: "200 ", nobody: "403 "} {
		if out := getAs(t, uid, w.url("team/app/manifests/1")); !strings.HasPrefix(out, want) {
			t.Errorf("user %d: %.300s", uid, out)
		}
	}
	out := getAs(t, nobody, w.url("team/app/manifests/1"))
	if !strings.Contains(out, "docker quay pull") || strings.Contains(out, "layers") {
		t.Errorf("what is told to another user: %.300s", out)
	}
}

// containerd, told of the mirror by a hosts.toml and nothing else, pulls through
// it, also when the registry is gone.
func TestContainerd(t *testing.T) {
	rig.RequireRoot(t)
	ctx := t.Context()
	w := newWorld(t, rig.RegistryOptions{TLS: true}, func(o *mirror.Options) { o.Allow = mirror.LocalUsers(0) })
	busybox, err := image.Busybox(ctx, rig.ImageDir(), image.Gzip)
	if err != nil {
		t.Skip(err)
	}
	w.img = busybox
	w.push("team/busybox", "1")
	if err := w.registry.WriteHosts(w.hosts); err != nil { // for the mirror's own way to the registry
		t.Fatal(err)
	}

	r := rig.ForTest(t)
	c, err := r.StartContainerd(ctx, rig.ContainerdOptions{})
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	hosts := filepath.Join(c.CertsDir(), w.registry.Addr())
	if err := os.MkdirAll(hosts, 0o755); err != nil {
		t.Fatal(err)
	}
	// No CA for the registry: containerd cannot go there itself.
	toml := fmt.Sprintf("[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", w.mirror.URL)
	if err := os.WriteFile(filepath.Join(hosts, "hosts.toml"), []byte(toml), 0o644); err != nil {
		t.Fatal(err)
	}
	ref := w.registry.Ref("team/busybox:1")
	if err := c.Pull(ctx, "", "", ref); err != nil {
		t.Fatal(err)
	}
	if s := w.registry.Stats(); s.Blobs > busybox.Size() {
		t.Errorf("the registry gave %d bytes of an image of %d", s.Blobs, busybox.Size())
	}
	if err := w.registry.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := c.Pull(ctx, "again", "", ref); err != nil {
		t.Fatalf("with the registry stopped: %v", err)
	}
	client, err := c.Client("again")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	img, err := client.GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	if img.Target().Digest != busybox.Manifest.Digest {
		t.Errorf("containerd has %s instead of %s", img.Target().Digest, busybox.Manifest.Digest)
	}
}
