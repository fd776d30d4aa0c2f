package fetcher

import (
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// TestMiserTellsNothing: who gives nothing does not say what it has either, neither while it fetches nor when it is done. Others would
// ask it in vain, and not ask the registry.
func TestMiserTellsNothing(t *testing.T) {
	r := newRegistry(t)
	r.rate.Store(4 << 20)
	desc := r.add(random(6 << 20))
	s := secret()
	other := newNode(t, filepath.Join(t.TempDir(), "a"), s)
	miser := newNodeWith(t, s, func(o *Options) { o.NoSeed = true }, other.Addr().String())
	theirs, own := miser.blob(t, desc, r.origin(t)), other.blob(t, desc, nil)
	theirs.Fetch()
	own.d.enter()
	tor := own.d.torrent()
	tor.AddPeers([]netip.AddrPort{miser.Addr()})
	done := make(chan error, 1)
	go func() { done <- theirs.Wait(within(t, 20*time.Second)) }()
	met := false
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		for _, p := range tor.Peers() {
			met = true
			if slices.Contains(p.Pieces, true) {
				t.Fatal("a node that gives nothing said that it has a piece")
			}
		}
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			end = time.Now().Add(300 * time.Millisecond) // for the last one to be told
		default:
		}
	}
	if !met {
		t.Error("the two were never connected")
	}
}
