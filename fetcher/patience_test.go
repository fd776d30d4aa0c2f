package fetcher

import (
	"fmt"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// TestToldPauses: what members say that registries asked for counts up to a budget
// for each of them, so that one that lies delays registry requests for a minute and
// a fifth of the time after that; what a registry asked of this node counts whole.
func TestToldPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &Fetcher{log: slog.New(slog.DiscardHandler)}
		const host = "registry.example"
		say := func(from string, d time.Duration) { f.told(from, jsonOf(t, notice{host, d.Milliseconds()})) }
		say("liar", patienceMost)
		if left := f.patience.left(host); left > patienceTold || left < patienceTold-time.Second {
			t.Errorf("told of %s, a node waits %s", patienceMost, left)
		}
		// It repeats itself, every second for an hour.
		var waited time.Duration
		for range 3600 {
			say("liar", patienceMost)
			waited += min(max(f.patience.left(host), 0), time.Second)
			time.Sleep(time.Second)
		}
		if most := patienceTold + time.Hour/patienceRefill + time.Minute; waited > most || waited == 0 {
			t.Errorf("a liar kept the node from its registry for %s of an hour, want at most %s", waited, most)
		}
		time.Sleep(time.Hour)
		// An honest one, after all that: short pauses, as registries ask for.
		for range 10 {
			say("honest", 2*time.Second)
			if left := f.patience.left(host); left != 2*time.Second {
				t.Fatalf("told of 2 s, a node waits %s", left)
			}
			time.Sleep(2100 * time.Millisecond)
		}
		if !f.patience.note(host, patienceMost) || f.patience.left(host) != patienceMost {
			t.Errorf("asked by the registry for %s, a node waits %s", patienceMost, f.patience.left(host))
		}
	})
}

// TestPatienceIsBounded: a flood of made-up registries and members leaves room for
// what is true.
func TestPatienceIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &Fetcher{log: slog.New(slog.DiscardHandler)}
		for i := range 10_000 {
			f.told("liar", jsonOf(t, notice{fmt.Sprint("h", i), patienceMost.Milliseconds()}))
		}
		if n := len(f.patience.until); n > 1 {
			t.Errorf("one member had the node wait for %d registries", n)
		}
		for i := range 10_000 {
			f.told(fmt.Sprint("h", i), jsonOf(t, notice{fmt.Sprint("h", i), 1000}))
		}
		if n, m := len(f.patience.until), len(f.patience.tellers); n > patienceHosts || m > patienceTellers {
			t.Errorf("%d registries and %d members are remembered", n, m)
		}
		if !f.patience.note("registry.example", 10*time.Second) || f.patience.left("registry.example") != 10*time.Second {
			t.Error("a registry's own word is not heard behind a flood of lies")
		}
		for _, b := range []string{"", "{", `{"host":"x","for":-1}`, `{"host":"x","for":9000000}`, `{"host":"","for":1000}`, `{"for":1000}`} {
			before := len(f.patience.until)
			f.told("other", []byte(b))
			if len(f.patience.until) != before {
				t.Errorf("%q counts", b)
			}
		}
	})
}

// TestFalsePauseDelaysTheRegistryOnly: peers deliver while a member claims that the
// registry asked for patience.
func TestFalsePauseDelaysTheRegistryOnly(t *testing.T) {
	r := newRegistry(t)
	data := random(6 << 20)
	desc := r.add(data)
	alone := random(1 << 20)
	other := r.add(alone)
	s := secret()
	a := newNode(t, t.TempDir(), s)
	right(t, a.blob(t, desc, r.origin(t)), data, 20*time.Second)
	b := newNode(t, t.TempDir(), s, a.Addr().String())
	liar := newRogue(t, s, a.Addr().String())
	acquainted(t, 2, a, b)
	known(t, desc.Digest, 1, a, b)
	host, _ := r.origin(t).Paused()
	if err := liar.gossip.Broadcast(jsonOf(t, notice{host, 5000})); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the lie arrived", func() bool { return b.patience.left(host) > time.Second })
	before, begun := r.requests.Load(), time.Now()
	right(t, b.blob(t, desc, r.origin(t)), data, 20*time.Second)
	if got := r.requests.Load() - before; got > 0 && time.Since(begun) < 4*time.Second {
		t.Errorf("%d requests at a registry that is thought to be paused", got)
	}
	// What no peer has comes when the pause is over.
	took := right(t, b.blob(t, other, r.origin(t)), alone, 40*time.Second)
	t.Logf("after %s", took)
	if n := b.Stats().RegistryPauses; n != 1 {
		t.Errorf("%d pauses are counted", n)
	}
}
