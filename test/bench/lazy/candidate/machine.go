package candidate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	transferimage "github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/platforms"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/rig"
)

// Machine is a node with a containerd.
type Machine struct {
	world       *World
	name        string
	dir         string // what the candidate has beside containerd
	certs       string // certs.d root
	secret      string // the file with its cluster's secret
	node        *rig.Node
	containerd  *rig.Containerd
	client      *containerd.Client
	snapshotter string // "" is overlayfs
	helper      *rig.Process
	quay        *daemon.Daemon // nil unless the candidate is Quay
}

// Start starts a machine without anything in it on a node of the world, counted from 1. Peers are others of docker quay, which it
// knows when it is returned.
func (w *World) Start(ctx context.Context, c Candidate, node int, peers ...*Machine) (*Machine, error) {
	w.machines++
	m := &Machine{world: w, name: fmt.Sprintf("%sm%d", w.name, w.machines), node: w.network.Node(node)}
	if err := m.start(ctx, c, peers); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", m.name, err), m.Close())
	}
	return m, nil
}

func (m *Machine) start(ctx context.Context, c Candidate, peers []*Machine) (err error) {
	if m.dir, err = m.world.rig.Dir(m.name); err != nil {
		return err
	}
	m.certs = filepath.Join(m.dir, "certs")
	if err := m.world.writeHosts(m.certs); err != nil {
		return err
	}
	o := rig.ContainerdOptions{Node: m.node}
	if err := c.start(ctx, m, peers, &o); err != nil {
		return err
	}
	if o.Snapshotter != "" {
		m.snapshotter = snapshotter
	} else {
		m.snapshotter = "overlayfs"
	}
	if m.containerd, err = m.world.rig.StartContainerd(ctx, o); err != nil {
		return err
	}
	if m.client, err = m.containerd.Client(""); err != nil {
		return err
	}
	if m.quay != nil && len(peers) > 0 {
		return m.quay.Knows(ctx, len(peers))
	}
	return nil
}

// Pull has containerd's transfer service pull an image and make it ready to run.
func (m *Machine) Pull(ctx context.Context, ref string) error {
	from, err := registry.NewOCIRegistry(ctx, ref, registry.WithHostDir(m.certs))
	if err != nil {
		return err
	}
	here := platforms.DefaultSpec()
	to := transferimage.NewStore(ref, transferimage.WithPlatforms(here), transferimage.WithUnpack(here, m.snapshotter))
	if err := m.client.Transfer(ctx, from, to); err != nil {
		return fmt.Errorf("pull %s with %s: %w", ref, m.snapshotter, err)
	}
	return nil
}

// Forget removes an image and everything of it that containerd has, and returns when that is done.
func (m *Machine) Forget(ctx context.Context, ref string) error {
	if err := m.client.ImageService().Delete(ctx, ref); err != nil {
		return fmt.Errorf("remove %s: %w", ref, err)
	}
	return m.containerd.CleanUnused(ctx, "")
}

// Received is how many bytes the machine's link has brought, headers included; without a link what went over loopback. Unlike rig.Node.Traffic it starts no program:
// it is asked in the middle of things.
func (m *Machine) Received() (n int64, err error) {
	err = m.node.Do(func() error {
		raw, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return fmt.Errorf("read the byte counters of %s: %w", m.name, err)
		}
		for line := range strings.Lines(string(raw)) {
			if name, counts, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && name == m.world.link {
				if fields := strings.Fields(counts); len(fields) > 0 {
					n, err = strconv.ParseInt(fields[0], 10, 64)
					return err
				}
			}
		}
		return fmt.Errorf("read the byte counters of %s: there is no %s in %q", m.name, m.world.link, raw)
	})
	return n, err
}

// closeWithin bounds what containerd is asked for while the machine is taken down.
const closeWithin = 20 * time.Second

// Close ends everything on the machine and removes what it has on disk.
func (m *Machine) Close() error {
	var errs []error
	var dirs []string
	if m.client != nil {
		errs = append(errs, m.client.Close())
	}
	if m.containerd != nil {
		errs = append(errs, m.containerd.Stop())
		dirs = append(dirs, filepath.Dir(m.containerd.Root()))
	}
	switch {
	case m.quay != nil:
		errs = append(errs, m.helper.Stop())
	case m.helper != nil:
		// How somebody else's daemon ends is not the question; it was seen to take longer than Stop waits.
		errs = append(errs, m.helper.Kill9())
	}
	if m.dir != "" {
		// What outlives its daemon on purpose.
		for _, pid := range processesUnder(m.dir) {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, fmt.Errorf("end process %d of %s: %w", pid, m.name, err))
			}
		}
		dirs = append(dirs, m.dir)
	}
	for _, dir := range dirs {
		errs = append(errs, unmountUnder(dir), os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// processesUnder are those with a file below dir on their command line.
func processesUnder(dir string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if line, err := os.ReadFile("/proc/" + e.Name() + "/cmdline"); err == nil && strings.Contains(string(line), dir+"/") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// unmountUnder unmounts what is mounted below dir, newest first, also what is still in use or whose server is gone.
func unmountUnder(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list the mounts below %s: %w", dir, err)
	}
	var errs []error
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}

// answers reports whether somebody listens on a unix socket.
func answers(ctx context.Context, socket string) error {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", socket)
	if err == nil {
		err = c.Close()
	}
	return err
}
