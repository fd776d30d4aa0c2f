package e2e

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// runtime is a place on a node that images go to and where containers run, with the user who pulls into it.
type runtime struct {
	*user
	to []string // flags of pull
	// identity is the digest by which the runtime knows the image with that name.
	identity func(ref string) string
	// remove takes the image and all that it brought out of the runtime.
	remove func(ref string)
	// images lists what is there, "" for nothing.
	images func() string
	// print runs the image's command and returns what it prints.
	print func(ref string) string
}

// round is what must hold wherever images go. The registry is private, and the second node cannot reach its blobs.
func round(w *world, img *image.Image, want string, known digest.Digest, build func(*rig.Node, ...*rig.Node) runtime) {
	n1, n2 := w.network.Node(1), w.network.Node(2)
	ref := w.push(img, "team/app", "1")
	first := build(n1)

	// Without credentials: a clear error, and nothing of the image anywhere.
	o := first.quay("pull", append(first.to, ref)...)
	if o.code != 4 || !strings.Contains(o.stderr, ref) || !strings.Contains(o.stderr, "docker login "+w.registry.Addr()) {
		w.Errorf("a private image without credentials, want exit 4 and what to do: %s", o)
	}
	w.untouched(first.store)
	if got := first.images(); got != "" {
		w.Errorf("after a refused pull there is %q", got)
	}
	if w.served() != 0 {
		w.Errorf("the registry served %d bytes of blobs to nobody", w.served())
	}

	// With credentials: there, under its name, with the digest that everybody knows, and it runs.
	first.login()
	check := func(r runtime, what string) {
		w.Helper()
		if got := r.identity(ref); got != known.String() {
			w.Errorf("%s: %s is %s, want %s", what, ref, got, known)
		}
		if got := r.print(ref); got != want {
			w.Errorf("%s: the container printed %q, want %q", what, got, want)
		}
	}
	s := first.pull(append(first.to, ref)...)
	check(first, "after the pull")
	if s.Digest != img.Manifest.Digest || s.FromOrigin == 0 {
		w.Errorf("the pull says %+v, want %s from the registry", s, img.Manifest.Digest)
	}
	w.sameBlobs(first.store, img)
	if most := img.Size() + img.Size()/10; w.served() > most {
		w.Errorf("the registry served %d bytes of an image of %d", w.served(), img.Size())
	}
	if s := first.pull(append(first.to, ref)...); !s.UpToDate {
		w.Errorf("the same pull again finds nothing up to date: %+v", s)
	}

	// With the registry away: from the cache.
	w.must(w.registry.Stop())
	first.remove(ref)
	if got := first.images(); got != "" {
		w.Errorf("after the image was removed there is %q", got)
	}
	s = first.pull(append(first.to, ref)...)
	if s.FromOrigin != 0 || s.FromPeers != 0 || s.FromCache == 0 {
		w.Errorf("with the registry stopped the pull says %+v", s)
	}
	check(first, "from the cache")
	w.must(w.registry.Start(w.ctx))

	// To a node that reaches the registry's manifests but none of its blobs.
	w.registry.ResetStats()
	w.denyBlobs(n2)
	first.seed(ref)
	second := build(n2, n1)
	second.login()
	s = second.pull(append(second.to, "--skip-web-seed", ref)...)
	check(second, "from the peer")
	if s.FromOrigin != 0 || s.FromPeers == 0 {
		w.Errorf("with --skip-web-seed the pull says %+v", s)
	}
	if w.served() != 0 {
		w.Errorf("the registry served %d bytes of blobs: %v", w.served(), w.registry.Stats().BlobsTo)
	}
	w.sameBlobs(second.store, img)
	w.registry.SetFaults(rig.Faults{})
}

// containerdRuntime is a namespace of a containerd, with docker-quay run alone.
func containerdRuntime(u *user, c *rig.Containerd, snapshotter string) runtime {
	const namespace = "apps"
	w := u.w
	ctr := func(args ...string) string {
		w.Helper()
		out, err := c.Ctr(w.ctx, namespace, args...)
		w.must(err)
		return strings.TrimSpace(out)
	}
	return runtime{
		user: u,
		to:   []string{"--to", "containerd:" + namespace, "--containerd-address", c.Socket(), "--snapshotter", snapshotter},
		identity: func(ref string) string {
			for _, line := range strings.Split(ctr("images", "ls"), "\n") {
				if f := strings.Fields(line); len(f) > 2 && f[0] == ref {
					return f[2]
				}
			}
			return "not there"
		},
		remove: func(ref string) { ctr("images", "rm", "--sync", ref) },
		images: func() string {
			return ctr("images", "ls", "-q") + ctr("content", "ls", "-q") + snapshots(ctr("snapshots", "--snapshotter", snapshotter, "ls"))
		},
		print: func(ref string) string {
			out, err := c.Run(w.ctx, namespace, snapshotter, ref, w.rig.ID())
			if err != nil {
				w.Error(err)
			}
			return out
		},
	}
}

// snapshots drops the heading of a list.
func snapshots(list string) string {
	_, rest, _ := strings.Cut(list, "\n")
	return rest
}

// engineRuntime is a Docker Engine, with docker-quay as a plugin of the docker CLI.
func engineRuntime(u *user) runtime {
	w, e := u.w, u.engine
	docker := func(args ...string) string {
		w.Helper()
		out, err := e.Docker(w.ctx, args...)
		if err != nil {
			w.Error(err)
		}
		return strings.TrimSpace(out)
	}
	return runtime{
		user: u,
		identity: func(ref string) string {
			if got := docker("images", "--format", "{{.Repository}}:{{.Tag}}"); got != ref {
				w.Errorf("docker images lists %q, want %s alone", got, ref)
			}
			return docker("image", "inspect", "--format", "{{.Id}}", ref)
		},
		remove: func(ref string) { docker("image", "rm", "--force", ref) },
		images: func() string { return docker("images", "--all", "--quiet") },
		print:  func(ref string) string { return docker("run", "--rm", ref) + "\n" },
	}
}

// saves checks that `docker save` gives out every byte of the image, and that `docker push` takes it back to the registry.
func saves(w *world, r runtime, ref string, img *image.Image) {
	w.Helper()
	archive := filepath.Join(w.dir("archives"), "image.tar")
	if _, err := r.engine.Docker(w.ctx, "save", "--output", archive, ref); err != nil {
		w.Error(err)
	}
	if out, err := w.network.Node(1).Run(w.ctx, nil, "tar", "-tf", archive); err != nil || !strings.Contains(out, "manifest.json") {
		w.Errorf("docker save wrote %q, %v", out, err)
	}
	again := w.registry.Ref("team/copy:1")
	if _, err := r.engine.Docker(w.ctx, "tag", ref, again); err != nil {
		w.Error(err)
	}
	if out, err := r.engine.Docker(w.ctx, "push", again); err != nil || !strings.Contains(out, img.Manifest.Digest.String()) {
		w.Errorf("docker push of %s says %q, %v", img.Manifest.Digest, out, err)
	}
}

// TestContainerdEmbedded: containerd with overlayfs, docker-quay alone, no daemon anywhere.
func TestContainerdEmbedded(t *testing.T) {
	w := newWorld(t, 2, private)
	img := w.small()
	round(w, img, greeting, img.Manifest.Digest, func(n *rig.Node, peers ...*rig.Node) runtime {
		return containerdRuntime(w.user(n).joins(w.secret, peers...), w.containerd(n, nil), "overlayfs")
	})
}

// TestContainerdWithDaemon: the same through the node daemon, whose snapshotter mounts eStargz layers lazily.
func TestContainerdWithDaemon(t *testing.T) {
	w := newWorld(t, 2, private)
	img, err := image.Busybox(w.ctx, rig.ImageDir(), image.EStargz)
	w.must(err)
	round(w, img, greeting, img.Manifest.Digest, func(n *rig.Node, peers ...*rig.Node) runtime {
		d := w.daemon(n, daemonOptions{peers: peers})
		d.knows(len(peers))
		return containerdRuntime(w.user(n).uses(d), w.containerd(n, d), "quay")
	})
}

// TestDockerOverlayfs: Docker Engine 29 as most have it.
func TestDockerOverlayfs(t *testing.T) {
	w := newWorld(t, 2, private)
	img := w.small()
	var last runtime
	round(w, img, greeting, img.Manifest.Digest, func(n *rig.Node, peers ...*rig.Node) runtime {
		e, err := w.rig.StartDockerd(w.ctx, rig.EngineOptions{
			Node: n, Containerd: w.containerd(n, nil), StorageDriver: "overlayfs", Registries: []*rig.Registry{w.registry},
		})
		w.must(err)
		u := w.dockerUser(n, e).joins(w.secret, peers...)
		last = engineRuntime(u)
		return last
	})
	saves(w, last, w.registry.Ref("team/app:1"), img)
}

// TestDockerQuay: Docker Engine 29 with our snapshotter as its storage driver, with layers that are mounted before they are
// there, and such that the daemon unpacks.
func TestDockerQuay(t *testing.T) {
	for _, f := range []image.Format{image.EStargz, image.Gzip} {
		t.Run(f.String(), func(t *testing.T) { dockerQuay(t, f) })
	}
}

func dockerQuay(t *testing.T, f image.Format) {
	w := newWorld(t, 2, private)
	img, err := image.Busybox(w.ctx, rig.ImageDir(), f)
	w.must(err)
	var last runtime
	round(w, img, greeting, img.Manifest.Digest, func(n *rig.Node, peers ...*rig.Node) runtime {
		d := w.daemon(n, daemonOptions{peers: peers})
		d.knows(len(peers))
		e, err := w.rig.StartDockerd(w.ctx, rig.EngineOptions{
			Node: n, Containerd: w.containerd(n, d), StorageDriver: "quay", Registries: []*rig.Registry{w.registry},
		})
		w.must(err)
		last = engineRuntime(w.dockerUser(n, e).uses(d))
		return last
	})
	saves(w, last, w.registry.Ref("team/app:1"), img)
}

// TestDockerClassic: the engine of graph drivers, which is given the image from a mirror on loopback. It knows images by
// their configurations.
func TestDockerClassic(t *testing.T) {
	w := newWorld(t, 2, private)
	img := w.small()
	round(w, img, greeting, img.Config.Digest, func(n *rig.Node, peers ...*rig.Node) runtime {
		e, err := w.rig.StartClassic(w.ctx, rig.EngineOptions{Node: n, StorageDriver: "overlay2", Registries: []*rig.Registry{w.registry}})
		w.must(err)
		return engineRuntime(w.dockerUser(n, e).joins(w.secret, peers...))
	})
}
