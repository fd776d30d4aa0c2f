package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/rig"
)

// TestTwoPullsOneStore: two docker-quay at once on the same image and store both succeed, with one copy from the registry.
func TestTwoPullsOneStore(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	img := w.random(32*mib, 2)
	ref := w.push(img, "random", "1")
	u := w.user(w.network.Node(1))
	one, two := u.start("pull", "--to", "store", ref), u.start("pull", "--to", "store", ref)
	for _, p := range []*rig.Process{one, two} {
		if code := w.code(p); code != 0 {
			t.Errorf("one of two pulls ended with %d: %s", code, p.Log())
		}
	}
	if w.served() > img.Size()+mib {
		t.Errorf("the registry served %d bytes to two pulls of an image of %d", w.served(), img.Size())
	}
	w.sameBlobs(u.store, img)
}

// TestSeedDuration: seed fetches what is not here, gives it to others for as long as it was told, and ends well.
func TestSeedDuration(t *testing.T) {
	w := newWorld(t, 2, rig.RegistryOptions{})
	img := w.random(16*mib, 1)
	ref := w.push(img, "random", "1")
	n1, n2 := w.network.Node(1), w.network.Node(2)
	u := w.user(n1).joins(w.secret)
	start := time.Now()
	o := u.quay("seed", "--duration", "2s", ref)
	if took := time.Since(start); o.code != 0 || took < 2*time.Second || took > 20*time.Second {
		t.Errorf("took %s: %s", took, o)
	}
	if !strings.Contains(o.stderr, "Seeded: ") || o.stdout != ref+"\n" {
		t.Error(o)
	}
	w.sameBlobs(u.store, img)

	// A node that comes while it lasts gets all from there, and the seed says what it gave.
	w.denyBlobs(n2)
	u.flags = append(u.flags, "--duration", "8s")
	p := u.seed(ref)
	other := w.user(n2).joins(w.secret, n1)
	if s := other.pull("--to", "store", "--skip-web-seed", ref); s.FromPeers < 16*mib {
		t.Errorf("from the seed came %+v", s)
	}
	w.sameBlobs(other.store, img)
	if code := w.code(p); code != 0 || !strings.Contains(p.Log(), "uploaded 16.7") {
		t.Errorf("the seed ended with %d: %s", code, p.Log())
	}
}

// TestManyNodes: four cold nodes pull at once, each with its own fetcher; the registry gives the image about once.
func TestManyNodes(t *testing.T) {
	w := newWorld(t, 4, private)
	img := w.random(hostileSize, 1)
	ref := w.push(img, "random", "1")
	var users []*user
	var running []*rig.Process
	for _, n := range w.network.Nodes() {
		u := w.user(n).joins(w.secret, w.network.Node(1))
		u.login()
		users = append(users, u)
	}
	for _, u := range users {
		// After its own pull each stays for the others.
		running = append(running, u.start("pull", "--to", "store", "--duration", "5s", ref))
	}
	for i, p := range running {
		if code := w.code(p); code != 0 {
			t.Errorf("node %d ended with %d: %s", i+1, code, p.Log())
		}
		w.sameBlobs(users[i].store, img)
	}
	t.Logf("the registry served %.2f times the image to %d nodes", float64(w.served())/float64(img.Size()), len(users))
	// Started at the same moment, they first have to find each other: 1.0 is usual, 1.4 was seen.
	if w.served() > img.Size()*2 {
		t.Errorf("the registry served %d bytes of an image of %d", w.served(), img.Size())
	}
}
