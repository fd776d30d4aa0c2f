package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/mirror"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// asChild marks a process that the tests started under another user: it GETs
// the URL in it and prints the status and the body.
const asChild = "MIRROR_TEST_GET"

func TestMain(m *testing.M) {
	if u := os.Getenv(asChild); u != "" {
		resp, err := http.Get(u)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		body, _ := io.ReadAll(resp.Body)
		fmt.Printf("%d %s\n", resp.StatusCode, body)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m,
		// The rig keeps one thread for good, which its processes' lives are tied to.
		goleak.IgnoreAnyFunction("github.com/docker-quay/docker-quay/test/rig.startOnLastingThread.func1.1"))
}

// nobody is a user who owns nothing here.
const nobody = 65534

// getAs GETs a URL in a process of another user and returns what it printed.
func getAs(t *testing.T, uid uint32, u string) string {
	t.Helper()
	rig.RequireRoot(t)
	// Test binaries lie in folders that only their owner can enter.
	dir, err := os.MkdirTemp("", "mirror")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "child")
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = []string{asChild + "=" + u}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uid, Gid: nobody},
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("child as user %d: %v: %s", uid, err, out)
	}
	return string(out)
}

// world is a registry with an image of two layers, and a mirror of it.
type world struct {
	*testing.T
	registry *rig.Registry
	img      *image.Image
	mirror   *httptest.Server
	store    *store.Store
	origin   *origin.Client
	hosts    string // the certs.d root of origin, empty
}

// layerSize is a few segments and many pieces, and no multiple of either.
const layerSize = 9<<20 + 1536

func newWorld(t *testing.T, ro rig.RegistryOptions, edit func(*mirror.Options)) *world {
	t.Helper()
	ctx := t.Context()
	r := rig.ForTest(t)
	g, err := r.StartRegistry(ctx, ro)
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, registry: g}
	if w.img, err = image.Random(ctx, rig.ImageDir(), layerSize, 2); err != nil {
		t.Fatal(err)
	}
	w.push("team/app", "1")
	dir := t.TempDir()
	w.hosts = filepath.Join(dir, "certs.d")
	if w.store, err = store.Open(store.Options{Dir: filepath.Join(dir, "store")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.store.Close() })
	// The node has no logins and no configured hosts. How often a registry is asked again is not what is tested here.
	if w.origin, err = origin.New(origin.Options{DockerConfigDir: dir, HostDirs: []string{w.hosts}, MaxRetries: -1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.origin.Close() })
	f, err := fetcher.New(ctx, fetcher.Options{Store: w.store})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	o := mirror.Options{Fetcher: f, Origin: func(string) *origin.Client { return w.origin }}
	if edit != nil {
		edit(&o)
	}
	w.mirror = httptest.NewServer(mirror.New(o))
	t.Cleanup(w.mirror.Close)
	return w
}

func (w *world) push(repository, tag string) {
	w.Helper()
	user, password := w.registry.Credentials()
	target := image.Target{URL: w.registry.URL(), Client: w.registry.Client(), Username: user, Password: password}
	if err := w.img.Push(w.Context(), target, repository, tag); err != nil {
		w.Fatal(err)
	}
}

// url is an endpoint of the mirror for the registry's repositories.
func (w *world) url(path string) string {
	return w.mirror.URL + "/v2/" + path + "?" + url.Values{"ns": {w.registry.Addr()}}.Encode()
}

func (w *world) blob(d ocispec.Descriptor) string {
	return w.url("team/app/blobs/" + d.Digest.String())
}

// answer is a response that was read to its end; err is how the body ended.
type answer struct {
	*http.Response
	body []byte
	err  error
}

func (w *world) do(method, u string, header ...string) answer {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, u, nil)
	if err != nil {
		w.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := w.mirror.Client().Do(req)
	if err != nil {
		w.Fatalf("%s %s: %v", method, u, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp, body, err}
}

func (w *world) get(u string, header ...string) answer {
	w.Helper()
	return w.do(http.MethodGet, u, header...)
}

// content is a blob of the image, from the file it was pushed from.
func (w *world) content(d ocispec.Descriptor) []byte {
	w.Helper()
	b, err := os.ReadFile(w.img.Path(d.Digest))
	if err != nil {
		w.Fatal(err)
	}
	return b
}

// wantWhole checks an answer that has a part of the image.
func (w *world) wantWhole(a answer, d ocispec.Descriptor) {
	w.Helper()
	switch {
	case a.StatusCode != http.StatusOK || a.err != nil:
		w.Errorf("got %s, %v: %.200s", a.Status, a.err, a.body)
	case !bytes.Equal(a.body, w.content(d)):
		w.Errorf("got %d other bytes than those of %s", len(a.body), d.Digest)
	case a.Header.Get("Docker-Content-Digest") != d.Digest.String():
		w.Errorf("digest in the header is %q", a.Header.Get("Docker-Content-Digest"))
	case a.ContentLength != d.Size:
		w.Errorf("length in the header is %d of %d", a.ContentLength, d.Size)
	}
}

// wantError checks an answer in the specification's form of errors.
func (w *world) wantError(a answer, status int, code string) {
	w.Helper()
	if a.StatusCode != status || !strings.Contains(string(a.body), `"code":"`+code+`"`) || a.err != nil {
		w.Errorf("got %s, want %d with %s: %.300s (%v)", a.Status, status, code, a.body, a.err)
	}
	if ct := a.Header.Get("Content-Type"); ct != "application/json" {
		w.Errorf("an error as %q", ct)
	}
	if a.Header.Get("Docker-Content-Digest") != "" {
		w.Errorf("an error with a digest")
	}
}
