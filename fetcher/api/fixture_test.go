package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// asChild marks a process that the tests started under another user; its value
// is an errand.
const asChild = "API_TEST_ERRAND"

func TestMain(m *testing.M) {
	if e := os.Getenv(asChild); e != "" {
		var err error
		if err = json.Unmarshal([]byte(e), &errandOf); err == nil {
			err = errandOf.run()
		}
		out := fault{}
		if err != nil {
			out = faultOf(err)
		}
		_ = json.NewEncoder(os.Stdout).Encode(out)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m,
		// The rig keeps one thread for good, which its processes' lives are tied to.
		goleak.IgnoreAnyFunction("github.com/docker-quay/docker-quay/test/rig.startOnLastingThread.func1.1"))
}

var errandOf errand

// errand is what a process of another user shall do: with a session, read from
// it; without, open one and read all of the image.
type errand struct {
	Socket  string
	Session string
	Part    digest.Digest
	Request ImageRequest
}

func (e errand) run() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	c, _, err := Dial(ctx, e.Socket)
	if err != nil {
		return err
	}
	if e.Session != "" {
		s := &Session{c: c, Image: Image{Session: e.Session}}
		r, err := s.Open(ctx, ocispec.Descriptor{Digest: e.Part})
		if err != nil {
			if ps := s.Progress(); ps != nil {
				return fmt.Errorf("was told the progress of another's session: %v", ps)
			}
			return errors.Join(err, s.Close())
		}
		b, _ := io.ReadAll(r)
		return fmt.Errorf("got %d bytes out of another's session", len(b))
	}
	s, err := c.Image(ctx, e.Request)
	if err != nil {
		return err
	}
	return errors.Join(s.Fetch(ctx), s.Close())
}

// nobody is a user who owns nothing here.
const nobody = 65534

// errandAs runs an errand in a process of another user and returns its error.
func (w *world) errandAs(uid uint32, e errand) error {
	w.Helper()
	rig.RequireRoot(w)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		w.Fatal(err)
	}
	program := filepath.Join(w.dir, "child") // test binaries lie where only their owner can enter
	if err := os.WriteFile(program, self, 0o755); err != nil {
		w.Fatal(err)
	}
	e.Socket = w.socket
	b, err := json.Marshal(e)
	if err != nil {
		w.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Env = []string{asChild + "=" + string(b)}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: uid, Gid: nobody},
		Pdeathsig:  syscall.SIGKILL,
	}
	out, err := cmd.Output()
	if err != nil {
		w.Fatalf("child as user %d: %v: %s", uid, err, out)
	}
	var f fault
	if err := json.Unmarshal(out, &f); err != nil {
		w.Fatalf("child as user %d: %v: %s", uid, err, out)
	}
	if f.Message == "" {
		return nil
	}
	return f.err()
}

// world is a private registry with an image, and a node that serves its API.
type world struct {
	*testing.T
	dir      string // that everybody may enter
	registry *rig.Registry
	img      *image.Image
	store    *store.Store
	fetcher  *fetcher.Fetcher
	server   *Server
	socket   string
	client   *Client
}

const (
	username = "user"
	password = "secret"
	// layerSize is a few segments and many pieces, and no multiple of either.
	layerSize = 9<<20 + 1536
)

func newWorld(t *testing.T) *world {
	t.Helper()
	ctx := t.Context()
	r := rig.ForTest(t)
	g, err := r.StartRegistry(ctx, rig.RegistryOptions{Username: username, Password: password})
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
	target := image.Target{URL: g.URL(), Client: g.Client(), Username: username, Password: password}
	if err := w.img.Push(ctx, target, "team/app", "1"); err != nil {
		t.Fatal(err)
	}
	if w.dir, err = os.MkdirTemp("", "api"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(w.dir) })
	if err := os.Chmod(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if w.store, err = store.Open(store.Options{Dir: filepath.Join(t.TempDir(), "store")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.store.Close() })
	f, err := fetcher.New(ctx, fetcher.Options{Store: w.store})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w.fetcher = f
	w.server = NewServer(ServerOptions{
		Fetcher: f,
		Origin: func(req ImageRequest) (*origin.Client, error) {
			return origin.New(origin.Options{
				Credentials: req.Credential, HostDirs: []string{w.dir}, Insecure: req.Insecure, MaxRetries: -1,
			})
		},
		Status: func() Status {
			u, _ := w.store.Usage()
			return Status{Version: "1.2.3", Mirror: "127.0.0.1:1", Store: u}
		},
	})
	w.socket = filepath.Join(w.dir, "quay.sock")
	l, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(w.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.server.Serve(serving, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		w.server.Close()
	})
	if w.client, _, err = Dial(ctx, w.socket); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.client.Close() })
	return w
}

// request is for the image with the right login.
func (w *world) request() ImageRequest { return w.requestWith(username, password) }

func (w *world) requestWith(user, secret string) ImageRequest {
	r := ImageRequest{Ref: w.registry.Ref("team/app:1")}
	if secret != "" {
		r.Credentials = map[string]Credential{w.registry.Addr(): {user, secret}}
	}
	return r
}

func (w *world) open() *Session {
	w.Helper()
	s, err := w.client.Image(w.Context(), w.request())
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { _ = s.Close() })
	return s
}

// content is a part of the image, from the file it was pushed from.
func (w *world) content(d ocispec.Descriptor) []byte {
	w.Helper()
	b, err := os.ReadFile(w.img.Path(d.Digest))
	if err != nil {
		w.Fatal(err)
	}
	return b
}

func (w *world) sessions() int {
	w.server.mu.Lock()
	defer w.server.mu.Unlock()
	return len(w.server.sessions)
}

// wantEmpty checks that the node has nothing of the image.
func (w *world) wantEmpty() {
	w.Helper()
	if u, err := w.store.Usage(); err != nil || u.Blobs != 0 {
		w.Errorf("the store has %+v, %v", u, err)
	}
	if refs, err := w.store.Refs(); err != nil || len(refs) != 0 {
		w.Errorf("the store knows %v, %v", refs, err)
	}
}
