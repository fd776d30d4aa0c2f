package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// members is the setting of a node that never asks a registry itself.
const members = "reach = \"members\"\n"

// mirrorAddr is where a daemon has its registry mirror unless told otherwise.
const mirrorAddr = "127.0.0.1:6880"

// mirrored reads what a node's mirror has, as a runtime on that node does: as root, over loopback.
func (d *daemon) mirrored(path string) (int, string, []byte) {
	d.w.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: d.node.DialContext, DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(d.w.ctx, http.MethodGet, fmt.Sprintf("http://%s%s?ns=%s", mirrorAddr, path, d.w.registry.Addr()), nil)
	d.w.must(err)
	resp, err := client.Do(req)
	d.w.must(err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	d.w.must(err)
	return resp.StatusCode, resp.Header.Get("Docker-Content-Digest"), body
}

// records waits until a daemon has the layers of an image on disk as complete, which it may do after the pull.
func (d *daemon) records(img *image.Image) {
	d.w.Helper()
	st, err := store.Open(store.Options{Dir: d.store})
	d.w.must(err)
	defer st.Close()
	d.w.until("the layers are recorded as complete", func() bool {
		for _, l := range img.Layers {
			if info, err := st.Stat(l.Digest); err != nil || !info.Complete {
				return false
			}
		}
		return true
	})
}

// TestBastion: only one node reaches the registry, and that one never pulls anything itself. The others get private images
// through it by tag, with their users' credentials and no others, and while the registry is away what was seen last, said
// aloud.
func TestBastion(t *testing.T) {
	w := newWorld(t, 3, private)
	n1, n2, n3 := w.network.Node(1), w.network.Node(2), w.network.Node(3)
	for _, n := range []*rig.Node{n2, n3} {
		w.must(w.network.Block(n, w.network.Registry()))
	}
	img := w.random(16*mib, 2)
	ref := w.push(img, "random", "1")
	second, third := w.random(8*mib, 1), w.small()
	w.push(second, "random", "2")
	ref3 := w.push(third, "busybox", "3")

	gate := w.daemon(n1, daemonOptions{}) // without a login
	bastion := w.daemon(n2, daemonOptions{peers: []*rig.Node{n1}, config: members})
	bastion.knows(1)

	t.Run("without credentials", func(t *testing.T) {
		w := w.sub(t)
		stranger := w.user(n2).uses(bastion)
		if o := stranger.quay("pull", "--to", "store", ref); o.code != 4 || o.took > 20*time.Second {
			t.Errorf("want exit 4: %s", o)
		}
		w.untouched(bastion.store)
		w.untouched(gate.store)
	})
	t.Run("with credentials", func(t *testing.T) {
		w := w.sub(t)
		u := w.user(n2).uses(bastion)
		u.login()
		before := w.served()
		if s := u.pull("--to", "store", ref); s.FromOrigin != 0 || s.FromPeers < 16*mib {
			t.Errorf("got %+v", s)
		}
		bastion.records(img)
		w.sameBlobs(bastion.store, img)
		if n := w.served() - before; n > img.Size()+mib {
			t.Errorf("the registry served %d bytes of an image of %d", n, img.Size())
		}
		// What the node has by now is for those whom the registry lets in.
		if o := w.user(n2).uses(bastion).quay("pull", "--to", "store", ref); o.code != 4 {
			t.Errorf("want exit 4: %s", o)
		}
	})
	t.Run("by the mirror", func(t *testing.T) {
		if status, _, body := bastion.mirrored("/v2/random/manifests/2"); status != http.StatusForbidden {
			t.Errorf("without the node's login: %d %s", status, body)
		}
		bastion.login()
		status, target, body := bastion.mirrored("/v2/random/manifests/2")
		if status != http.StatusOK || digest.FromBytes(body).String() != target {
			t.Fatalf("%d %s %s", status, target, body)
		}
		layer := second.Layers[0].Digest
		if status, _, body := bastion.mirrored("/v2/random/blobs/" + layer.String()); status != http.StatusOK || digest.FromBytes(body) != layer {
			t.Errorf("%d, %d bytes of a layer of %d", status, len(body), second.Layers[0].Size)
		}
	})
	t.Run("not set up as one", func(t *testing.T) {
		// The registry drops its packets: found out while members are asked.
		w := w.sub(t)
		u := w.user(n3).joins(w.secret, n1)
		u.login()
		if o := u.quay("pull", "--to", "store", ref3); o.code != 0 || o.took > 30*time.Second {
			t.Error(o)
		}
		w.sameBlobs(u.store, third)
	})
	t.Run("registry away", func(t *testing.T) {
		w := w.sub(t)
		w.must(w.registry.Stop())
		target := third.Manifest.Digest.String()
		u := w.user(n2).uses(bastion)
		u.login()
		bytes, names := w.contents(bastion.store)
		o := u.quay("pull", "--to", "store", ref3)
		if o.code != 5 || !strings.Contains(o.stderr, "use --offline to take the digest "+target) {
			t.Errorf("want exit 5 and what members saw: %s", o)
		}
		if b, n := w.contents(bastion.store); b != bytes || n != names {
			t.Errorf("the pull that failed left %d bytes and %d names in the store", b-bytes, n-names)
		}
		// By the node's daemon, and by a process on a node where the registry drops its packets.
		alone := w.user(n3).joins(w.secret, n1)
		for _, u := range []*user{u, alone} {
			o = u.quay("pull", "--to", "store", "--offline", ref3)
			if o.code != 0 || !strings.Contains(o.stderr, "Note: the registry cannot be reached; using "+target) || o.took > 30*time.Second {
				t.Errorf("want the digest that was seen, and a note: %s", o)
			}
			if u.node == n2 {
				bastion.records(third)
			}
			w.sameBlobs(u.store, third)
		}
	})
}
