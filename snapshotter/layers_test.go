package snapshotter

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// registry serves one image on loopback, and counts requests.
func registry(t *testing.T, layers ...lazytest.Layer) (host string, manifest digest.Digest, requests *atomic.Int64) {
	t.Helper()
	config := []byte("{}")
	content := map[string][]byte{digest.FromBytes(config).String(): config}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))},
	}
	for _, l := range layers {
		content[l.Desc.Digest.String()] = l.Data
		m.Layers = append(m.Layers, l.Desc)
	}
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	manifest = digest.FromBytes(body)
	content[manifest.String()], content["1"] = body, body
	requests = new(atomic.Int64)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		name := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
		b, ok := content[name]
		switch {
		case r.URL.Path == "/v2/":
		case !ok:
			http.NotFound(w, r)
		default:
			if strings.Contains(r.URL.Path, "/manifests/") {
				w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
				w.Header().Set("Docker-Content-Digest", manifest.String())
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://"), manifest, requests
}

// TestLayersOverRegistry: a lazy image from a real fetcher; after a restart with the
// registry away it is there again.
func TestLayersOverRegistry(t *testing.T) {
	needRoot(t)
	lower, upper := trees(t)
	l, u := lazytest.EStargz(t, lower), lazytest.ZstdChunked(t, upper)
	host, manifest, requests := registry(t, l, u)
	cfg := testConfig(t)
	cfg.Origin.HostDirs = []string{}
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	log := new(lines)
	for _, c := range []struct {
		name     string
		ref      string
		manifest digest.Digest
	}{
		{"by digest", host + "/app:1", manifest},
		{"by tag as old containerds ask", host + "/app:1", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := cfg
			cfg.Root = filepath.Join(t.TempDir(), "root")
			node, err := NewNode(t.Context(), cfg, "test", log.logger())
			if err != nil {
				t.Fatal(err)
			}
			r := newRig(t, node.Layers)
			relabel := func(labels map[string]string) {
				labels[snapshotters.TargetRefLabel] = c.ref
				labels[snapshotters.TargetManifestDigestLabel] = c.manifest.String()
			}
			chain, lazily := r.pullAs(relabel, l, u)
			if d := cmp.Diff([]bool{true, true}, lazily); d != "" {
				t.Error(d)
			}
			want := describe(t, unpacked(t, l, u))
			check := func() {
				t.Helper()
				r.in(chain[1], func(dir string) {
					if d := cmp.Diff(want, describe(t, dir)); d != "" {
						t.Error(d)
					}
				})
			}
			check()
			for _, layer := range []lazytest.Layer{l, u} { // whole, by the background fetch
				eventually(t, func() bool {
					i, err := node.Layers.(*Layers).f.Store().Stat(layer.Desc.Digest)
					return err == nil && i.Complete
				})
			}
			if c.manifest != "" {
				before := requests.Load()
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				r.open(node.Layers)
				check()
				if n := requests.Load() - before; n != 0 {
					t.Errorf("the registry was asked %d times after the restart, want 0", n)
				}
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if err := shutdownAll(node.Services)(t.Context()); err != nil {
				t.Error(err)
			}
			if err := node.Close(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	if t.Failed() {
		t.Log(log)
	}
	if _, err := os.Stat(cfg.Root); err == nil {
		t.Error("the configuration's root was used")
	}
}
