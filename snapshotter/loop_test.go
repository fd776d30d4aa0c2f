package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// loopsBelow are the files below dir that are behind loop devices.
func loopsBelow(t *testing.T, dir string) (found []string) {
	t.Helper()
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		// A device that goes away meanwhile is none.
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
			found = append(found, strings.TrimSpace(string(b)))
		}
	}
	slices.Sort(found)
	return found
}

// TestLoop: on a kernel that mounts EROFS from devices only a layer lives as elsewhere. It is mounted before it is there, its
// readers outlive the daemon, complete it is read past the daemon, and it leaves no loop device behind.
func TestLoop(t *testing.T) {
	img := lazytest.NewImage()
	part, want := layerOf(t, lazytest.EStargz, "part")
	whole, _ := layerOf(t, lazytest.Gzip, "whole")
	img.Add(part)
	img.Add(whole)
	let := img.Hold()
	r := newEROFSBy(t, MountLoop, img)
	layers := filepath.Dir(r.root)
	chain, ours := r.pull(part, whole)
	if d := cmp.Diff([]bool{true, true}, ours); d != "" {
		t.Error("which layers are ours:", d)
	}
	if n := len(loopsBelow(t, layers)); n != 4 {
		t.Errorf("%d loop devices for two layers, want 4", n)
	}
	if st := r.layers.Status(); st.Mounts != 2 || st.Data != 1 {
		t.Errorf("at first: %+v", st)
	}
	// What a container has: an overlay, which keeps the layer's mount alive when it is replaced.
	merged := t.TempDir()
	lowers := mountsBelow(t, filepath.Join(r.root, "snapshots"))
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	f, err := os.Open(filepath.Join(merged, "part"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		b := make([]byte, len(want))
		_, err := f.ReadAt(b, 0)
		if err == nil && string(b) != want {
			err = errors.New("wrong bytes")
		}
		read <- err
	}()
	r.open(nil)
	if err := <-read; err != nil {
		t.Error("a read of what is missing, while there was no daemon:", err)
	}
	let()
	eventually(t, func() bool { st := r.layers.Status(); return st.Mounts == 2 && st.Data == 2 })
	r.in(chain[1], func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, part, whole)), describe(t, dir)); d != "" {
			t.Error("when complete:", d)
		}
	})
	for _, name := range []string{chain[1], chain[0]} {
		if err := r.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	b := make([]byte, len(want))
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != want {
		t.Error("a container whose image was removed:", err)
	}
	f.Close()
	if err := unix.Unmount(merged, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		return r.layers.Status().Layers.Layers == 0 && len(loopsBelow(t, layers)) == 0
	})
}

// TestLoopToFiles: what was mounted by loop devices is taken over by a daemon that mounts from files, and the other way round.
func TestLoopToFiles(t *testing.T) {
	img := lazytest.NewImage()
	l, want := layerOf(t, lazytest.EStargz, "a")
	img.Add(l)
	let := img.Hold()
	r := newEROFSBy(t, MountLoop, img)
	if support, err := erofs.Probe(filepath.Dir(r.root)); support != erofs.FileBacked {
		t.Skip(err)
	}
	layers := filepath.Dir(r.root)
	r.layer("a", "", l)
	at := mountsBelow(t, filepath.Join(r.root, "snapshots"))[0]
	for _, loop := range []bool{false, true, false} {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.erofs.Loop = loop
		r.open(nil)
		if n := len(loopsBelow(t, layers)); n != 2 {
			t.Errorf("%d loop devices, want 2", n)
		}
	}
	if b, err := os.ReadFile(filepath.Join(at, "a")); err != nil || string(b) != want {
		t.Error(err)
	}
	let()
	eventually(t, func() bool { return r.layers.Status().Data == 1 && len(loopsBelow(t, layers)) == 0 })
	if b, err := os.ReadFile(filepath.Join(at, "a")); err != nil || string(b) != want {
		t.Error("from files:", err)
	}
}

// TestChooseMount: each way can be forced, and is what is used or the reason why there is no start; without force there
// is always one.
func TestChooseMount(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	support, why := erofs.Probe(dir)
	loop := erofs.ProbeLoop(dir)
	socket := filepath.Join(dir, "keeper.sock")
	far := filepath.Join(dir, strings.Repeat("a", maxSocket))
	for _, c := range []struct {
		want, self, socket string
		way                string // "": none
	}{
		{MountFUSE, self(t), socket, MountFUSE},
		{MountAuto, "", socket, MountFUSE},
		{MountAuto, self(t), far, MountFUSE},
		{MountEROFS, "", socket, ""},
		{MountLoop, self(t), far, ""},
		{MountEROFS, self(t), socket, map[bool]string{true: MountEROFS}[support == erofs.FileBacked]},
		{MountLoop, self(t), socket, map[bool]string{true: MountLoop}[loop == nil]},
		{MountAuto, self(t), socket, map[erofs.Support]string{erofs.FileBacked: MountEROFS, erofs.Loop: MountLoop, erofs.None: MountFUSE}[support]},
	} {
		got, err := chooseMount(c.want, filepath.Join(dir, "layers"), c.self, c.socket)
		switch {
		case got.way != c.way:
			t.Errorf("%s with helper %q and a socket of %d bytes: got %q (%v), want %q", c.want, c.self, len(c.socket), got.way, err, c.way)
		case c.way == "" && (err == nil || !strings.Contains(err.Error(), `"`+c.want+`"`)):
			t.Errorf("%s: the error is %v", c.want, err)
		case c.way != "" && (err != nil || got.why == ""):
			t.Errorf("%s: by %s, because %q, %v", c.want, got.way, got.why, err)
		}
	}
	t.Log(support, why, loop)
}
