package snapshotter

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// testConfig is a node in a test's folder that listens on nothing but sockets.
func testConfig(t *testing.T) Config {
	t.Helper()
	// Sockets have short paths: not t.TempDir, which has the test's name in it.
	dir, err := os.MkdirTemp("", "quay")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := DefaultConfig()
	cfg.Root, cfg.State = filepath.Join(dir, "root"), filepath.Join(dir, "run")
	cfg.Snapshotter.Socket, cfg.API.Socket = filepath.Join(dir, "run", "s.sock"), filepath.Join(dir, "run", "a.sock")
	cfg.API.Group = ""
	cfg.Peers.SecretFile = filepath.Join(dir, "none")
	cfg.Mirror.Listen, cfg.Metrics.Listen = "", "127.0.0.1:0"
	return cfg
}

// TestServer: containerd's own proxy client over the socket; a lazy layer, an unpacked
// one, and an end while the socket is in use.
func TestServer(t *testing.T) {
	needRoot(t)
	l := lazytest.EStargz(t, lazytest.Tar(t, file("a", "text", 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	log := new(lines)
	captureLibraryLog(log.logger())
	cfg := testConfig(t)
	srv, err := New(t.Context(), cfg, Deps{Layers: img, Log: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve() }()
	if i, err := os.Stat(cfg.Snapshotter.Socket); err != nil || i.Mode().Perm() != 0o600 {
		t.Error("the socket:", i.Mode(), err)
	}
	conn, err := grpc.NewClient("unix:"+cfg.Snapshotter.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx := namespaces.WithNamespace(t.Context(), "test")
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "quay")
	labels := lazytest.Labels(l)
	labels[targetLabel] = "A"
	if _, err := sn.Prepare(ctx, "extract", "", snapshots.WithLabels(labels)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("lazy layer: got %v, want already exists", err)
	}
	if m, err := sn.Prepare(ctx, "plain", "A"); err != nil || len(m) != 1 || m[0].Type != "overlay" {
		t.Errorf("container: %v, %v", m, err)
	}
	if err := srv.Healthy(ctx); err != nil {
		t.Error(err)
	}
	if _, err := New(t.Context(), cfg, Deps{Log: log.logger()}); !errors.Is(err, ErrInUse) {
		t.Errorf("a second daemon: got %v, want ErrInUse", err)
	}
	sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := srv.Shutdown(sctx); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if left := mountsBelow(t, cfg.Root); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
}

// TestLazyOff: nothing is mounted when the configuration says so.
func TestLazyOff(t *testing.T) {
	needRoot(t)
	l := lazytest.EStargz(t, lazytest.Tar(t, file("a", "text", 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	log := new(lines)
	cfg := testConfig(t)
	cfg.Snapshotter.Lazy = false
	srv, err := New(t.Context(), cfg, Deps{Layers: img, Log: log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	labels := lazytest.Labels(l)
	labels[targetLabel] = "A"
	if _, err := srv.sn.Prepare(t.Context(), "extract", "", snapshots.WithLabels(labels)); err != nil {
		t.Error(err)
	}
	if n := countLines(log.String(), "served=unpack", "lazy mounting is off"); n != 1 {
		t.Error(log)
	}
	if err := srv.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestRun: a whole daemon, started, and ended by its context.
func TestRun(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	log := new(lines)
	ctx, cancel := context.WithCancel(t.Context())
	ready, stopping := make(chan func(context.Context) error, 1), make(chan bool, 1)
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, cfg, Options{
			Version: "test", Log: log.logger(),
			Ready:    func(h func(context.Context) error) { ready <- h },
			Stopping: func() { stopping <- true },
		})
	}()
	select {
	case healthy := <-ready:
		if err := healthy(ctx); err != nil {
			t.Error(err)
		}
	case err := <-done:
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-stopping
	if n := countLines(log.String(), "level=INFO", "serving", "metrics on http://127.0.0.1:"); n != 1 {
		t.Error(log)
	}
}

func TestListen(t *testing.T) {
	dir, err := os.MkdirTemp("", "quay")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "sub", "s.sock")
	l, err := Listen(path, 0o660, "no-such-group")
	if err != nil {
		t.Fatal(err)
	}
	if i, err := os.Stat(path); err != nil || i.Mode().Perm() != 0o660 {
		t.Error(i.Mode(), err)
	}
	t.Run("live", func(t *testing.T) {
		if _, err := Listen(path, 0o600, ""); !errors.Is(err, ErrInUse) {
			t.Errorf("got %v, want ErrInUse", err)
		}
		if c, err := net.Dial("unix", path); err != nil {
			t.Error("the live socket was taken away:", err)
		} else {
			c.Close()
		}
	})
	t.Run("dead", func(t *testing.T) {
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		l.Close()
		l, err := Listen(path, 0o600, "")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	})
	t.Run("no socket", func(t *testing.T) {
		if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Listen(path, 0o600, ""); err == nil || !strings.Contains(err.Error(), "is no socket") {
			t.Error(err)
		}
		if b, _ := os.ReadFile(path); string(b) != "mine" {
			t.Error("the file was changed")
		}
	})
}
