package e2e

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/docker-quay/docker-quay/test/image"
)

const (
	// crashRate, in bytes a second, makes of crashSize a pull of 4 s: time to kill it in the middle.
	crashRate = "16MiB"
	crashSize = 64 * mib
	// lostMost is what a crash may cost for each layer under way: one window, of bytes that were served and not yet on disk
	// (most of it in the sockets' buffers of a registry that is read slowly).
	lostMost = 16 * mib
)

// halfway waits until the registry has served about half of an image.
func (w *world) halfway(img *image.Image) {
	w.Helper()
	w.until("half of the image", func() bool { return w.served() > img.Size()*2/5 })
	if w.served() > img.Size()*4/5 {
		w.Fatalf("%d of %d bytes were served before anything could be killed", w.served(), img.Size())
	}
}

// refetched checks what the registry served in all for an image that came in two attempts, and that it is here and right.
func (w *world) refetched(store string, img *image.Image, s summary) {
	w.Helper()
	w.Logf("the registry served %.1f MiB of an image of %.1f MiB in both attempts; the second found %.1f MiB on disk",
		float64(w.served())/mib, float64(img.Size())/mib, float64(s.FromCache)/mib)
	if w.served() > img.Size()+int64(len(img.Layers))*lostMost {
		w.Errorf("the registry served %d bytes, more than the image and one window for each layer", w.served())
	}
	// Nothing that is on disk is fetched again, to the byte.
	if whole := img.Size() - img.Manifest.Size; s.FromCache+s.FromOrigin != whole {
		w.Errorf("%d bytes from disk and %d from the registry make a pull of %d", s.FromCache, s.FromOrigin, whole)
	}
	if s.FromCache == 0 {
		w.Error("the second pull found nothing on disk")
	}
	if s.Digest != img.Manifest.Digest {
		w.Errorf("the second pull says it has %s, want %s", s.Digest, img.Manifest.Digest)
	}
	w.sameBlobs(store, img)
}

// TestKillPlugin: kill -9 of docker-quay in the middle of a pull into containerd.
func TestKillPlugin(t *testing.T) {
	w := newWorld(t, 1, private)
	img := w.random(crashSize, 1)
	ref := w.push(img, "random", "1")
	n := w.network.Node(1)
	c := w.containerd(n, nil)
	r := containerdRuntime(w.user(n), c, "overlayfs")
	r.login()
	p := r.start("pull", append(r.to, "--download-rate", crashRate, ref)...)
	w.halfway(img)
	w.must(p.Kill9())
	s := r.pull(append(r.to, ref)...)
	w.refetched(r.store, img, s)
	if got := r.identity(ref); got != img.Manifest.Digest.String() {
		t.Errorf("containerd has %s, want %s", got, img.Manifest.Digest)
	}
}

// TestKillDaemon: kill -9 of the node daemon in the middle of a pull into containerd by its snapshotter. The pull fails and
// says so; the next one, with the daemon up again, goes on.
func TestKillDaemon(t *testing.T) {
	w := newWorld(t, 1, private)
	img := w.random(crashSize, 2)
	ref := w.push(img, "random", "2")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{config: "[limits]\ndownload = \"" + crashRate + "\"\n"})
	c := w.containerd(n, d)
	r := containerdRuntime(w.user(n).uses(d), c, "quay")
	r.login()
	p := r.start("pull", append(r.to, "--progress", "plain", ref)...)
	w.halfway(img)
	w.must(d.process.Kill9())
	if code := w.code(p); code == 0 || strings.Contains(p.Log(), "panic") {
		t.Errorf("the pull whose daemon was killed ended with %d: %s", code, p.Log())
	}
	d.start()
	s := r.pull(append(r.to, ref)...)
	w.refetched(d.store, img, s)
	if got := r.identity(ref); got != img.Manifest.Digest.String() {
		t.Errorf("containerd has %s, want %s", got, img.Manifest.Digest)
	}
}

// TestInterrupt: Ctrl-C ends a pull with 130 and a word about what is kept; the same command goes on from there. As a plugin
// docker-quay learns of it from the docker CLI.
func TestInterrupt(t *testing.T) {
	for name, plugin := range map[string]bool{"alone": false, "as a plugin": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, private)
			img := w.random(crashSize, 1)
			ref := w.push(img, "random", "1")
			u := w.user(w.network.Node(1))
			if plugin {
				u.installs(filepath.Join(u.home, ".docker"))
			}
			u.login()
			p := u.start("pull", "--to", "store", "--download-rate", crashRate, ref)
			w.halfway(img)
			w.must(p.Signal(syscall.SIGINT))
			if code := w.code(p); code != 130 || !strings.Contains(p.Log(), "interrupted: what was fetched is kept") {
				t.Errorf("an interrupted pull ended with %d: %s", code, p.Log())
			}
			w.refetched(u.store, img, u.pull("--to", "store", ref))
		})
	}
}
