package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// world is the network with the registry, in which one round after the other is played.
type world struct {
	rig      *rig.Rig
	network  *rig.Network
	registry *rig.Registry
	rate     rig.Rate // of every link
	secret   string   // the file with the cluster's secret
	stores   string   // a tmpfs
	pushed   map[string]blob
	rounds   int // so far: every one has daemons and folders of its own
	logs     bool
}

// blob is the one layer of an image in the registry.
type blob struct {
	ref, url string
	digest   digest.Digest
	size     int64
}

func newWorld(ctx context.Context, r *rig.Rig, nodes int, rate rig.Rate) (*world, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("needs root, for network namespaces and node daemons")
	}
	w := &world{rig: r, rate: rate, pushed: map[string]blob{}}
	var err error
	if w.network, err = r.NewNetwork(rig.NetworkOptions{Nodes: nodes, Rate: rate}); err != nil {
		return nil, err
	}
	if w.registry, err = r.StartRegistry(ctx, rig.RegistryOptions{Node: w.network.Registry()}); err != nil {
		return nil, err
	}
	if w.stores, err = r.Dir("n"); err != nil {
		return nil, err
	}
	// The rig unmounts it.
	if err := unix.Mount("tmpfs", w.stores, "tmpfs", 0, "mode=0755"); err != nil {
		return nil, fmt.Errorf("mount a tmpfs for the stores of the nodes: %w", err)
	}
	w.secret = filepath.Join(w.stores, "secret")
	return w, trust.NewSecret().Save(w.secret)
}

// blobs puts a scenario's images into the registry, unless they are there.
func (w *world) blobs(ctx context.Context, s *scenario) ([]blob, error) {
	var blobs []blob
	for i := range s.images {
		// Another size for each: random images of the same size are the same.
		b, err := w.push(ctx, s.size-int64(i)*512)
		if err != nil {
			return nil, err
		}
		blobs = append(blobs, b)
	}
	return blobs, nil
}

func (w *world) push(ctx context.Context, size int64) (blob, error) {
	name := fmt.Sprintf("random%d", size)
	if b, ok := w.pushed[name]; ok {
		return b, nil
	}
	img, err := image.Random(ctx, rig.ImageDir(), size, 1)
	if err != nil {
		return blob{}, err
	}
	to := image.Target{URL: w.registry.URL(), Client: w.registry.Client()}
	if err := img.Push(ctx, to, name, "1"); err != nil {
		return blob{}, err
	}
	layer := img.Layers[0]
	b := blob{
		ref: w.registry.Ref(name + ":1"), digest: layer.Digest, size: layer.Size,
		url: fmt.Sprintf("%s/v2/%s/blobs/%s", w.registry.URL(), name, layer.Digest),
	}
	w.pushed[name] = b
	return b, nil
}

// restore undoes what a scenario did to the world.
func (w *world) restore(ctx context.Context) error {
	// Stopping a stopped registry is no error, and afterwards Start has a registry without old connections.
	if err := w.registry.Stop(); err != nil {
		return err
	}
	return w.registry.Start(ctx)
}
