package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/fetcher/api"
)

// layers is how the daemon mounts layers, and how that is going.
func (d *daemon) layers() api.Layers {
	d.w.Helper()
	st := d.status()
	if st.Layers == nil {
		d.w.Fatal("the daemon does not say how it mounts layers")
	}
	return *st.Layers
}

// diskUsage is what the files below a folder take.
func diskUsage(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && unix.Lstat(path, &st) == nil && !e.IsDir() {
			n += st.Blocks * 512
		}
		return nil
	})
	return n
}

// TestEager: a plain image that nobody has an index of is fetched and unpacked by the daemon, once, and mounted past it. With
// the registry away and after kill -9 it is all there; when it is removed its space comes free.
func TestEager(t *testing.T) {
	w := newWorld(t, 1, private)
	img := w.small()
	ref := w.push(img, "team/app", "plain")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{})
	d.needsEROFS()
	d.login()
	c := w.containerd(n, d)
	r := containerdRuntime(w.user(n).uses(d), c, "quay")
	r.login()
	r.pull(append(r.to, "--lazy", "keep", ref)...)
	if got := r.print(ref); got != greeting {
		t.Errorf("the container printed %q", got)
	}
	if w.served() > img.Size() {
		t.Errorf("the registry served %d bytes of an image of %d", w.served(), img.Size())
	}
	log := d.process.Log()
	if n := strings.Count(log, "served=eager"); n != len(img.Layers) {
		t.Errorf("%d of %d layers were unpacked by the daemon: %s", n, len(img.Layers), log)
	}
	if st := d.layers(); st.Mounts != len(img.Layers) || st.Direct != st.Mounts || st.Complete != st.Mounts {
		t.Errorf("after the pull: %+v", st)
	}

	w.must(w.registry.Stop())
	w.must(d.process.Kill9())
	d.start()
	w.until("the mounts of the last run", func() bool { return d.layers().Mounts == len(img.Layers) })
	if got := r.print(ref); got != greeting {
		t.Errorf("after a restart the container printed %q", got)
	}
	if before := diskUsage(filepath.Join(d.root, "layers", "layers")); before == 0 {
		t.Error("the layers take no space")
	}
	r.remove(ref)
	w.must(c.CleanUnused(w.ctx, "apps"))
	w.until("the space of a removed image", func() bool { return diskUsage(filepath.Join(d.root, "layers")) < 64<<10 })
	if st := d.layers(); st.Mounts != 0 || st.Stored != 0 {
		t.Errorf("after the image was removed: %+v", st)
	}
}
