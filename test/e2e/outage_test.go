package e2e

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// outageEnv is how long TestRegistryOutage has the registry away, each of three ways. After a minute reads are errors.
const outageEnv = "QUAY_TEST_OUTAGE"

// patience is how long the daemon tries for what a container waits for (docs/lazy.md), less the longest pause between two tries.
const patience = 55 * time.Second

// faults has the registry misbehave.
func (w *world) faults(f rig.Faults) func() error {
	return func() error { w.registry.SetFaults(f); return nil }
}

// complaints is how often the log says that containers wait.
func (d *daemon) complaints() int {
	return strings.Count(d.process.Log(), "A container waits for bytes of a layer")
}

// TestRegistryOutage: the registry goes away while containers run whose layers are not there. Who reads what is missing waits, and the
// log says so; when it is back they read on, and nothing but what is in the image.
func TestRegistryOutage(t *testing.T) {
	outage, ways := 2*time.Second, 2 // the third takes as long as the others, and is much like the first
	if d, err := time.ParseDuration(os.Getenv(outageEnv)); err == nil {
		outage, ways = d, 3
	}
	w := newWorldFor(t, 1, rig.RegistryOptions{}, testTimeout+3*outage)
	img := w.stock(image.EStargz)
	ref := w.push(img, "stock", "1")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{config: "[lazy]\nquiet = \"1h\"\n"})
	d.needsEROFS()
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", ref))
	one := w.tenant(c, img, ref)
	here := one.names[1]
	one.reads("before", here)
	for i, how := range []struct {
		name string
		down func() error
		up   func() error
	}{
		{"it refuses connections", w.registry.Stop, func() error { return w.registry.Start(w.ctx) }},
		{"it does not answer", w.faults(rig.Faults{Hang: true}), w.faults(rig.Faults{})},
		{"it has errors of its own", w.faults(rig.Faults{Unavailable: -1}), w.faults(rig.Faults{})},
	}[:ways] {
		from, said := i*stockBig/3, d.complaints()
		w.must(how.down())
		before := time.Now()
		read := one.later(bigFile, from, mib)
		w.until(how.name+": a line that tells so", func() bool { return d.complaints() > said })
		one.reads(how.name+": what is there", here)
		failed := false
		select {
		case err := <-read:
			if failed = errors.Is(err, unix.EIO); !failed || time.Since(before) < patience {
				t.Fatalf("%s: a read of what is missing ended after %s: %v", how.name, time.Since(before).Round(time.Second), err)
			}
			time.Sleep(time.Until(before.Add(outage)))
		case <-time.After(time.Until(before.Add(outage))):
		}
		w.must(how.up())
		back := time.Now()
		if failed {
			read = one.later(bigFile, from, mib)
		}
		if err := one.await(how.name, read); err != nil {
			t.Errorf("%s: %v", how.name, err)
		}
		t.Logf("%s for %s: a read ended %s after that", how.name, back.Sub(before).Round(time.Millisecond), time.Since(back).Round(time.Millisecond))
		if !d.logs("The bytes of a layer that a container waited for have come") {
			t.Errorf("%s: the log does not say that it is over", how.name)
		}
		one.alive()
	}
	one.reads("after all")
}

// TestPeersGone: what a container reads comes from another node. When that is gone it comes from the registry; when both are, it waits
// for whichever is back first.
func TestPeersGone(t *testing.T) {
	w := newWorld(t, 2, rig.RegistryOptions{})
	img := w.stock(image.EStargz)
	ref := w.push(img, "stock", "1")
	n1, n2 := w.network.Node(1), w.network.Node(2)
	d1 := w.daemon(n1, daemonOptions{})
	w.user(n1).uses(d1).pull("--to", "store", ref)
	w.registry.ResetStats()
	d2 := w.daemon(n2, daemonOptions{peers: []*rig.Node{n1}, config: "[lazy]\nquiet = \"1h\"\n"})
	d2.needsEROFS()
	d2.knows(1)
	c := w.containerd(n2, d2)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", ref))
	one := w.tenant(c, img, ref)
	part := func(i int) (string, int, int) { return bigFile, i * stockBig / 4, mib }
	if err := one.part(part(0)); err != nil {
		t.Fatal(err)
	}
	if got := w.served(); got > img.Size()/4 {
		t.Errorf("the registry served %d bytes though another node has all", got)
	}

	w.must(d1.process.Kill9())
	begun := time.Now()
	if err := one.part(part(1)); err != nil {
		t.Error("after the other node was killed:", err)
	}
	t.Logf("after the other node was killed a read took %s", time.Since(begun).Round(time.Millisecond))

	w.must(w.registry.Stop())
	read := one.later(part(2))
	w.until("a line that tells that nobody has it", func() bool { return d2.complaints() > 0 })
	d1.start()
	if err := one.await("a read while nobody had it", read); err != nil {
		t.Error(err)
	}
	if err := one.part(part(3)); err != nil {
		t.Error("with the registry away:", err)
	}
	one.reads("with the registry away")
	one.alive()
}
