package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/test/rig"
)

// tracker runs a tracker on a user's node and returns its announce URL.
func (u *user) tracker(port int) string {
	u.w.Helper()
	p := u.start("tracker", "--listen", fmt.Sprintf("%s:%d", u.node.Addr, port))
	url := fmt.Sprintf("http://%s:%d/announce", u.node.Addr, port)
	u.w.until("the tracker", func() bool { return strings.Contains(p.Log(), url) })
	return url
}

// publish starts seed --publish and returns when the layers are given to anybody.
func (u *user) publish(ref string, args ...string) *rig.Process {
	u.w.Helper()
	p := u.start("seed", append([]string{"--progress", "plain", "--publish"}, append(args, ref)...)...)
	u.w.until("seeding", func() bool {
		select {
		case <-p.Done():
			u.w.Fatalf("seeding ended (%s): %s", p.State(), p.Log())
		default:
		}
		return strings.Contains(p.Log(), "giving it to peers")
	})
	return p
}

// smallBlobs is more than the config and the torrents of an image of these tests, and less than a layer, in bytes.
const smallBlobs = 64 << 10

// TestPublished: a node publishes an image and seeds it, others that share no secret with it pull the layers without the registry, by
// their own fetchers and by a daemon.
func TestPublished(t *testing.T) {
	w := newWorld(t, 4, rig.RegistryOptions{})
	n1, n2 := w.network.Node(1), w.network.Node(2)
	img := w.random(24*mib, 2)
	ref := w.push(img, "random", "1")
	publisher := w.user(n1)
	announce := publisher.tracker(6969)
	seeder := publisher.publish(ref, "--tracker", announce)
	if !strings.Contains(seeder.Log(), "Published the torrents of 2 layers") {
		t.Errorf("the seeder says %s", seeder.Log())
	}

	w.registry.ResetStats()
	u := w.user(n2)
	if s := u.pull("--skip-web-seed", "--torrents", "always", "--to", "store", ref); s.FromPeers < 48*mib || s.FromOrigin > smallBlobs {
		t.Errorf("got %+v", s)
	}
	w.sameBlobs(u.store, img)
	if n := w.served(); n > smallBlobs {
		t.Errorf("the registry gave %d bytes of blobs", n)
	}

	t.Run("never", func(t *testing.T) {
		u := w.sub(t).user(n2)
		if o := u.quay("pull", "--skip-web-seed", "--torrents", "never", "--to", "store", ref); o.code == 0 {
			t.Errorf("layers came from nowhere: %s", o)
		}
	})
	t.Run("daemon", func(t *testing.T) {
		w := w.sub(t)
		// A member of a cluster, so that it uses torrents only when told to.
		d := w.daemon(w.network.Node(3), daemonOptions{})
		u := w.user(w.network.Node(3)).uses(d)
		w.registry.ResetStats()
		if s := u.pull("--torrents", "always", "--skip-web-seed", "--to", "store", ref); s.FromPeers < 48*mib {
			t.Errorf("got %+v", s)
		}
		d.records(img)
		w.sameBlobs(d.store, img)

		// Now the daemon gives it to others, in the user's name.
		w.must(seeder.Stop())
		u.publish(ref, "--tracker", announce)
		other := w.user(w.network.Node(4))
		if s := other.pull("--skip-web-seed", "--to", "store", ref); s.FromPeers < 48*mib {
			t.Errorf("got %+v", s)
		}
	})
}

// TestPublishedPrivate: of an image that needs a login the torrents are kept to the trackers that were named, in the torrents or, instead of
// those, on the command line.
func TestPublishedPrivate(t *testing.T) {
	w := newWorld(t, 2, private)
	n1, n2 := w.network.Node(1), w.network.Node(2)
	img := w.random(8*mib, 1)
	ref := w.push(img, "random", "1")
	publisher := w.user(n1)
	publisher.login()
	if o := publisher.quay("seed", "--publish", ref); o.code != 125 || !strings.Contains(o.stderr, "--tracker") {
		t.Errorf("without a tracker: %s", o)
	}
	first, second := publisher.tracker(6969), publisher.tracker(6970)
	publisher.publish(ref, "--tracker", first)

	u := w.user(n2)
	u.login()
	w.registry.ResetStats()
	if o := u.quay("pull", "--skip-web-seed", "--tracker", second, "--to", "store", ref); o.code == 0 || !strings.Contains(o.stderr, "no peer of theirs") {
		t.Errorf("a tracker that knows no seeder was to be the only one: %s", o)
	}
	if s := u.pull("--skip-web-seed", "--tracker", first, "--to", "store", ref); s.FromPeers < 8*mib {
		t.Errorf("got %+v", s)
	}
	w.sameBlobs(u.store, img)
	if n := w.served(); n > smallBlobs {
		t.Errorf("the registry gave %d bytes of blobs", n)
	}
}
