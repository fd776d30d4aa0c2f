package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// disk gives the daemon of a node a file system of its own for all its folders, of so many bytes. It goes with the rig.
func (w *world) disk(n *rig.Node, kind string, size int64) (at string) {
	w.Helper()
	at = filepath.Join(w.dir("quay-"+n.Name), "root")
	w.must(os.MkdirAll(at, 0o755))
	if kind == "tmpfs" {
		w.must(unix.Mount("tmpfs", at, "tmpfs", 0, fmt.Sprintf("size=%d", size)))
		return at
	}
	file := filepath.Join(w.dir("disks"), n.Name)
	w.must(os.WriteFile(file, nil, 0o600))
	w.must(os.Truncate(file, size))
	mkfs, err := exec.LookPath("mkfs." + kind)
	if err != nil {
		w.Skipf("%s cannot be made here: %v", kind, err)
	}
	if out, err := exec.CommandContext(w.ctx, mkfs, "-q", file).CombinedOutput(); err != nil {
		w.Fatalf("%s: %v: %s", mkfs, err, out)
	}
	if out, err := exec.CommandContext(w.ctx, "mount", "-t", kind, "-o", "loop", file, at).CombinedOutput(); err != nil {
		w.Skipf("%s cannot be mounted here: %v: %s", kind, err, out)
	}
	return at
}

// fill takes the room of a file system but for so many bytes. What it returns gives it back.
func (w *world) fill(at string, leave int64) (free func()) {
	w.Helper()
	path := filepath.Join(at, "ballast")
	f, err := os.Create(path)
	w.must(err)
	defer f.Close()
	var st unix.Statfs_t
	w.must(unix.Statfs(at, &st))
	var off int64
	for n := int64(st.Bfree)*st.Bsize - leave; n >= 4096; {
		if leave > 0 && off+n > int64(st.Bfree)*st.Bsize-leave {
			break
		}
		// What a file needs beside its bytes is only known when it does not fit.
		switch err := unix.Fallocate(int(f.Fd()), 0, off, n&^4095); err {
		case nil:
			off += n &^ 4095
		case unix.ENOSPC:
			n /= 2
		case unix.EINTR:
		default:
			w.Fatal(err)
		}
	}
	return func() { w.Helper(); w.must(os.Remove(path)) }
}

// TestStoreOn: file systems that a node's folders may lie on, and how layers are mounted from there. A container reads what is in its
// image: before it is there, after a crash of the daemon, and when the registry is away.
func TestStoreOn(t *testing.T) {
	w := newWorld(t, 3, rig.RegistryOptions{})
	lazy, eager := w.stock(image.EStargz), w.small()
	refs := []string{w.push(lazy, "stock", "1"), w.push(eager, "app", "1")}
	for i, c := range []struct{ kind, want, way, why string }{
		{"xfs", "auto", "erofs", "files"},
		{"tmpfs", "auto", "loop", "file-backed EROFS does not work"},
		{"tmpfs", "fuse", "fuse", "lazy.mount says so"},
	} {
		t.Run(c.kind+" "+c.want, func(t *testing.T) {
			w, n := w.sub(t), w.network.Node(i+1)
			w.disk(n, c.kind, 400*mib) // xfs is not made smaller than 300 MiB
			d := w.daemon(n, daemonOptions{config: "[lazy]\nquiet = \"1s\"\nmount = \"" + c.want + "\"\n"})
			if st := d.layers(); st.Mount != c.way || !strings.Contains(st.Why, c.why) {
				t.Errorf("on %s layers are mounted by %s, because: %s", c.kind, st.Mount, st.Why)
			}
			ctr := w.containerd(n, d)
			w.must(w.registry.WriteHosts(ctr.CertsDir()))
			for _, ref := range refs {
				w.must(ctr.Pull(w.ctx, "apps", "quay", ref))
			}
			one := w.tenant(ctr, lazy, refs[0])
			one.reads("before it is there", one.names[:50]...)
			if c.way != "fuse" { // the FUSE trees of a dead daemon are errors
				w.must(d.process.Kill9())
				d.start()
			}
			one.reads("all")
			one.alive()
			if c.way != "fuse" {
				w.until("complete layers", func() bool { st := d.layers(); return st.Complete == st.Stored && st.Direct == st.Mounts })
			}
			if out, err := ctr.Run(w.ctx, "apps", "quay", refs[1], w.rig.ID()); err != nil || out != greeting {
				t.Errorf("a container printed %q: %v", out, err)
			}
			two := w.tenant(ctr, lazy, refs[0])
			two.reads("when it is there")
		})
	}
}

// TestDiskFull: no room on the node's disk. Reads of what is not there wait or are errors, what is there is read, a restart changes
// nothing, and the log says why; a pull is refused. With room again all goes on by itself.
func TestDiskFull(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	lazy, eager := w.stock(image.EStargz), w.stock(image.Gzip)
	lazyRef, eagerRef := w.push(lazy, "stock", "lazy"), w.push(eager, "stock", "plain")
	n := w.network.Node(1)
	at := w.disk(n, "ext4", 160*mib)
	d := w.daemon(n, daemonOptions{config: "[limits]\ndownload = \"4MiB\"\n[lazy]\nquiet = \"1s\"\n"})
	d.needsEROFS()
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", lazyRef))
	one := w.tenant(c, lazy, lazyRef)
	here := one.names[1]
	one.reads("with room", here)

	free := w.fill(at, 0)
	big := one.later(bigFile, 0, stockBig)
	w.until("a line that tells that the disk is full", func() bool { return d.logs("no space left") })
	one.reads("with a full disk", here)
	one.alive()
	if err := c.Pull(w.ctx, "apps", "quay", eagerRef); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("a pull with a full disk: %v", err)
	}
	w.must(d.process.Kill9())
	d.start()
	if st := d.layers(); st.Mount != "erofs" {
		t.Fatalf("after a restart with a full disk layers are mounted by %s, because: %s", st.Mount, st.Why)
	}
	one.reads("after a restart with a full disk", here)
	free()
	if err := one.await("a read that began with a full disk", big); err != nil {
		t.Log("a read that began with a full disk:", err)
	}
	one.reads("with room again")
	one.alive()
	w.until("complete layers", func() bool { st := d.layers(); return st.Stored > 0 && st.Complete == st.Stored })

	// A layer that is unpacked while the disk gets full leaves nothing behind.
	free = w.fill(at, 12*mib)
	if err := c.Pull(w.ctx, "apps", "quay", eagerRef); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("a pull of more than there is room for: %v", err)
	}
	if left := diskUsage(filepath.Join(d.root, "layers", "new")); left > 0 {
		t.Errorf("%d bytes are left of a layer that could not be unpacked", left)
	}
	free()
	w.must(c.Pull(w.ctx, "apps", "quay", eagerRef))
	two := w.tenant(c, eager, eagerRef)
	two.reads("a layer that was unpacked at the second try")
	one.reads("after all that")
	one.alive()
}

// TestQuotaReached: layers in use take more than lazy.quota. Their containers read on, nothing else is kept, and once they are gone the
// quota holds again.
func TestQuotaReached(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	lazy, eager, small := w.stock(image.EStargz), w.stock(image.Gzip), w.small()
	lazyRef, eagerRef, smallRef := w.push(lazy, "stock", "lazy"), w.push(eager, "stock", "plain"), w.push(small, "app", "1")
	n := w.network.Node(1)
	const quota = 12 * mib
	d := w.daemon(n, daemonOptions{config: "[lazy]\nquota = \"12MiB\"\nquiet = \"1s\"\n"})
	d.needsEROFS()
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", lazyRef))
	one := w.tenant(c, lazy, lazyRef)
	w.until("the background's end", func() bool { return d.logs("A layer is not completed until there is room for it") })
	if st := d.layers(); st.Bytes > quota {
		t.Errorf("the background fetched beyond the quota of %d: %+v", quota, st)
	}
	one.reads("beyond the quota")
	if !d.logs("beyond the quota") {
		t.Error("the log does not say that the quota is passed")
	}
	one.alive()

	// What nobody reads yet is not for the layer store: containerd unpacks it.
	w.must(c.Pull(w.ctx, "apps", "quay", eagerRef))
	two := w.tenant(c, eager, eagerRef)
	two.reads("unpacked by containerd")
	one.reads("with another image")

	for _, t := range []*tenant{one, two} {
		t.end()
	}
	for _, ref := range []string{lazyRef, eagerRef} {
		_, err := c.Ctr(w.ctx, "apps", "images", "rm", "--sync", ref)
		w.must(err)
	}
	w.until("the room of layers that are gone", func() bool { return d.layers().Bytes < quota/2 })
	w.must(c.Pull(w.ctx, "apps", "quay", smallRef))
	if out, err := c.Run(w.ctx, "apps", "quay", smallRef, w.rig.ID()); err != nil || out != greeting {
		t.Errorf("a container printed %q: %v", out, err)
	}
	if st := d.layers(); st.Stored != len(small.Layers) {
		t.Errorf("with room again: %+v", st)
	}
}

// TestStoreQuotaReached: the blobs of layers in use take more than store.quota. Their containers read on.
func TestStoreQuotaReached(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	n := w.network.Node(1)
	images := []*image.Image{w.stock(image.EStargz), w.stock(image.ZstdChunked)} // each fits, both do not
	d := w.daemon(n, daemonOptions{config: "[lazy]\nquiet = \"1h\"\n[store]\nquota = \"20MiB\"\n"})
	d.needsEROFS()
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	var tenants []*tenant
	for i, img := range images {
		ref := w.push(img, "stock", fmt.Sprint(i))
		w.must(c.Pull(w.ctx, "apps", "quay", ref))
		tenants = append(tenants, w.tenant(c, img, ref))
	}
	for _, one := range tenants {
		one.reads("with more in use than the quota")
		one.alive()
	}
	if !d.logs("what containers read takes more than the quota") {
		t.Error("the log does not say that the quota is passed")
	}
}
