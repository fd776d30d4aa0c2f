package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	ctrsnapshots "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/snapshotter/erofs/treetest"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
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

// TestEqualTrees: what a container sees is what containerd's own overlayfs shows of the same image, in each way to mount and
// for each kind of layer, before a layer is complete and after.
func TestEqualTrees(t *testing.T) {
	for _, c := range []struct {
		format image.Format
		demo   bool // of 17,000 files; else a small one
		ways   []string
	}{
		{image.Gzip, true, []string{"erofs"}},
		{image.EStargz, true, []string{"erofs"}},
		{image.EStargz, false, []string{"erofs", "fuse"}},
		{image.ZstdChunked, false, []string{"erofs", "fuse"}},
	} {
		f := c.format
		t.Run(fmt.Sprintf("%s, demo %v", f, c.demo), func(t *testing.T) {
			var img *image.Image
			if c.demo {
				img = demo(t, f) // before the world's clock runs
			}
			w := newWorldFor(t, 2, rig.RegistryOptions{}, 2*testTimeout)
			if img == nil {
				var err error
				img, err = image.Busybox(w.ctx, rig.ImageDir(), f)
				w.must(err)
			}
			for i := range 2 {
				w.must(w.network.Node(i + 1).SetRate(10000 * rig.Mbit))
			}
			w.must(w.network.Registry().SetRate(10000 * rig.Mbit))
			ref := w.push(img, "demo", f.String())
			var reference *tree
			for i, way := range c.ways {
				n := w.network.Node(i + 1)
				d := w.daemon(n, daemonOptions{config: "[lazy]\nmount = \"" + way + "\"\n"})
				if got := d.layers(); got.Mount != way {
					t.Fatalf("the daemon mounts by %s: %s", got.Mount, got.Why)
				}
				c := w.containerd(n, d)
				w.must(w.registry.WriteHosts(c.CertsDir()))
				if reference == nil {
					w.must(c.Pull(w.ctx, "plain", "overlayfs", ref))
					reference = w.treeOf(c, "plain", "overlayfs")
				}
				w.must(c.Pull(w.ctx, "apps", "quay", ref))
				shown := w.treeOf(c, "apps", "quay")
				reference.equals(w, shown, way, f)
				if way == "erofs" {
					w.until("complete layers", func() bool { st := d.layers(); return st.Direct == st.Mounts })
					reference.equals(w, w.treeOf(c, "apps", "quay"), way+", complete", f)
				}
			}
		})
	}
}

// tree is the root of an image as a runtime shows it.
type tree struct{ nodes []treetest.Node }

// treeOf reads the only image of a namespace through a read-only snapshot.
func (w *world) treeOf(c *rig.Containerd, namespace, snapshotter string) *tree {
	w.Helper()
	client, err := c.Client(namespace)
	w.must(err)
	defer client.Close()
	ctx := namespaces.WithNamespace(w.ctx, namespace)
	images, err := client.ListImages(ctx)
	w.must(err)
	if len(images) != 1 {
		w.Fatalf("%d images in %s", len(images), namespace)
	}
	diffs, err := images[0].RootFS(ctx)
	w.must(err)
	sn := client.SnapshotService(snapshotter)
	// The top of the chain is what nothing is on.
	var top string
	parents := map[string]bool{}
	var names []string
	w.must(sn.Walk(ctx, func(_ context.Context, i ctrsnapshots.Info) error {
		parents[i.Parent] = true
		names = append(names, i.Name)
		return nil
	}))
	for _, name := range names {
		if !parents[name] {
			top = name
		}
	}
	if len(names) != len(diffs) {
		w.Fatalf("%d snapshots of %d layers", len(names), len(diffs))
	}
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	mounts, err := sn.View(ctx, key, top)
	w.must(err)
	defer sn.Remove(ctx, key)
	at := w.dir(key)
	w.must(mount.All(mounts, at))
	defer mount.UnmountAll(at, unix.MNT_DETACH)
	nodes, err := treetest.Read(at, treetest.Options{DirLinks: true})
	w.must(err)
	return &tree{nodes}
}

// equals reports what differs. Left out are the files that lazy formats add to a layer's root, which only an unpacked layer shows,
// and the parts of a second, which tables of contents do not have.
func (a *tree) equals(w *world, b *tree, way string, f image.Format) {
	w.Helper()
	clean := func(t *tree) (out []treetest.Node) {
		for _, n := range t.nodes {
			switch n.Path {
			case "stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark":
				continue
			case "":
				n.Mtime = time.Time{} // the snapshot's folder's
			}
			if f != image.Gzip {
				n.Mtime = n.Mtime.Truncate(time.Second)
			}
			out = append(out, n)
		}
		return out
	}
	diff := treetest.Diff(clean(a), clean(b))
	for i, line := range diff {
		if i == 10 {
			w.Errorf("%s: and %d more", way, len(diff)-i)
			break
		}
		w.Errorf("%s: %s", way, line)
	}
	w.Logf("%s: %d names compared", way, len(b.nodes))
}
