package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// TestEROFSOutlives: mounts stay when the daemon ends; what is missing is read with the next one. A complete layer
// needs neither daemon nor registry.
func TestEROFSOutlives(t *testing.T) {
	img := lazytest.NewImage()
	part, wantPart := layerOf(t, lazytest.EStargz, "part")
	whole, wantWhole := layerOf(t, lazytest.Gzip, "whole")
	img.Add(part)
	img.Add(whole)
	let := img.Hold()
	defer let()
	r := newEROFS(t, img)
	r.layer("whole", "", whole)
	r.layer("part", "", part)
	mounts := mountsBelow(t, filepath.Join(r.root, "snapshots"))
	if len(mounts) != 2 {
		t.Fatal(mounts)
	}
	f, err := os.Open(filepath.Join(mounts[1], "part"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(mounts, mountsBelow(t, filepath.Join(r.root, "snapshots"))); d != "" {
		t.Error("mounts after the end:", d)
	}
	img.Remove(whole.Desc.Digest)
	if b, err := os.ReadFile(filepath.Join(mounts[0], "whole")); err != nil || string(b) != wantWhole {
		t.Error("a complete layer without a daemon:", err)
	}
	read := make(chan error, 1)
	go func() {
		b := make([]byte, len(wantPart))
		_, err := f.ReadAt(b, 0)
		if err == nil && string(b) != wantPart {
			err = errors.New("wrong bytes")
		}
		read <- err
	}()
	select {
	case err := <-read:
		t.Fatal("a read of what is missing ended without a daemon:", err)
	case <-time.After(200 * time.Millisecond):
	}
	r.open(nil)
	select {
	case err := <-read:
		if err != nil {
			t.Error("a read that waited for the next daemon:", err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a read waits though there is a daemon again")
	}
	if d := cmp.Diff(mounts, mountsBelow(t, filepath.Join(r.root, "snapshots"))); d != "" {
		t.Error("mounts after the start:", d)
	}
}

// reboot ends a rig's daemon as a reboot does: nothing is mounted and no keeper runs.
func (r *rig) reboot() {
	r.t.Helper()
	if err := r.Close(); err != nil {
		r.t.Fatal(err)
	}
	if err := layerfs.Abandon(r.t.Context(), r.root, r.erofs.Socket); err != nil {
		r.t.Fatal(err)
	}
	if err := unmountBelow(filepath.Join(r.root, "snapshots"), nil, r.log.logger()); err != nil {
		r.t.Fatal(err)
	}
}

// TestEROFSReboot: every snapshot comes back from what is on disk with the registry down; one whose layer is damaged is
// reported, harms no other, and heals when the registry is back.
func TestEROFSReboot(t *testing.T) {
	img := lazytest.NewImage()
	part, wantPart := layerOf(t, lazytest.ZstdChunked, "part")
	whole, _ := layerOf(t, lazytest.Gzip, "whole")
	bad, _ := layerOf(t, lazytest.Gzip, "bad")
	for _, l := range []lazytest.Layer{part, whole, bad} {
		img.Add(l)
	}
	let := img.Hold()
	defer let()
	r := newEROFS(t, img)
	r.layer("part", "", part)
	r.layer("whole", "part", whole)
	r.layer("bad", "", bad)
	r.in("part", func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "part")); err != nil || string(b) != wantPart {
			t.Error(err)
		}
	})
	r.reboot()
	if err := os.Remove(filepath.Join(r.erofs.Store, "layers", "sha256-"+bad.Desc.Digest.Encoded(), "meta.erofs")); err != nil {
		t.Fatal(err)
	}
	img.Down(errors.New("registry away"))
	r.open(nil)
	r.in("whole", func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, part, whole)), describe(t, dir)); d != "" {
			t.Error(d)
		}
	})
	if _, err := r.Prepare(t.Context(), "broken", "bad"); !errdefs.IsUnavailable(err) {
		t.Errorf("a container on the broken layer: got %v, want unavailable", err)
	}
	if n := countLines(r.log.String(), "failed=1", "layers=2"); n != 1 {
		t.Error("the log does not say that one of three failed")
	}
	if err := r.Remove(t.Context(), "broken"); err != nil {
		t.Fatal(err)
	}
	img.Down(nil)
	let2 := img.Hold()
	let2()
	r.in("bad", func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, bad)), describe(t, dir)); d != "" {
			t.Error(d)
		}
	})
}

// TestEROFSKeeperKilled: without keeper and daemon what is missing is EIO, never zeros; the next daemon mounts all anew.
func TestEROFSKeeperKilled(t *testing.T) {
	img := lazytest.NewImage()
	part, want := layerOf(t, lazytest.EStargz, "part")
	img.Add(part)
	let := img.Hold()
	defer let()
	r := newEROFS(t, img)
	r.layer("part", "", part)
	f, err := os.Open(filepath.Join(mountsBelow(t, filepath.Join(r.root, "snapshots"))[0], "part"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := keeper.End(t.Context(), r.erofs.Socket); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len(want))
	if _, err := f.ReadAt(b, 0); !errors.Is(err, unix.EIO) {
		t.Errorf("without keeper and daemon a read gives %v, want EIO", err)
	}
	r.open(nil)
	r.in("part", func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "part")); err != nil || string(b) != want {
			t.Error(err)
		}
	})
}

// TestEROFSClockJump: every file that the daemon has left is of yesterday, or of tomorrow, for the next one. It takes over what is
// mounted, reads what is there, and fetches the rest.
func TestEROFSClockJump(t *testing.T) {
	for name, by := range map[string]time.Duration{"ahead": -24 * time.Hour, "back": 24 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			img := lazytest.NewImage()
			part, want := layerOf(t, lazytest.EStargz, "part")
			whole, _ := layerOf(t, lazytest.Gzip, "whole")
			img.Add(part)
			img.Add(whole)
			let := img.Hold()
			r := newEROFS(t, img)
			r.layer("part", "", part)
			r.layer("whole", "part", whole)
			mounts := mountsBelow(t, filepath.Join(r.root, "snapshots"))
			f, err := os.Open(filepath.Join(mounts[0], "part"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			read := func(off int) {
				t.Helper()
				b := make([]byte, 4096)
				if _, err := f.ReadAt(b, int64(off)); err != nil || string(b) != want[off:off+len(b)] {
					t.Errorf("at %d: %v", off, err)
				}
			}
			read(0)
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			then := time.Now().Add(by)
			for _, dir := range []string{r.erofs.Store, r.root} {
				setTimes(t, dir, then)
			}
			r.open(nil)
			if d := cmp.Diff(mounts, mountsBelow(t, filepath.Join(r.root, "snapshots"))); d != "" {
				t.Error("mounts after the start:", d)
			}
			read(0)
			read(len(want) / 2)
			let()
			eventually(t, func() bool { return r.layers.Status().Data == 2 })
			r.in("whole", func(dir string) {
				if d := cmp.Diff(describe(t, unpacked(t, part, whole)), describe(t, dir)); d != "" {
					t.Error(d)
				}
			})
		})
	}
}

// setTimes gives one time to all files below a folder that are on its file system.
func setTimes(t *testing.T, dir string, to time.Time) {
	t.Helper()
	var own unix.Stat_t
	if err := unix.Stat(dir, &own); err != nil {
		t.Fatal(err)
	}
	var times [2]unix.Timespec
	for i := range times {
		times[i] = unix.NsecToTimespec(to.UnixNano())
	}
	err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		var st unix.Stat_t
		if err != nil || unix.Lstat(path, &st) != nil {
			return err
		}
		if st.Dev != own.Dev {
			return filepath.SkipDir
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, times[:], unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestEROFSOldMounts: a container that was started before its layer was complete reads on by way of the daemon, which knows of
// it after a restart, and when its image was removed.
func TestEROFSOldMounts(t *testing.T) {
	img := lazytest.NewImage()
	l, want := layerOf(t, lazytest.EStargz, "a")
	img.Add(l)
	let := img.Hold()
	r := newEROFS(t, img)
	r.layer("a", "", l)
	at := mountsBelow(t, filepath.Join(r.root, "snapshots"))[0]
	// What runc has: an overlay, which keeps the layer though it is not seen to use its mount.
	merged := t.TempDir()
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "lowerdir="+at+":"+t.TempDir()); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	part := func(off int) {
		t.Helper()
		f, err := os.Open(filepath.Join(merged, "a"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b := make([]byte, 4096)
		if _, err := f.ReadAt(b, int64(off)); err != nil || string(b) != want[off:off+len(b)] {
			t.Errorf("at %d: %v", off, err)
		}
	}
	part(0)
	let()
	eventually(t, func() bool { st := r.layers.Status(); return st.Data == 1 })
	part(len(want) / 4)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(nil)
	part(len(want) / 2)
	if err := r.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	part(len(want) / 4 * 3)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(nil)
	part(len(want) - 4096)
	if st := r.layers.Status(); st.Errors != 0 || st.Layers.Layers != 1 {
		t.Errorf("a container uses the layer: %+v", st)
	}
	if err := unix.Unmount(merged, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return r.layers.Status().Layers.Layers == 0 })
}

// TestEROFSKeeperEnds: when all layers are complete an orderly stop leaves mounts, and nothing else; the next daemon takes
// them over as they are.
func TestEROFSKeeperEnds(t *testing.T) {
	img := lazytest.NewImage()
	l, want := layerOf(t, lazytest.Gzip, "a")
	img.Add(l)
	r := newEROFS(t, img)
	r.layer("a", "", l)
	mounts := mountsBelow(t, r.root) // blobfs, too
	if len(mounts) != 2 {
		t.Fatal(mounts)
	}
	at := filepath.Join(r.root, "snapshots", "1", "fs")
	var before, after unix.Stat_t
	if err := unix.Stat(at, &before); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := keeper.Dial(t.Context(), r.erofs.Socket); err == nil {
		t.Error("the keeper lives without anything to keep")
	}
	if b, err := os.ReadFile(filepath.Join(at, "a")); err != nil || string(b) != want {
		t.Error("without the daemon:", err)
	}
	r.open(nil)
	if err := unix.Stat(at, &after); err != nil || before.Dev != after.Dev {
		t.Errorf("the mount was replaced: device %d became %d, %v", before.Dev, after.Dev, err)
	}
	if st := r.layers.Status(); st.Mounts != 1 || st.Data != 1 {
		t.Errorf("after the next start: %+v", st)
	}
}
