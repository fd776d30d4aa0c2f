package main

import (
	"errors"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestMain(m *testing.M) {
	bench.Init()
	candidate.Init()
	m.Run()
}

// A row that is not ok, and only that, fails the benchmark; what is asked of docker quay is told beside it.
func TestVerdict(t *testing.T) {
	good := row{Candidate: "quay", ToOverlayfs: 0.5, HelperRSS: 100, OK: true}
	slow, big, failed := good, good, good
	slow.ToOverlayfs, big.HelperRSS, failed.OK = 0.7, 400, false
	for _, c := range []struct {
		name string
		r    row
		ok   bool
		told string
	}{{"good", good, true, ": met"}, {"slow", slow, true, "NOT MET"}, {"big", big, true, "NOT MET"}, {"failed", failed, false, "NOT MET"}} {
		var b strings.Builder
		if ok := verdict(&b, []row{{Candidate: "overlayfs", OK: true}, c.r}); ok != c.ok || !strings.Contains(b.String(), c.told) {
			t.Errorf("%s: %v, %s", c.name, ok, b.String())
		}
	}
}

// TestMeasure plays every candidate with a small image, for the sake of the benchmark: figures are there and can be.
func TestMeasure(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	w, err := candidate.NewWorld(t.Context(), candidate.Options{Rig: rig.ForTest(t)})
	if errors.Is(err, rig.ErrNoNamespaces) || errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Busybox(t.Context(), rig.ImageDir(), image.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := measure(t.Context(), w, "busybox", img, options{runs: 1})
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != len(contestants) {
		t.Errorf("%d rows of %d candidates", len(rows), len(contestants))
	}
	for _, r := range rows {
		if !r.OK || r.Seconds <= 0 || r.ToOverlayfs <= 0 || r.PeakRSS < 10 || r.HelperRSS > r.PeakRSS {
			t.Errorf("figures that cannot be: %+v", r)
		}
		if helped := r.HelperRSS > 0; helped != (r.Candidate != "overlayfs") {
			t.Errorf("whose memory is that: %+v", r)
		}
	}
}
