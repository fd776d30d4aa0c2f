package snapshotter

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// TestMain has the test binary be the daemon's helper processes, too.
func TestMain(m *testing.M) {
	var err error
	switch {
	case len(os.Args) > 2 && os.Args[1] == KeeperCommand:
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
		err = keeper.Run(ctx, os.Args[2])
		stop()
	case len(os.Args) > 1 && os.Args[1] == MounterCommand:
		err = layerfs.RunMounter(os.Stdin, os.Stdout)
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// self is this test's program.
func self(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// erofsOptions are those of a file system whose folders are below root.
func erofsOptions(t testing.TB, root string, img *lazytest.Image, log *lines) *layerfs.Options {
	t.Helper()
	socket := filepath.Join(filepath.Dir(root), "keeper.sock")
	return &layerfs.Options{
		Store: filepath.Join(filepath.Dir(root), "layers"), State: root, Source: img, Quiet: 50 * time.Millisecond,
		Log: log.logger(), Socket: socket,
		Keeper: []string{self(t), KeeperCommand, socket}, Mounter: []string{self(t), MounterCommand},
	}
}

// newEROFS is newRig with layers mounted as EROFS.
func newEROFS(t *testing.T, img *lazytest.Image) *rig {
	t.Helper()
	return newEROFSBy(t, MountEROFS, img)
}

// newEROFSBy is newEROFS in one of the two ways.
func newEROFSBy(t *testing.T, way string, img *lazytest.Image) *rig {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	err := erofs.ProbeLoop(dir)
	if way == MountEROFS {
		_, err = erofs.Probe(dir)
	}
	if err != nil {
		t.Skip(err)
	}
	before := goleak.IgnoreCurrent()
	r := &rig{t: t, root: filepath.Join(dir, "root"), log: new(lines)}
	r.erofs = erofsOptions(t, r.root, img, r.log)
	r.erofs.Loop = way == MountLoop
	r.open(nil)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error("Close:", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := layerfs.Abandon(ctx, r.root, r.erofs.Socket); err != nil {
			t.Error(err)
		}
		if err := unmountBelow(filepath.Join(r.root, "snapshots"), nil, r.log.logger()); err != nil {
			t.Error(err)
		}
		if left := mountsBelow(t, dir); len(left) > 0 {
			t.Errorf("mounts left: %v", left)
		}
		eventually(t, func() bool { return len(loopsBelow(t, dir)) == 0 })
		goleak.VerifyNone(t, before)
		if t.Failed() {
			t.Log(r.log)
		}
	})
	return r
}
