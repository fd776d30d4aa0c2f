package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

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

// TestVerdict: what is asked of docker quay is told for its own rows, and a row that is not ok fails the benchmark.
func TestVerdict(t *testing.T) {
	const rate = 80 * rig.Mbit // 10^7 bytes a second
	rows := []row{
		{Candidate: "overlayfs", First: 10, OK: true}, {Candidate: "stargz", First: 4, OK: true},
		{Candidate: "quay-first", First: 2, Read: 100, Fetched: 130, OK: true},
		{Candidate: "quay-second", First: 1, Read: 1e7, OK: true}, {Candidate: "quay-eager", First: 9, OK: true},
	}
	told := func() (string, bool) {
		var b strings.Builder
		compare(rows)
		ok := verdict(&b, rows, rate)
		return b.String(), ok
	}
	if said, ok := told(); !ok || strings.Contains(said, "NOT MET") || strings.Count(said, "\n") != 4 {
		t.Errorf("all is well: %v\n%s", ok, said)
	}
	rows[2].First, rows[3].First = 2.5, 1.6
	if said, ok := told(); !ok || strings.Count(said, "NOT MET") != 2 {
		t.Errorf("slow: %v\n%s", ok, said)
	}
	rows[2].First, rows[0].OK = 1, false
	if said, ok := told(); ok || strings.Count(said, "NOT MET") != 2 || rows[2].ToOverlayfs != 0 {
		t.Errorf("nothing to compare with: %v\n%s", ok, said)
	}
}

// TestMeasure plays every candidate with a small image, for the sake of the benchmark: figures are there and can be.
func TestMeasure(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	w, err := candidate.NewWorld(t.Context(), candidate.Options{Rig: rig.ForTest(t), Nodes: nodes, Rate: 400 * rig.Mbit, RoundTrip: 10 * time.Millisecond})
	if errors.Is(err, rig.ErrNoNamespaces) || errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	rows, err := measure(t.Context(), w, program{
		name: "busybox", first: image.First{Line: "hello from busybox"},
		make: func(ctx context.Context, f image.Format) (*image.Image, error) {
			return image.Busybox(ctx, rig.ImageDir(), f)
		},
	}, options{runs: 1, mbit: 400, roundTrip: 10 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != len(contestants) {
		t.Errorf("%d rows of %d candidates", len(rows), len(contestants))
	}
	for _, r := range rows {
		if !r.OK || r.Runs != 1 || r.Pull <= 0 || r.First <= r.Pull || r.ToOverlayfs <= 0 || r.ToStargz <= 0 {
			t.Errorf("figures that cannot be: %+v", r)
		}
		// A shell and its script.
		if r.Read < 200<<10 || r.Read > 2<<20 || r.ReadPacked >= r.Read || r.Fetched <= 0 {
			t.Errorf("bytes that cannot be: %+v", r)
		}
		if r.Candidate == "overlayfs" && r.Fetched < r.ImageBytes {
			t.Errorf("less than the image was enough: %+v", r)
		}
	}
}
