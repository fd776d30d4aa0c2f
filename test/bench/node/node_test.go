package main

import (
	"errors"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestMain(m *testing.M) {
	bench.Init()
	m.Run()
}

// TestMeasure plays one image on two nodes, for the sake of the benchmark: every figure is there and can be.
func TestMeasure(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	r := rig.ForTest(t)
	network, err := r.NewNetwork(rig.NetworkOptions{Nodes: 2})
	if errors.Is(err, rig.ErrNoNamespaces) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	registry, err := r.StartRegistry(t.Context(), rig.RegistryOptions{Node: network.Registry()})
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err := measure(t.Context(), r, network, registry, load{blobs: layersOf, settle: time.Second, rest: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if !got.OK || got.Blobs != layersOf {
		t.Errorf("not ok: %+v", got)
	}
	if got.RSS < 5 || got.RSSStart < 5 || got.RSSPeak < got.RSS || got.CPU < 0 || got.CPU > 300 {
		t.Errorf("memory or CPU that cannot be: %+v", got)
	}
	if got.Start <= 0 || got.Serving <= got.Start || got.Goroutines < 5 || got.FDs < 5 {
		t.Errorf("figures that cannot be: %+v", got)
	}
}

// TestMeasureLayers mounts two images of few layers, for the sake of the benchmark.
func TestMeasureLayers(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	if support, err := erofs.Probe(t.TempDir()); support == erofs.None {
		t.Skip(err)
	}
	r := rig.ForTest(t)
	got, err := measureLayers(t.Context(), r, 2, 5, load{settle: time.Second, rest: time.Second})
	if errors.Is(err, rig.ErrNoNamespaces) || errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !got.OK || got.Layers != 10 || got.Blobs != 0 {
		t.Errorf("not ok: %+v", got)
	}
	// Two processes of a Go program at least, which are more than 3 MB each.
	if got.RSS < 5 || got.Helpers < 6 || got.Helpers > 200 || got.RSSPeak < got.RSS || got.RSSStart < 5 {
		t.Errorf("memory that cannot be: %+v", got)
	}
	if got.Start <= 0 || got.Serving <= got.Start || got.Goroutines < 5 || got.FDs < 10 {
		t.Errorf("figures that cannot be: %+v", got)
	}
}
