package e2e

import (
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestMembersIndex: of an unmodified image without any index the first node has all before its containers start. The next one is lazy by
// the first's index, though it gets not a byte of a layer from the registry; and one that comes after it also has what its containers read
// first on the way before anybody waits for it.
func TestMembersIndex(t *testing.T) {
	img := demo(t, image.Gzip)
	w := newWorldFor(t, 3, private, 2*testTimeout)
	ref := w.push(img, "demo", "gzip")
	n1, n2, n3 := w.network.Node(1), w.network.Node(2), w.network.Node(3)
	w.registry.SetFaults(rig.Faults{Deny: func(r *http.Request) bool {
		host, _, err := net.SplitHostPort(r.RemoteAddr)
		return err == nil && (host == n2.Addr.String() || host == n3.Addr.String())
	}})

	first := w.member(n1, "5s")
	first.pull(ref)
	if got := first.r.print(ref); !strings.HasPrefix(got, demoGreeting) {
		t.Errorf("on the first node the container printed %q", got)
	}
	first.allServed(img, "eager")
	if w.served() < img.Size()/2 {
		t.Errorf("the registry served %d bytes to the first node: this test would prove nothing", w.served())
	}
	w.registry.ResetStats()

	second := w.member(n2, "5s", n1)
	second.lazy(img, ref)
	w.until("a layer that can be told of", func() bool { st := second.layers(); return st.Complete == st.Mounts && st.Direct == st.Mounts })
	w.must(first.process.Kill9())

	third := w.member(n3, "10m", n2) // the rest of the layers is not fetched meanwhile
	third.pull(ref)
	const some = 4 * mib // a tenth of what the container reads
	w.until("what the second node's container read first, fetched before anybody reads it", func() bool { return w.blobBytes(third.store) > some })
	if st := third.layers(); st.Reads > 0 {
		t.Errorf("somebody reads already: %+v", st)
	}
	third.lazy(img, ref)
	if n := w.served(); n > smallBlobs {
		t.Errorf("the registry served %d bytes of blobs to nodes that have others", n)
	}
}

// member is a node of the cluster that pulls through its daemon.
type member struct {
	*daemon
	r runtime
}

func (w *world) member(n *rig.Node, quiet string, peers ...*rig.Node) *member {
	w.Helper()
	d := w.daemon(n, daemonOptions{peers: peers, config: "[lazy]\nquiet = \"" + quiet + "\"\n"})
	d.needsEROFS()
	d.login()
	d.knows(len(peers))
	m := &member{d, containerdRuntime(w.user(n).uses(d), w.containerd(n, d), "quay")}
	m.r.login()
	return m
}

func (m *member) pull(ref string) { m.r.pull(append(m.r.to, "--lazy", "keep", ref)...) }

// lazy runs a container of the image that is there by another node's index, with less than half of it fetched.
func (m *member) lazy(img *image.Image, ref string) {
	m.w.Helper()
	m.pull(ref)
	out := m.r.print(ref)
	fetched := m.w.blobBytes(m.store)
	if !strings.HasPrefix(out, demoGreeting) {
		m.w.Errorf("on %s the container printed %q", m.node.Name, out)
	}
	if log := m.process.Log(); strings.Count(log, `served=lazy why="index of another node"`) != len(img.Layers) {
		m.w.Errorf("not all of %d layers are lazy by another node's index: %s", len(img.Layers), log)
	}
	m.w.Logf("%s has %.0f %% of %d bytes when the container has printed", m.node.Name, 100*float64(fetched)/float64(img.Size()), img.Size())
	if fetched > img.Size()/2 {
		m.w.Errorf("%s has %d of %d bytes when the container has printed", m.node.Name, fetched, img.Size())
	}
}
