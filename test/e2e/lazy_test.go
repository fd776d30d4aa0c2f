package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// demo is Debian with Python, over 100 MB, whose command prints what begins with demoGreeting.
// Making it takes minutes the first time, which no world lasts.
func demo(t *testing.T, f image.Format) *image.Image {
	t.Helper()
	needsNodes(t)
	img, err := image.Demo(t.Context(), rig.ImageDir(), f)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

const demoGreeting = "hello from python 3"

// TestLazy: with layers that have a table of contents, or an index that somebody published, a container prints while less than
// half of its image is on the node. Completed later, the image can be exported, and little of it was fetched twice.
func TestLazy(t *testing.T) {
	for _, f := range []image.Format{image.EStargz, image.ZstdChunked, image.Gzip} {
		t.Run(f.String(), func(t *testing.T) {
			img := demo(t, f)
			w := newWorld(t, 1, private)
			ref := w.push(img, "demo", f.String())
			n := w.network.Node(1)
			d := w.daemon(n, daemonOptions{})
			if f == image.Gzip {
				d.needsEROFS()
				w.publishIndex(ref)
			}
			c := w.containerd(n, d)
			r := containerdRuntime(w.user(n).uses(d), c, "quay")
			r.login()

			s := r.pull(append(r.to, "--lazy", "keep", ref)...)
			atPull := w.served()
			out := r.print(ref)
			atOutput := w.served()
			t.Logf("of %d bytes the registry had served %.0f %% when the pull returned, %.0f %% when the container had printed",
				img.Size(), 100*float64(atPull)/float64(img.Size()), 100*float64(atOutput)/float64(img.Size()))
			if !strings.HasPrefix(out, demoGreeting) {
				t.Errorf("the container printed %q", out)
			}
			if s.Lazy == 0 || atPull > img.Size()/2 || atOutput > img.Size()/2 {
				t.Errorf("%d of %d layers lazy; the registry had served %d bytes when the pull returned, %d when the container had printed, of %d",
					s.Lazy, s.Layers, atPull, atOutput, img.Size())
			}

			r.pull(append(r.to, ref)...)
			archive := filepath.Join(w.dir("archives"), "image.tar")
			if _, err := c.Ctr(w.ctx, "apps", "images", "export", archive, ref); err != nil {
				t.Error(err)
			}
			if fi, err := os.Stat(archive); err != nil || fi.Size() < img.Size() {
				t.Errorf("the exported image is %v, %v", fi, err)
			}
			w.sameBlobs(d.store, img)
			t.Logf("in all it served %.2f times the image", float64(w.served())/float64(img.Size()))
			// What a container waits for is not waited for until a bulk request that covers it too gets there: some comes twice.
			if most := img.Size() + img.Size()/4; w.served() > most {
				t.Errorf("the registry served %d bytes of an image of %d", w.served(), img.Size())
			}
			if f == image.Gzip {
				w.until("an index that knows what the container read first", func() bool {
					o := r.user.quay("index", "--socket", d.socket, "--output", w.dir("indexes"), "--format", "{{.Note}}", ref)
					return o.code == 0 && strings.Contains(o.stdout, "read first")
				})
			}
		})
	}
}

// publishIndex is the last step of a build, on the registry's own machine: `docker quay index`.
func (w *world) publishIndex(ref string) {
	w.Helper()
	u := w.user(w.network.Registry())
	u.login()
	if o := u.quay("index", "--no-daemon", ref); o.code != 0 {
		w.Fatalf("the indexes are not published: %s", o)
	}
	w.registry.ResetStats()
}

// TestMirror: containerd pulls a plain image by itself, with the hosts.toml that is shipped. It has neither a login for the
// registry nor its certificate: what it gets comes through the daemon, which has both, and is in its store.
func TestMirror(t *testing.T) {
	w := newWorld(t, 1, private)
	img := w.small()
	ref := w.push(img, "team/app", "1")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{})
	c := w.containerd(n, d)
	if err := c.Pull(w.ctx, "apps", "quay", ref); err == nil {
		t.Fatal("containerd reached the registry by itself: this test would prove nothing")
	}
	shipped, err := os.ReadFile(filepath.Join(rig.Root(), "install", "containerd", "hosts.toml"))
	w.must(err)
	w.must(os.MkdirAll(filepath.Join(c.CertsDir(), "_default"), 0o755))
	w.must(os.WriteFile(filepath.Join(c.CertsDir(), "_default", "hosts.toml"), shipped, 0o644))

	if err := c.Pull(w.ctx, "apps", "quay", ref); err == nil {
		t.Error("containerd got a private image while the node has no login for it")
	}
	w.untouched(d.store)
	d.login()
	if err := c.Pull(w.ctx, "apps", "quay", ref); err != nil {
		t.Fatal(err)
	}
	r := containerdRuntime(w.user(n), c, "quay")
	if got := r.identity(ref); got != img.Manifest.Digest.String() {
		t.Errorf("the image is %s, want %s", got, img.Manifest.Digest)
	}
	if got := r.print(ref); got != greeting {
		t.Errorf("the container printed %q", got)
	}
	w.sameBlobs(d.store, img)
	if w.served() > img.Size() {
		t.Errorf("the registry served %d bytes of an image of %d", w.served(), img.Size())
	}

	// And once more with the registry away.
	w.must(w.registry.Stop())
	r.remove(ref)
	if err := c.Pull(w.ctx, "apps", "quay", ref); err != nil {
		t.Fatal(err)
	}
	if got := r.print(ref); got != greeting {
		t.Errorf("from the cache the container printed %q", got)
	}
}
