package candidate

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// Candidate is a way for containerd to get the files of an image.
type Candidate interface {
	// Format is that of the layers of the images that are made for it.
	Format() image.Format
	// start starts what containerd needs beside itself, and tells containerd's options about it.
	start(ctx context.Context, m *Machine, peers []*Machine, o *rig.ContainerdOptions) error
}

// snapshotter is what containerd calls whatever snapshotter it has beside its own (see rig.ContainerdOptions).
const snapshotter = "quay"

type overlayfs struct{}

// Overlayfs is containerd alone.
func Overlayfs() Candidate { return overlayfs{} }

func (overlayfs) Format() image.Format { return image.Gzip }

func (overlayfs) start(context.Context, *Machine, []*Machine, *rig.ContainerdOptions) error {
	return nil
}

type stargz struct{}

// Stargz is the stargz project's snapshotter with its defaults.
func Stargz() Candidate { return stargz{} }

func (stargz) Format() image.Format { return image.EStargz }

func (stargz) start(ctx context.Context, m *Machine, _ []*Machine, o *rig.ContainerdOptions) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	o.SnapshotterRoot, o.Snapshotter = filepath.Join(m.dir, "root"), filepath.Join(m.dir, "sn.sock")
	m.helper, err = m.world.rig.Start(ctx, rig.Command{
		Name: m.name + "-stargz", Path: self, Args: []string{stargzArgument, o.SnapshotterRoot, o.Snapshotter}, Node: m.node,
		Ready: func(ctx context.Context) error { return answers(ctx, o.Snapshotter) },
	})
	return err
}

// Quay says how docker quay's node daemon is set up.
type Quay struct {
	// Lazy lets layers be mounted before they are there.
	Lazy bool
	// Layers is the format of the layers. The zero value is plain gzip, what most images have.
	Layers image.Format
	// Config is added to the daemon's configuration.
	Config string
}

// Format is that of the layers.
func (q Quay) Format() image.Format { return q.Layers }

func (q Quay) start(ctx context.Context, m *Machine, peers []*Machine, o *rig.ContainerdOptions) error {
	// A machine without peers is alone in its cluster: one that was here before may still be called by its former peers.
	m.secret = filepath.Join(m.dir, "secret")
	var others []*rig.Node
	for _, p := range peers {
		m.secret = p.secret
		others = append(others, p.node)
	}
	if len(peers) == 0 {
		if err := trust.NewSecret().Save(m.secret); err != nil {
			return err
		}
	}
	d, err := daemon.Start(ctx, daemon.Options{
		Rig: m.world.rig, Name: m.name + "-quay", Dir: m.dir, Node: m.node, Secret: m.secret, Peers: others,
		Config: q.Config, SnapshotterConfig: fmt.Sprintf("lazy = %t", q.Lazy),
	})
	if err != nil {
		return err
	}
	// The daemon's folder of registries, which it reads when it first asks one.
	if err := m.world.writeHosts(d.CertsDir); err != nil {
		return err
	}
	m.helper, m.quay = d.Process, d
	o.Snapshotter, o.SnapshotterRoot = d.Snapshotter, d.Root
	return nil
}
