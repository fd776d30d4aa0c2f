package plugin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// peersWorld is a registry with one image and a node that serves its API, as the node daemon does.
type peersWorld struct {
	node   *fetcher.Fetcher
	socket string
	ref    string
	layer  digest.Digest
	size   int
}

// newPeersWorld starts a node; with a secret it is one of a cluster, with those peers.
func newPeersWorld(t *testing.T, s *trust.Secret, peers ...string) *peersWorld {
	t.Helper()
	layer := bytes.Repeat([]byte("layer of an image "), 60000)
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`)
	describe := func(mediaType string, b []byte) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	}
	manifest, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: describe(ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{describe(ocispec.MediaTypeImageLayer, layer)},
	})
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for _, b := range [][]byte{layer, config, manifest} {
		content[digest.FromBytes(b).String()] = b
	}
	reg := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		what := filepath.Base(r.URL.Path)
		if what == "1" {
			what = digest.FromBytes(manifest).String()
		}
		b, ok := content[what]
		switch {
		case r.URL.Path == "/v2/":
			return
		case !ok:
			w.WriteHeader(http.StatusNotFound)
			return
		case strings.Contains(r.URL.Path, "/manifests/"):
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Header().Set("Docker-Content-Digest", what)
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
	}))
	t.Cleanup(reg.Close)

	dir, err := os.MkdirTemp("", "peers") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	st, err := store.Open(store.Options{Dir: filepath.Join(dir, "store")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	w := &peersWorld{socket: filepath.Join(dir, "quay.sock"), layer: digest.FromBytes(layer), size: len(layer)}
	w.ref = strings.TrimPrefix(reg.URL, "http://") + "/team/app:1"
	if w.node, err = fetcher.New(t.Context(), fetcher.Options{Store: st, Secret: s, Listen: "127.0.0.1", Peers: peers, Zone: "eu-1/a"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.node.Close() })
	server := api.NewServer(api.ServerOptions{
		Fetcher: w.node,
		Origin: func(req api.ImageRequest) (*origin.Client, error) {
			return origin.New(origin.Options{Credentials: req.Credential, HostDirs: []string{dir}, Insecure: req.Insecure, MaxRetries: -1})
		},
		Status: func() api.Status { return api.Status{Version: "1.2.3"} },
	})
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(serving, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		server.Close()
	})
	return w
}

// pull fetches the image's layer into the node; until the test ends it is open, and shared.
func (w *peersWorld) pull(t *testing.T) {
	t.Helper()
	c, err := origin.New(origin.Options{HostDirs: []string{}, Credentials: func(string) (string, string, error) { return "", "", nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	ref, err := reference.ParseNormalizedNamed(w.ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := w.node.Image(t.Context(), ref, fetcher.ImageOptions{Origin: c, Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	r, err := img.Open(t.Context(), img.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
}

func (w *peersWorld) run(t *testing.T, args ...string) result {
	t.Helper()
	return run(t, "ok", "docker-quay", append([]string{"peers", "--socket", w.socket}, args...)...)
}

// TestPeersOfACluster: what a person and a script see of a node with a member, a peer that is silent, and a layer.
func TestPeersOfACluster(t *testing.T) {
	s := trust.NewSecret()
	other := newPeersWorld(t, &s)
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent := nobody.Addr().String()
	nobody.Close()
	w := newPeersWorld(t, &s, other.node.Addr().String(), silent)
	w.pull(t)
	for end := time.Now().Add(10 * time.Second); len(w.node.Report().Silent) == 0 || w.node.Report().Blobs[0].HoldersComplete == 0; {
		if time.Now().After(end) {
			t.Fatalf("%+v", w.node.Report())
		}
		time.Sleep(20 * time.Millisecond)
	}

	r := w.run(t)
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("exit code %d, standard error %q", r.code, r.stderr)
	}
	noControl(t, r.stdout)
	member, short := other.node.NodeID()[:12], w.layer.Encoded()[:12]
	for _, want := range []string{
		"Node " + w.node.NodeID()[:12] + " at " + w.node.Addr().String() + ", zone eu-1/a\n",
		"MEMBER", member + "   " + other.node.Addr().String() + "   eu-1/a", "SILENT PEER", silent, "BLOB", short + "   complete", "1+0", w.ref,
	} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("it lacks %q:\n%s", want, r.stdout)
		}
	}

	var report fetcher.Report
	if r := w.run(t, "--format", "json"); json.Unmarshal([]byte(r.stdout), &report) != nil || len(report.Members) != 1 ||
		report.Members[0].ID != other.node.NodeID() || report.Silent[0].Peer != silent || report.Blobs[0].FromOrigin+report.Blobs[0].FromPeers != int64(w.size) {
		t.Errorf("as JSON: %+v", r)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--format", "{{len .Members}} {{(index .Blobs 0).State}}"}, "1 complete\n"},
		{[]string{"--no-trunc", "--format", `table {{.Digest}}\t{{.Have}}`}, "BLOB" + strings.Repeat(" ", 70) + "HAVE\n" + w.layer.String() + "   100%\n"},
		{[]string{"--format", "{{range .Blobs}}{{.Digest}}{{end}}", w.layer.String()}, w.layer.String() + "\n"},
		{[]string{"--format", "{{range .Blobs}}{{.Digest}}{{end}}", w.ref}, w.layer.String() + "\n"},
		{[]string{digest.FromString("nothing").String()}, "This node has nothing of it.\n"},
	} {
		if r := w.run(t, c.args...); r.code != 0 || r.stdout != c.want {
			t.Errorf("%q: exit code %d, %q, want %q; %s", c.args, r.code, r.stdout, c.want, r.stderr)
		}
	}
	if r := w.run(t, w.ref); r.code != 0 || strings.Contains(r.stdout, "MEMBER") || !strings.Contains(r.stdout, short) {
		t.Errorf("of an image: %+v", r)
	}
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--format", "{{.Nothing}}"}, 125, "--format"},
		{[]string{"--format", "table {{.Nothing}}"}, 125, "--format"},
		{[]string{"--format", "{{"}, 125, "--format"},
		{[]string{"UPPER"}, 125, "neither the name of an image nor a digest"},
		{[]string{strings.TrimSuffix(w.ref, "1") + "2"}, 3, "team/app:2"},
	} {
		if r := w.run(t, c.args...); r.code != c.code || !strings.Contains(r.stderr, c.says) {
			t.Errorf("%q: %+v", c.args, r)
		}
	}
}

// TestPeersAlone: a node without a secret says so.
func TestPeersAlone(t *testing.T) {
	w := newPeersWorld(t, nil)
	if r := w.run(t); r.code != 0 || !strings.HasPrefix(r.stdout, "This node has no cluster secret") {
		t.Errorf("%+v", r)
	}
}

// TestPeersWatch: it shows the report again until it is interrupted, which is no failure; off a terminal without
// control characters.
func TestPeersWatch(t *testing.T) {
	w := newPeersWorld(t, nil)
	cmd, out := process(t, "ok", "docker-quay", "peers", "--socket", w.socket, "--watch", "--format", "{{len .Blobs}} blobs")
	watch := &watcher{until: "0 blobs\n0 blobs\n", seen: make(chan struct{})}
	cmd.Stdout = watch
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-watch.seen:
	case <-time.After(20 * time.Second):
		t.Error("it was shown once")
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if r := out(cmd.Wait()); r.code != 0 {
		t.Errorf("%+v", r)
	}
	noControl(t, watch.buf.String())
}
