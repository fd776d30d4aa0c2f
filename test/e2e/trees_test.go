package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	ctrsnapshots "github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs/treetest"
	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// treesEnv has TestEqualTrees and TestSmallIndex also take the program images of the benchmarks, which take minutes to make and minutes
// to read.
const treesEnv = "QUAY_TEST_TREES"

// TestEqualTrees: what a container sees is what containerd's own overlayfs shows of the same image, in each way to mount and for
// each kind of layer, before a layer is complete and after.
func TestEqualTrees(t *testing.T) {
	for _, f := range image.Formats {
		t.Run("nasty, "+f.String(), func(t *testing.T) {
			needsNodes(t)
			img, err := image.Nasty(t.Context(), rig.ImageDir(), f)
			if err != nil {
				t.Fatal(err)
			}
			equalTrees(t, img, f)
		})
	}
	for _, f := range []image.Format{image.Gzip, image.EStargz} {
		t.Run("demo, "+f.String(), func(t *testing.T) { equalTrees(t, demo(t, f), f) })
	}
	if os.Getenv(treesEnv) == "" {
		return
	}
	for _, app := range image.Apps() {
		for _, f := range []image.Format{image.Gzip, image.EStargz} {
			t.Run(app.Name+", "+f.String(), func(t *testing.T) {
				needsNodes(t)
				img, err := app.Make(t.Context(), rig.ImageDir(), f)
				if err != nil {
					t.Fatal(err)
				}
				equalTrees(t, img, f)
			})
		}
	}
}

// TestSmallIndex: the index of a layer that is worth being lazy has at most a hundredth of its bytes.
func TestSmallIndex(t *testing.T) {
	const (
		most  = 100     // a hundredth
		worth = 1 << 20 // a smaller layer is there as soon as its index
	)
	check := func(name string, img *image.Image) {
		for _, desc := range img.Layers {
			if desc.Size < worth {
				continue
			}
			blob, err := os.Open(img.Path(desc.Digest))
			if err != nil {
				t.Fatal(err)
			}
			defer blob.Close()
			x, err := index.Build(t.Context(), blob, desc, nil, index.Options{})
			if err != nil {
				t.Fatal(err)
			}
			var encoded bytes.Buffer
			if err := index.Encode(&encoded, x); err != nil {
				t.Fatal(err)
			}
			n := int64(encoded.Len())
			t.Logf("%s: %.2f %% of %d bytes, %d files", name, 100*float64(n)/float64(desc.Size), desc.Size, len(x.Entries))
			if n > desc.Size/most {
				t.Errorf("%s: the index of a layer of %d bytes with %d files has %d", name, desc.Size, len(x.Entries), n)
			}
		}
	}
	check("demo", demo(t, image.Gzip))
	if os.Getenv(treesEnv) == "" {
		return
	}
	for _, app := range image.Apps() {
		img, err := app.Make(t.Context(), rig.ImageDir(), image.Gzip)
		if err != nil {
			t.Fatal(err)
		}
		check(app.Name, img)
	}
}

// equalTrees compares one image. One of a plain format is unpacked by one daemon and lazy on another, by its published index; one with
// tables of contents is lazy on both, by EROFS and by a FUSE tree.
func equalTrees(t *testing.T, img *image.Image, f image.Format) {
	w := newWorldFor(t, 2, rig.RegistryOptions{}, 2*testTimeout)
	for i := range 2 {
		w.must(w.network.Node(i + 1).SetRate(10000 * rig.Mbit))
	}
	w.must(w.network.Registry().SetRate(10000 * rig.Mbit))
	ref := w.push(img, "trees", f.String())
	first, d := w.treeNode(1, "erofs")
	w.must(first.Pull(w.ctx, "plain", "overlayfs", ref))
	reference := w.treeOf(first, "plain", "overlayfs")

	if f == image.EStargz || f == image.ZstdChunked {
		w.lazyTrees(reference, first, d, ref, f)
		d.allServed(img, "lazy")
		second, d := w.treeNode(2, "fuse")
		w.must(second.Pull(w.ctx, "apps", "quay", ref))
		if log := d.process.Log(); !strings.Contains(log, "served=lazy") {
			w.Errorf("no layer is lazy: %s", log)
		}
		reference.equals(w, w.treeOf(second, "apps", "quay"), "fuse", f)
		return
	}
	w.must(first.Pull(w.ctx, "apps", "quay", ref))
	d.allServed(img, "eager")
	reference.equals(w, w.treeOf(first, "apps", "quay"), "erofs, unpacked", f)
	w.publishIndex(ref)
	second, d := w.treeNode(2, "erofs")
	w.lazyTrees(reference, second, d, ref, f)
	d.allServed(img, "lazy")
}

// treeNode starts a node that mounts layers this way.
func (w *world) treeNode(i int, mount string) (*rig.Containerd, *daemon) {
	w.Helper()
	n := w.network.Node(i)
	d := w.daemon(n, daemonOptions{config: fmt.Sprintf("[lazy]\nmount = %q\n", mount)})
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	return c, d
}

// lazyTrees compares what a node shows of an image of which it has nothing, and again when it has all of it.
func (w *world) lazyTrees(reference *tree, c *rig.Containerd, d *daemon, ref string, f image.Format) {
	w.Helper()
	w.must(c.Pull(w.ctx, "apps", "quay", ref))
	reference.equals(w, w.treeOf(c, "apps", "quay"), "erofs, lazy", f)
	if st := d.layers(); st.Reads == 0 {
		w.Errorf("the tree was read without the daemon: %+v", st)
	}
	w.until("complete layers", func() bool { st := d.layers(); return st.Direct == st.Mounts })
	reference.equals(w, w.treeOf(c, "apps", "quay"), "erofs, complete", f)
}

// allServed checks how the daemon serves the layers of an image.
func (d *daemon) allServed(img *image.Image, way string) {
	d.w.Helper()
	if log := d.process.Log(); strings.Count(log, "served="+way) != len(img.Layers) {
		d.w.Errorf("not all of %d layers are %s: %s", len(img.Layers), way, log)
	}
}

// tree is the root of an image as a runtime shows it.
type tree struct {
	nodes []treetest.Node
	begun time.Time // before it was unpacked, if it was
}

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
	return &tree{nodes, w.begun}
}

// equals reports what differs. Left out are the files that lazy formats add to a layer's root, which only an unpacked layer shows,
// the parts of a second, which tables of contents do not have, and the times of directories that a layer leaves out, which are those
// of unpacking.
func (a *tree) equals(w *world, b *tree, way string, f image.Format) {
	w.Helper()
	unpacked := map[string]bool{}
	for _, n := range a.nodes {
		unpacked[n.Path] = n.Path == "" || n.Mode&unix.S_IFMT == unix.S_IFDIR && n.Mtime.After(a.begun)
	}
	clean := func(t *tree) (out []treetest.Node) {
		for _, n := range t.nodes {
			switch n.Path {
			case "stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark":
				continue
			}
			if unpacked[n.Path] {
				n.Mtime = time.Time{}
			}
			if f == image.EStargz || f == image.ZstdChunked {
				n.Mtime = n.Mtime.Round(time.Second)
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
