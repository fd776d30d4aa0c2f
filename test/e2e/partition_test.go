package e2e

import (
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// peers are the addresses of the other nodes that a daemon knows.
func (d *daemon) peers() []netip.AddrPort {
	d.w.Helper()
	client, st, err := api.Dial(d.w.ctx, d.socket)
	d.w.must(err)
	defer client.Close()
	var at []netip.AddrPort
	for _, p := range st.Peers {
		at = append(at, p.Addr)
	}
	return at
}

// pullAll pulls an image on several nodes at once, by their daemons, and returns how many copies of it the registry served.
func (w *world) pullAll(img *image.Image, ref string, daemons ...*daemon) float64 {
	w.Helper()
	before := w.served()
	var running []*rig.Process
	for _, d := range daemons {
		running = append(running, w.user(d.node).uses(d).start("pull", "--to", "store", ref))
	}
	w.finish(img, running, daemons)
	return float64(w.served()-before) / float64(img.Size())
}

func (w *world) finish(img *image.Image, running []*rig.Process, daemons []*daemon) {
	w.Helper()
	for i, p := range running {
		if code := w.code(p); code != 0 {
			w.Errorf("the pull on %s ended with %d: %s", daemons[i].node.Name, code, p.Log())
		}
		daemons[i].records(img)
		w.sameBlobs(daemons[i].store, img)
	}
}

// TestPartition: a network of four nodes is cut in two during a pull. Both halves finish it and pull more, each with one copy;
// healed, they find each other and share again.
func TestPartition(t *testing.T) {
	w := newWorld(t, 4, rig.RegistryOptions{})
	nodes := w.network.Nodes()
	var all []*daemon
	for i, n := range nodes {
		all = append(all, w.daemon(n, daemonOptions{peers: nodes[:min(i, 1)]}))
	}
	for _, d := range all {
		d.knows(3)
	}
	left, right := all[:2], all[2:]
	across := func(f func(a, b *rig.Node) error) {
		for _, a := range left {
			for _, b := range right {
				w.must(f(a.node, b.node))
			}
		}
	}
	sees := func(d *daemon, others ...*daemon) bool {
		at := d.peers()
		if len(at) != len(others) {
			return false
		}
		for _, o := range others {
			if !slices.ContainsFunc(at, func(ap netip.AddrPort) bool { return ap.Addr() == o.node.Addr }) {
				return false
			}
		}
		return true
	}

	during := w.random(64*mib, 2)
	ref := w.push(during, "during", "1")
	var running []*rig.Process
	for _, d := range all {
		running = append(running, w.user(d.node).uses(d).start("pull", "--to", "store", ref))
	}
	w.until("a part is served", func() bool { return w.served() > during.Size()/4 })
	across(w.network.Block)
	w.finish(during, running, all)
	copies := float64(w.served()) / float64(during.Size())
	t.Logf("cut at a quarter of a pull: %.2f copies", copies)
	if copies > 2.5 {
		t.Errorf("the registry served %.2f copies to two halves of a network that was cut", copies)
	}
	w.until("both halves know that they are two", func() bool {
		return sees(all[0], all[1]) && sees(all[1], all[0]) && sees(all[2], all[3]) && sees(all[3], all[2])
	})

	apart := w.random(24*mib, 1)
	ref = w.push(apart, "apart", "1")
	copies = w.pullAll(apart, ref, all...)
	t.Logf("in two halves: %.2f copies", copies)
	if copies > 2.5 {
		t.Errorf("the registry served %.2f copies to two halves", copies)
	}

	across(w.network.Unblock)
	w.until("all know each other again", func() bool {
		return sees(all[0], all[1:]...) && sees(all[3], all[:3]...) && sees(all[1], all[0], all[2], all[3])
	})
	healed := w.random(40*mib, 1)
	ref = w.push(healed, "healed", "1")
	copies = w.pullAll(healed, ref, all...)
	t.Logf("healed: %.2f copies", copies)
	if copies > 1.5 {
		t.Errorf("the registry served %.2f copies to a network that was healed", copies)
	}
}

// TestAddressChanges: a node gets another address while its daemon runs. The others find it there, and it pulls from them.
func TestAddressChanges(t *testing.T) {
	w := newWorld(t, 2, rig.RegistryOptions{})
	n1, n2 := w.network.Node(1), w.network.Node(2)
	img := w.random(16*mib, 1)
	ref := w.push(img, "random", "1")
	first := w.daemon(n1, daemonOptions{})
	moving := w.daemon(n2, daemonOptions{peers: []*rig.Node{n1}})
	// It listens on every address it has, now and later.
	w.must(moving.process.Stop())
	config := filepath.Join(w.dir("quay-"+n2.Name), "config.toml")
	text, err := os.ReadFile(config)
	w.must(err)
	w.must(os.WriteFile(config, []byte(strings.Replace(string(text), `listen = "`+n2.Addr.String()+`"`, `listen = "0.0.0.0"`, 1)), 0o644))
	moving.start()
	first.knows(1)
	w.pullAll(img, ref, first)

	next := netip.MustParseAddr("10.77.0.222")
	w.must(n2.Do(func() error {
		for _, args := range [][]string{{"addr", "del", n2.Addr.String() + "/16", "dev", "eth0"}, {"addr", "add", next.String() + "/16", "dev", "eth0"}} {
			if err := exec.Command("ip", args...).Run(); err != nil {
				return err
			}
		}
		return nil
	}))
	w.until("the others have its new address", func() bool {
		at := first.peers()
		return len(at) == 1 && at[0].Addr() == next
	})
	w.registry.SetFaults(rig.Faults{Deny: rig.DenyBlobs})
	before := w.served()
	if s := w.user(n2).uses(moving).pull("--to", "store", ref); s.FromPeers < 16*mib {
		t.Errorf("got %+v", s)
	}
	w.sameBlobs(moving.store, img)
	if w.served() != before {
		t.Error("the registry served some of it")
	}
}
