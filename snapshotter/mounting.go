package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
)

// The values of lazy.mount.
const (
	MountAuto  = "auto"  // the first of the others that works
	MountEROFS = "erofs" // as EROFS, by the kernel's own way to mount it from files
	MountLoop  = "loop"  // as EROFS, with loop devices between it and the files
	MountFUSE  = "fuse"  // a FUSE tree for each layer that has a table of contents
)

// Whose indexes are believed until all of a layer is there: of everybody who may publish beside an image and of the cluster's
// members, of members alone, or only the tables of contents that layers bring along.
const (
	BelieveAll     = "all"
	BelieveMembers = "members"
	BelieveOwn     = "own"
)

var believers = []string{BelieveAll, BelieveMembers, BelieveOwn}

var mountWays = []string{MountAuto, MountEROFS, MountLoop, MountFUSE}

// leastQuiet and mostQuiet are the bounds of lazy.quiet: less would be in the way of a start, more is
// as good as never.
const (
	leastQuiet = 100 * time.Millisecond
	mostQuiet  = 24 * time.Hour
)

const (
	// maxSocket is the longest path of the keeper's socket: sun_path of unix(7), less what it is called while it is made.
	maxSocket = 106
	// probeAge is when a probe counts as left behind; it takes some ten milliseconds.
	probeAge = time.Minute
)

// The arguments with which the daemon runs itself for its helper processes.
const (
	KeeperCommand  = "keeper"  // followed by the socket
	MounterCommand = "mounter" // reads from its standard input
)

// wayUnpack is the way of a node that mounts no layers: containerd unpacks them.
const wayUnpack = "unpack"

// chosen is how the layers of this node are mounted, and why that way.
type chosen struct{ way, why string }

// chooseMount finds the way to mount layers that lie in dir. self is the daemon's own program, socket will be the keeper's.
func chooseMount(want, dir, self, socket string) (chosen, error) {
	if want == MountFUSE {
		return chosen{MountFUSE, "lazy.mount says so"}, nil
	}
	if self == "" {
		return without(want, errors.New("this process cannot start helpers"))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return chosen{}, fmt.Errorf("the folder of the layers cannot be made: %w", err)
	}
	switch xattr, err := overlayutils.NeedsUserXAttr(dir); {
	case err == nil && xattr:
		return without(want, errors.New("overlayfs is mounted with userxattr here, for which layers would need other images"))
	case len(socket) > maxSocket:
		return without(want, fmt.Errorf("the keeper's socket %s has a path of more than %d bytes; set a shorter state", socket, maxSocket))
	}
	removeProbes(dir)
	if want == MountLoop {
		err := erofs.ProbeLoop(dir)
		switch {
		case noRoom(err):
			return formerly(dir, err)
		case err != nil:
			return without(want, err)
		}
		return chosen{MountLoop, "lazy.mount says so"}, nil
	}
	switch support, err := erofs.Probe(dir); {
	case support == erofs.None && noRoom(err):
		return formerly(dir, err)
	case support == erofs.FileBacked:
		return chosen{MountEROFS, "the kernel mounts it from files"}, nil
	case support == erofs.Loop && want == MountAuto:
		return chosen{MountLoop, err.Error()}, nil
	default:
		return without(want, err)
	}
}

// without is the choice where EROFS does not work in the way that is wanted.
func without(want string, why error) (chosen, error) {
	if want == MountAuto {
		return chosen{MountFUSE, why.Error()}, nil
	}
	return chosen{}, fmt.Errorf("lazy.mount = %q does not work: %w", want, why)
}

// noRoom tells that a probe found out nothing of the kernel; another way would be the end of what is mounted.
func noRoom(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// formerly is how layers that lie in dir were mounted by a former daemon: the way when there is no room to try any.
func formerly(dir string, why error) (chosen, error) {
	here, err := filepath.Glob(filepath.Join(dir, "layers", "*", "meta.erofs"))
	if err != nil || len(here) == 0 {
		return chosen{}, fmt.Errorf("how layers can be mounted cannot be found out; make room: %w", why)
	}
	loops, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		ours := i.FSType == "erofs" && strings.HasPrefix(i.Mountpoint, filepath.Dir(dir)+"/")
		return !ours || !strings.HasPrefix(i.Source, "/dev/loop"), false
	})
	if err != nil {
		return chosen{}, fmt.Errorf("the mounts of this system cannot be listed: %w", err)
	}
	way := MountEROFS
	if len(loops) > 0 {
		way = MountLoop
	}
	return chosen{way, "as before, there is no room to try: " + why.Error()}, nil
}

// removeProbes clears away what a daemon left that was killed while it probed.
func removeProbes(dir string) {
	left, _ := filepath.Glob(filepath.Join(dir, "erofs-probe-*"))
	for _, path := range left {
		// One that is younger may be another daemon's that is about to find out that it is the second. One of the future is
		// from before the clock was set back.
		i, err := os.Lstat(path)
		if err != nil {
			continue
		}
		if age := time.Since(i.ModTime()); age >= 0 && age < probeAge {
			continue
		}
		for _, sub := range []string{"overlay", "mnt"} {
			_ = unix.Unmount(filepath.Join(path, sub), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		_ = os.RemoveAll(path)
	}
}

// mounting makes the way of cfg.
func mounting(cfg Config, deps Deps) (Mounting, chosen, error) {
	root := filepath.Join(cfg.Root, "snapshotter")
	socket := filepath.Join(cfg.State, "keeper.sock")
	layers := filepath.Join(cfg.Root, "layers")
	abandon := func(ctx context.Context) error { return layerfs.Abandon(ctx, root, socket) }
	if !cfg.Snapshotter.Lazy || deps.Layers == nil {
		return Mounting{First: abandon}, chosen{wayUnpack, "snapshotter.lazy is off"}, nil
	}
	c, err := chooseMount(cfg.Lazy.Mount, layers, deps.Self, socket)
	if err != nil {
		return Mounting{}, c, err
	}
	if c.way == MountFUSE {
		return Mounting{Layers: deps.Layers, First: abandon}, c, nil
	}
	beside, err := fdStore()
	if err != nil {
		deps.Log.Warn("systemd's store of open files is not used", "error", err)
	}
	return Mounting{EROFS: &layerfs.Options{
		Beside: beside,
		Store:  layers, State: root, Source: deps.Layers, Quota: int64(cfg.Lazy.Quota), Loop: c.way == MountLoop,
		NoPublished: cfg.Lazy.Believe != BelieveAll, NoMembers: cfg.Lazy.Believe == BelieveOwn,
		Quiet: time.Duration(cfg.Lazy.Quiet), Log: deps.Log, Socket: socket,
		Keeper: []string{deps.Self, KeeperCommand, socket}, Mounter: []string{deps.Self, MounterCommand},
	}}, c, nil
}

// fdStore is systemd's store of open files, nil when systemd did not start this process. Whether it has room for this unit only
// shows when the next daemon gets its files, or not: since version 254 FDSTORE says so, which is younger than what many run.
func fdStore() (keeper.Store, error) {
	s, err := keeper.NewSystemd()
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Release unmounts all layers of a node whose daemon does not run, and ends the keeper: what is to be
// done before the node is without docker quay.
func Release(ctx context.Context, cfg Config, log *slog.Logger) error {
	root := filepath.Join(cfg.Root, "snapshotter")
	if _, err := os.Stat(root); errors.Is(err, os.ErrNotExist) {
		return nil // no daemon ever ran here
	}
	lock, err := lockDir(root)
	if err != nil {
		return err
	}
	defer lock.Close()
	// First the connection: an EROFS waits at its end for reads that nobody answers any more.
	if err := layerfs.Abandon(ctx, root, filepath.Join(cfg.State, "keeper.sock")); err != nil {
		return err
	}
	return unmountBelow(filepath.Join(root, "snapshots"), nil, log)
}
