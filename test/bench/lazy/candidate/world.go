package candidate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// Options describe a world.
type Options struct {
	Rig *rig.Rig
	// Name tells the worlds of a rig apart. Short: paths of sockets begin with it.
	Name string
	// Nodes are so many machines with links of Rate (0: unlimited), one of which the registry has as well. 0: one machine, with the
	// registry on it.
	Nodes int
	Rate  rig.Rate
	// RoundTrip is how far away the registry is. Machines are at no distance from each other.
	RoundTrip time.Duration
}

// World is a registry and the links to it.
type World struct {
	rig      *rig.Rig
	name     string
	link     string // the interface that brings what machines fetch
	network  *rig.Network
	registry *rig.Registry
	address  string // of the registry, for machines
	machines int    // so far
}

// NewWorld makes the links and starts the registry. The rig takes them down.
func NewWorld(ctx context.Context, o Options) (*World, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("needs root, for network namespaces, mounts and containers")
	}
	w := &World{rig: o.Rig, name: o.Name, link: "eth0"}
	var err error
	if w.network, err = o.Rig.NewNetwork(rig.NetworkOptions{Nodes: max(o.Nodes, 1), Rate: o.Rate}); err != nil {
		return nil, err
	}
	place := w.network.Registry()
	if o.Nodes == 0 {
		place = w.network.Node(1)
	}
	if w.registry, err = o.Rig.StartRegistry(ctx, rig.RegistryOptions{Node: place}); err != nil {
		return nil, err
	}
	switch {
	case o.Nodes == 0:
		// The counting proxy before it would take as much CPU as the registry.
		w.address, w.link = w.registry.Direct(), "lo"
	case o.RoundTrip > 0:
		d, err := newDelay(place, w.registry.Addr(), o.RoundTrip)
		if err != nil {
			return nil, fmt.Errorf("put distance before the registry: %w", err)
		}
		o.Rig.Cleanup(d.close)
		w.address = d.addr()
	default:
		w.address = w.registry.Addr()
	}
	return w, nil
}

// Push puts an image into the registry and returns its name for machines.
func (w *World) Push(ctx context.Context, img *image.Image, repository, tag string) (string, error) {
	to := image.Target{URL: w.registry.URL(), Client: w.registry.Client()}
	return w.Ref(repository, tag), img.Push(ctx, to, repository, tag)
}

// Ref is the name of a pushed image for machines.
func (w *World) Ref(repository, tag string) string { return w.address + "/" + repository + ":" + tag }

// ErrNoIndexer says that this docker quay cannot publish indexes of layers.
var ErrNoIndexer = errors.New("docker quay cannot publish indexes of layers")

// Publish has docker quay publish the indexes of a pushed image's layers beside it, from the registry's own node: no link carries
// what that takes.
func (w *World) Publish(ctx context.Context, repository, tag string) error {
	err := w.index(ctx, w.place(), w.registry.WriteHosts, "--no-daemon", w.registry.Ref(repository+":"+tag))
	if err != nil && (strings.Contains(err.Error(), "unknown command") || strings.Contains(err.Error(), "is not a docker command")) {
		return fmt.Errorf("%w: %w", ErrNoIndexer, err)
	}
	return err
}

// Publish does the same from a machine that has run the image, with what its container read first.
func (m *Machine) Publish(ctx context.Context, ref string) error {
	return m.world.index(ctx, m.node, m.world.writeHosts, "--socket", m.quay.Socket, ref)
}

// index runs `docker quay index` on a node.
func (w *World) index(ctx context.Context, n *rig.Node, hosts func(root string) error, args ...string) error {
	home, err := w.rig.Dir("publisher")
	if err != nil {
		return err
	}
	if err := hosts(filepath.Join(home, ".config", "quay", "certs.d")); err != nil {
		return err
	}
	env := []string{
		"HOME=" + home, "DOCKER_CONFIG=" + filepath.Join(home, ".docker"), "DOCKER_CONTEXT=",
		"DOCKER_HOST=unix://" + filepath.Join(home, "no-engine.sock"), "XDG_CONFIG_HOME=", "XDG_CACHE_HOME=",
	}
	_, err = n.Run(ctx, env, "docker-quay", append([]string{"index"}, args...)...)
	return err
}

// place is the registry's node.
func (w *World) place() *rig.Node {
	if w.link == "lo" {
		return w.network.Node(1)
	}
	return w.network.Registry()
}

// writeHosts tells who reads a certs.d root that the registry speaks plain HTTP.
func (w *World) writeHosts(root string) error {
	dir := filepath.Join(root, w.address)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the registry's hosts.toml: %w", err)
	}
	hosts := fmt.Sprintf("server = %q\n\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", "http://"+w.address, "http://"+w.address)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		return fmt.Errorf("write the registry's hosts.toml: %w", err)
	}
	return nil
}
