package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fullDisk is a folder on a file system without room.
func fullDisk(t *testing.T) (dir string) {
	t.Helper()
	needRoot(t)
	at := t.TempDir()
	if err := unix.Mount("tmpfs", at, "tmpfs", 0, "size=64k,nr_inodes=8"); err != nil {
		t.Skip("a file system cannot be mounted here:", err)
	}
	t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
	dir = filepath.Join(at, "layers")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// fill takes the rest.
func fill(t *testing.T, dir string) {
	t.Helper()
	for i := 'a'; ; i++ {
		switch err := os.Mkdir(filepath.Join(dir, "ballast-"+string(i)), 0o700); {
		case errors.Is(err, unix.ENOSPC):
			return
		case err != nil:
			t.Fatal(err)
		}
	}
}

// TestNoRoomToProbe: where no way to mount can be tried for want of room it is the former one; without one the daemon does not start,
// rather than mount in another way what it will have.
func TestNoRoomToProbe(t *testing.T) {
	dir := fullDisk(t)
	layer := filepath.Join(dir, "layers", "sha256-1")
	if err := os.MkdirAll(layer, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layer, "meta.erofs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fill(t, dir)
	c, err := chooseMount(MountAuto, dir, "/bin/true", "/s")
	if err != nil || c.way != MountEROFS || !strings.Contains(c.why, "no space left") {
		t.Errorf("with a layer there: %+v, %v", c, err)
	}
	if err := os.Rename(filepath.Join(layer, "meta.erofs"), filepath.Join(layer, "other")); err != nil {
		t.Fatal(err)
	}
	if c, err := chooseMount(MountAuto, dir, "/bin/true", "/s"); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("without any: %+v, %v", c, err)
	}
}

// TestOldProbesAreRemoved: also those that seem to be of the future. A young one is left to whom it may belong.
func TestOldProbesAreRemoved(t *testing.T) {
	dir := t.TempDir()
	for name, age := range map[string]time.Duration{"old": 2 * probeAge, "young": 0, "future": -2 * probeAge} {
		path, at := filepath.Join(dir, "erofs-probe-"+name), time.Now().Add(-age)
		if err := errors.Join(os.Mkdir(path, 0o700), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	removeProbes(dir)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "erofs-probe-young" {
		t.Errorf("left: %v, %v", left, err)
	}
}
