package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestWays: in each way to mount that can be forced on a node, and this kernel has, an image is pulled before it is there, shows
// the files that it should, runs, runs after the daemon was killed, becomes complete, and leaves nothing behind when it
// is removed; docker quay status tells of each step.
func TestWays(t *testing.T) {
	for _, way := range []string{"erofs", "loop", "fuse"} {
		t.Run(way, func(t *testing.T) {
			needsNodes(t)
			dir := t.TempDir()
			var cannot error
			switch way {
			case "erofs":
				_, cannot = erofs.Probe(dir)
			case "loop":
				cannot = erofs.ProbeLoop(dir)
			}
			if cannot != nil {
				t.Skip(cannot)
			}
			w := newWorld(t, 1, rig.RegistryOptions{})
			img, err := image.Busybox(w.ctx, rig.ImageDir(), image.EStargz)
			w.must(err)
			ref := w.push(img, "team/app", "ways")
			n := w.network.Node(1)
			d := w.daemon(n, daemonOptions{config: "[lazy]\nmount = \"" + way + "\"\nquiet = \"2s\"\n"})
			if st := d.layers(); st.Mount != way || st.Why == "" {
				t.Errorf("layers are mounted by %s: %s", st.Mount, st.Why)
			}
			c := w.containerd(n, d)
			w.must(w.registry.WriteHosts(c.CertsDir()))
			w.must(c.Pull(w.ctx, "plain", "overlayfs", ref))
			reference := w.treeOf(c, "plain", "overlayfs")
			w.must(c.Pull(w.ctx, "apps", "quay", ref))
			u := w.user(n).uses(d)
			r := containerdRuntime(u, c, "quay")

			seen := d.layerStates(u)
			if len(seen) != len(img.Layers) || seen[0] != "lazy" {
				t.Errorf("of %d layers, after the pull, the status says %q", len(img.Layers), seen)
			}
			if n := len(loopDevices(w, d.root)); (n > 0) != (way == "loop") {
				t.Errorf("%d loop devices", n)
			}
			reference.equals(w, w.treeOf(c, "apps", "quay"), way, image.EStargz)
			if got := r.print(ref); got != greeting {
				t.Errorf("the container printed %q", got)
			}
			w.must(d.process.Kill9())
			d.start()
			w.until("the mounts of the last run", func() bool { st := d.status().Layers; return st != nil && st.Mounts == len(img.Layers) })
			// containerd waits a moment before it dials a snapshotter again that it missed.
			w.until("containerd's connection with the daemon", func() bool {
				_, err := c.Ctr(w.ctx, "apps", "snapshots", "--snapshotter", "quay", "ls")
				return err == nil
			})
			if got := r.print(ref); got != greeting {
				t.Errorf("after a kill the container printed %q", got)
			}
			if way != "fuse" { // which never lets go of a layer
				w.until("complete layers", func() bool { st := d.layers(); return st.Direct == len(img.Layers) })
				if seen := strings.Join(d.layerStates(u), " "); strings.Trim(seen, "complet ") != "" {
					t.Errorf("of complete layers the status says %q", seen)
				}
				reference.equals(w, w.treeOf(c, "apps", "quay"), way+", complete", image.EStargz)
			}
			r.remove(ref)
			w.must(c.CleanUnused(w.ctx, "apps"))
			w.until("an empty node", func() bool {
				st := d.layers()
				return st.Mounts == 0 && st.Stored == 0 && len(loopDevices(w, d.root)) == 0
			})
			if seen := d.layerStates(u); len(seen) != 0 {
				t.Errorf("when all is removed the status says %q", seen)
			}
			w.must(d.process.Stop())
			if n := len(loopDevices(w, d.root)); n != 0 {
				t.Errorf("%d loop devices are left", n)
			}
			if o := u.quay("status", "--socket", d.socket); o.code != 5 || !strings.Contains(o.stderr, "no node daemon answers at "+d.socket) {
				t.Errorf("without a daemon: %s", o)
			}
		})
	}
}

// layerStates are the states of a node's layers, as docker quay status tells scripts.
func (d *daemon) layerStates(u *user) []string {
	u.w.Helper()
	o := u.quay("status", "--socket", d.socket, "--format", "{{range .Layers.List}}{{.State}} {{end}}")
	if o.code != 0 {
		u.w.Fatal(o)
	}
	return strings.Fields(o.stdout)
}

// loopDevices are the files below a folder that are behind loop devices.
func loopDevices(w *world, dir string) (found []string) {
	w.Helper()
	all, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	w.must(err)
	for _, f := range all {
		// A device that goes away meanwhile is none.
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), dir+"/") {
			found = append(found, string(b))
		}
	}
	return found
}
