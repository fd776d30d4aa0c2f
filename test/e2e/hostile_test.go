package e2e

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// hostileSize is the size of a layer in these tests, in bytes: several times what a faulty registry lets through at once.
const hostileSize = 64 * mib

// TestFaultyRegistry: whatever a registry or its storage does short of lying, the pull ends right, and soon.
func TestFaultyRegistry(t *testing.T) {
	w := newWorld(t, 1, private)
	img := w.random(hostileSize, 1)
	ref := w.push(img, "random", "1")
	for _, test := range []struct {
		name   string
		faults rig.Faults
		flags  []string
		within time.Duration
		most   int64 // bytes of blobs served
	}{
		// What was sent before a cut was received, but for what was in the socket's buffers.
		{"cuts every connection at 10 MB", rig.Faults{CutAfter: 10e6}, nil, 20 * time.Second, hostileSize + 8*mib},
		{"answers 200 to ranges", rig.Faults{WholeOnly: true}, nil, 20 * time.Second, hostileSize + 8*mib},
		{"answers 503 with Retry-After three times", rig.Faults{Unavailable: 3, RetryAfter: time.Second}, nil, 25 * time.Second, hostileSize + mib},
		{"answers 429 with Retry-After three times", rig.Faults{RateLimited: 3, RetryAfter: time.Second}, nil, 25 * time.Second, hostileSize + mib},
		// A connection lasts 0.6 s at this rate, so that every other one has to go on with a URL that has expired.
		{"redirects to URLs that expire after 1 s", rig.Faults{RedirectTTL: time.Second, CutAfter: 5e6}, []string{"--download-rate", "16MiB"}, 30 * time.Second, hostileSize + 8*mib},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := w.sub(t)
			u := w.user(w.network.Node(1))
			u.login()
			w.registry.ResetStats()
			w.registry.SetFaults(test.faults)
			defer w.registry.SetFaults(rig.Faults{})
			start := time.Now()
			s := u.pull(append(test.flags, "--to", "store", ref)...)
			took := time.Since(start)
			t.Logf("%s, %.1f MiB served of %d", took.Round(time.Millisecond), float64(w.served())/mib, hostileSize/mib)
			if took > test.within {
				t.Errorf("took %s, more than %s", took, test.within)
			}
			if s.FromOrigin < hostileSize || w.served() > test.most {
				t.Errorf("%d bytes served, at most %d wanted: %+v", w.served(), test.most, s)
			}
			w.sameBlobs(u.store, img)
		})
	}
}

// TestWrongRegistry: a registry that sends other bytes than the digest says is told from a good one, and nothing counts as
// complete.
func TestWrongRegistry(t *testing.T) {
	w := newWorld(t, 1, private)
	img := w.random(16*mib, 1)
	ref := w.push(img, "random", "1")
	u := w.user(w.network.Node(1))
	u.login()
	w.registry.SetFaults(rig.Faults{CorruptAt: 5 * mib, CorruptLen: 10})
	o := u.quay("pull", "--to", "store", ref)
	if o.code != 6 {
		t.Errorf("want exit 6: %s", o)
	}
	w.registry.SetFaults(rig.Faults{})
	u.pull("--to", "store", ref)
	w.sameBlobs(u.store, img)
}

// corrupt changes bytes of a layer behind the store's back, at several places.
func corrupt(w *world, store string, img *image.Image) {
	w.Helper()
	f, err := os.OpenFile(blobData(store, img.Layers[0].Digest), os.O_RDWR, 0)
	w.must(err)
	defer f.Close()
	for _, at := range []int64{1000, 5 * mib, img.Layers[0].Size - 1000} {
		_, err := f.WriteAt([]byte("these bytes are wrong"), at)
		w.must(err)
	}
}

// TestWrongPeer: a member of the cluster whose disk went bad gives wrong bytes. With the registry at hand the pull comes
// right; without it, it fails and says why. In no case does the image count as complete with wrong bytes.
func TestWrongPeer(t *testing.T) {
	w := newWorld(t, 2, private)
	n1, n2 := w.network.Node(1), w.network.Node(2)
	img := w.random(hostileSize, 1)
	ref := w.push(img, "random", "1")
	bad := w.user(n1).joins(w.secret)
	bad.login()
	bad.pull("--to", "store", ref)
	corrupt(w, bad.store, img)
	bad.seed(ref)

	t.Run("with the registry", func(t *testing.T) {
		w := w.sub(t)
		u := w.user(n2).joins(w.secret, n1)
		u.login()
		start := time.Now()
		u.pull("--to", "store", ref)
		if took := time.Since(start); took > 45*time.Second {
			t.Errorf("took %s", took)
		}
		w.sameBlobs(u.store, img)
	})
	t.Run("without", func(t *testing.T) {
		w := w.sub(t)
		u := w.user(n2).joins(w.secret, n1)
		u.login()
		start := time.Now()
		o := u.quay("pull", "--to", "store", "--skip-web-seed", ref)
		if o.code != 6 && o.code != 5 || o.stdout != "" {
			t.Errorf("want exit 6 or 5: %s", o)
		}
		if took := time.Since(start); took > 90*time.Second {
			t.Errorf("took %s", took)
		}
		// What is there is good for nothing wrong: with the registry the same pull comes right.
		u.pull("--to", "store", ref)
		w.sameBlobs(u.store, img)
	})
}

// TestStrangers: a node with another secret gets nothing from the cluster, one without any gets nothing, and an attempt does
// not disturb those who belong to it.
func TestStrangers(t *testing.T) {
	w := newWorld(t, 2, private)
	n1, n2 := w.network.Node(1), w.network.Node(2)
	img := w.random(16*mib, 1)
	ref := w.push(img, "random", "1")
	owner := w.user(n1).joins(w.secret)
	owner.login()
	owner.pull("--to", "store", ref)
	owner.seed(ref)
	w.denyBlobs(n2)
	before := w.served()

	refused := func(u *user, code int, hint string, flags ...string) {
		t.Helper()
		u.login()
		start := time.Now()
		o := u.quay("pull", append(flags, "--to", "store", "--skip-web-seed", ref)...)
		if o.code != code || !strings.Contains(o.stderr, hint) {
			t.Errorf("want exit %d and %q: %s", code, hint, o)
		}
		if took := time.Since(start); took > 30*time.Second {
			t.Errorf("took %s", took)
		}
		if blobs := w.blobBytes(u.store); blobs != 0 {
			t.Errorf("a stranger has %d bytes of the image", blobs)
		}
	}
	refused(w.user(n2).joins(w.newSecret("other"), n1), 4, "secret")
	refused(w.user(n2), 1, "docker quay node secret", "--peer", peer(n1))
	// Without a search for torrents not even the config is asked of the registry.
	refused(w.user(n2), 5, "no peer", "--torrents", "never")

	member := w.user(n2).joins(w.secret, n1)
	member.login()
	if s := member.pull("--to", "store", "--skip-web-seed", ref); s.FromPeers < 16*mib {
		t.Errorf("a member got %+v", s)
	}
	if w.served() != before {
		t.Errorf("the registry served %d bytes more", w.served()-before)
	}
	w.sameBlobs(member.store, img)
}
