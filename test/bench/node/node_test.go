package main

import (
	"errors"
	"testing"
	"time"

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
