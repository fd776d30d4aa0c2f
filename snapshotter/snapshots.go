package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

const (
	// targetLabel names the snapshot that a Prepare is to bring about; containerd
	// sets it when it would rather not unpack the layer.
	targetLabel = "containerd.io/snapshot.ref"

	// remoteLabel is how package snapshot marks the snapshots that FileSystem mounted.
	remoteLabel = "containerd.io/snapshot/remote"
)

// ErrInUse says that another daemon works on the same folder or socket.
var ErrInUse = errors.New("in use by another daemon")

// layerMounts is what mounts layers: packages lazy and layerfs.
type layerMounts interface {
	snapshot.FileSystem
	Restore(ctx context.Context, points []lazy.Mountpoint) (failed int)
	Close() error
}

var (
	_ layerMounts = (*lazy.FileSystem)(nil)
	_ layerMounts = (*layerfs.FileSystem)(nil)
)

// Mounting is how layers are mounted.
type Mounting struct {
	// EROFS is by the kernel's own file system; Store, State and Source are set by the caller. Mounts
	// outlive Close.
	EROFS *layerfs.Options
	// Layers are mounted by a FUSE tree when EROFS is nil, and unmounted by Close. nil: every layer is
	// unpacked by containerd.
	Layers lazy.Layers
	// First is called when the folder is this process's and nothing is mounted yet; nil is nothing. It
	// ends what a daemon that mounted in another way has left.
	First func(context.Context) error
}

// Snapshots is containerd's snapshotter interface over overlayfs, with lazily mounted layers.
// What Close does with their mounts is a matter of Mounting.
type Snapshots struct {
	snapshots.Snapshotter
	fs     layerMounts
	layers *layerfs.FileSystem // fs, when that is what it is
	trees  *lazy.FileSystem    // the same
	lock   *os.File

	cancel    context.CancelFunc // ends the restore
	restored  chan struct{}
	closeOnce sync.Once
	closeErr  error
}

// OpenSnapshots opens the snapshotter whose state is in the folder root, making it
// if need be. ErrInUse when another process has the folder.
//
// Mounts of an earlier process are taken over or made again in the background; Restored tells when.
func OpenSnapshots(ctx context.Context, root string, how Mounting, log *slog.Logger) (_ *Snapshots, err error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("the snapshotter's folder cannot be made: %w", err)
	}
	lock, err := lockDir(root)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			lock.Close()
		}
	}()
	if how.First != nil {
		if err := how.First(ctx); err != nil {
			return nil, err
		}
	}
	dir := filepath.Join(root, "snapshots")
	points, err := lazyPoints(ctx, root, dir)
	if err != nil {
		return nil, err
	}
	s := &Snapshots{lock: lock, restored: make(chan struct{})}
	// What is mounted below root and is not taken over was mounted by a daemon that is dead.
	if how.EROFS != nil {
		s.fs, err = s.openLayers(ctx, dir, *how.EROFS, points, log)
	} else if err = unmountBelow(dir, nil, log); err == nil {
		s.trees, err = openTrees(root, how.Layers, log)
		s.fs = s.trees
	}
	if err != nil {
		return nil, err
	}
	// NoRestore: the library's own restore mounts one after another and, unless told to
	// leave broken mounts for somebody to clean up by hand, ends the start at the first failure.
	s.Snapshotter, err = snapshot.NewSnapshotter(ctx, root, s.fs, snapshot.NoRestore)
	if err != nil {
		s.fs.Close()
		return nil, fmt.Errorf("the snapshotter's state in %s cannot be opened: %w", root, err)
	}
	rctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.restored)
		failed := s.fs.Restore(rctx, points)
		if len(points) > 0 {
			log.Info("lazy layers of the last run mounted again", "layers", len(points)-failed, "failed", failed)
		}
	}()
	return s, nil
}

// openTrees makes the file system of FUSE trees.
func openTrees(root string, layers lazy.Layers, log *slog.Logger) (*lazy.FileSystem, error) {
	userXattr, err := overlayutils.NeedsUserXAttr(root)
	if err != nil {
		log.Warn("cannot find out whether overlayfs needs userxattr; assuming it does not", "error", err)
	}
	return lazy.New(lazy.Options{Dir: filepath.Join(root, "chunks"), Layers: layers, Log: log, UserXattr: userXattr})
}

// openLayers makes that of EROFS mounts.
func (s *Snapshots) openLayers(ctx context.Context, dir string, o layerfs.Options, points []lazy.Mountpoint, log *slog.Logger) (layerMounts, error) {
	f, err := layerfs.New(ctx, o)
	if errors.Is(err, layerstore.ErrLocked) {
		err = fmt.Errorf("%w: %w", ErrInUse, err)
	}
	if err != nil {
		return nil, err
	}
	ours := make(map[string]bool, len(points))
	for _, p := range points {
		ours[p.Path] = true
	}
	if err := unmountBelow(dir, func(at string) bool { return ours[at] && f.Lives(at) }, log); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	s.layers = f
	return f, nil
}

// Restored is closed when every lazy mount of the last run was tried once.
func (s *Snapshots) Restored() <-chan struct{} { return s.restored }

// Prepare implements snapshots.Snapshotter.
//
// When the target of a remote snapshot was committed by somebody else at the same time, the
// library answers, rightly, that it exists already, but leaves the key and its mount
// behind; here they are removed.
func (s *Snapshots) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var base snapshots.Info
	for _, o := range opts {
		if err := o(&base); err != nil {
			return nil, err
		}
	}
	target := base.Labels[targetLabel]
	if target == "" {
		return s.Snapshotter.Prepare(ctx, key, parent, opts...)
	}
	if _, err := s.Stat(ctx, key); err == nil {
		return s.Snapshotter.Prepare(ctx, key, parent, opts...) // fails; the key is its owner's to remove
	}
	if s.layers != nil {
		// Here and not in Mount, during which the library has a transaction open. When the layer does
		// not come, containerd unpacks it.
		b, err := s.layers.Bring(ctx, base.Labels)
		if err == nil {
			defer b.Close()
			if b.Implicit() && parent != "" {
				ctx, err = s.withParents(ctx, key, parent)
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil:
			return s.Snapshotter.Prepare(ctx, key, parent, append(opts, withoutTarget)...)
		}
	} else if parent != "" {
		ctx = lazy.OnOthers(ctx)
	}
	m, err := s.Snapshotter.Prepare(ctx, key, parent, opts...)
	if !errdefs.IsAlreadyExists(err) {
		return m, err
	}
	if _, serr := s.Stat(ctx, target); serr == nil {
		if rerr := s.Remove(ctx, key); rerr != nil && !errdefs.IsNotFound(rerr) {
			return nil, rerr
		}
	}
	return nil, err
}

// withParents tells the file system where the layers below are, by what a view of them would be mounted from.
func (s *Snapshots) withParents(ctx context.Context, key, parent string) (context.Context, error) {
	view := "parents of " + key
	m, err := s.Snapshotter.View(ctx, view, parent)
	if err != nil {
		return ctx, err
	}
	if err := s.Snapshotter.Remove(ctx, view); err != nil {
		return ctx, err
	}
	if len(m) != 1 {
		return ctx, fmt.Errorf("a view of %s has %d mounts", parent, len(m))
	}
	parents := []string{m[0].Source} // a bind mount, of one layer
	for _, o := range m[0].Options {
		if lowers, ok := strings.CutPrefix(o, "lowerdir="); ok {
			parents = strings.Split(lowers, ":")
		}
	}
	return layerfs.WithParents(ctx, parents), nil
}

// withoutTarget has a layer unpacked by containerd.
func withoutTarget(i *snapshots.Info) error {
	i.Labels = maps.Clone(i.Labels) // the caller's
	delete(i.Labels, targetLabel)
	return nil
}

// Usage implements snapshots.Snapshotter. A layer that is mounted takes what it has in the layer store,
// which images share.
func (s *Snapshots) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	u, err := s.Snapshotter.Usage(ctx, key)
	if err != nil || s.layers == nil {
		return u, err
	}
	info, err := s.Stat(ctx, key)
	if err != nil || info.Labels[remoteLabel] == "" {
		return u, err
	}
	if t, err := lazy.ParseLabels(info.Labels); err == nil {
		u.Size += s.layers.Usage(t.Layer)
	}
	return u, nil
}

// Cleanup implements snapshots.Cleaner.
func (s *Snapshots) Cleanup(ctx context.Context) error {
	if c, ok := s.Snapshotter.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}

// Close implements snapshots.Snapshotter. It may be called more than once.
func (s *Snapshots) Close() error {
	s.closeOnce.Do(func() {
		s.cancel()
		<-s.restored
		// The file system first: it unmounts everything within one deadline, where the
		// library would wait for each mount that is in use.
		s.closeErr = errors.Join(s.fs.Close(), s.Snapshotter.Close(), s.lock.Close())
	})
	return s.closeErr
}

// lockDir takes the folder for this process, until the file is closed.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the snapshotter's folder cannot be locked: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s is %w; stop that one, or set another root", dir, ErrInUse)
		}
		return nil, fmt.Errorf("the snapshotter's folder cannot be locked: %w", err)
	}
	return f, nil
}

// unmountBelow unmounts what lies below dir in this mount namespace, innermost first, but for
// what keep wants.
func unmountBelow(dir string, keep func(at string) bool, log *slog.Logger) error {
	found, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(i.Mountpoint, dir+"/") || keep != nil && keep(i.Mountpoint), false
	})
	if err != nil {
		return fmt.Errorf("the mounts of this system cannot be listed: %w", err)
	}
	for i := len(found) - 1; i >= 0; i-- {
		at := found[i].Mountpoint
		// Detached, as a dead FUSE mount may be in use by a container and is of no use to anybody else.
		if err := unix.Unmount(at, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			log.Warn("a mount left by the last run cannot be unmounted", "mountpoint", at, "error", err)
		}
	}
	return nil
}

// lazyPoints reads from the snapshotter's database which snapshots were mounted lazily.
func lazyPoints(ctx context.Context, root, dir string) ([]lazy.Mountpoint, error) {
	db := filepath.Join(root, "metadata.db")
	if _, err := os.Stat(db); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	ms, err := storage.NewMetaStore(db)
	if err != nil {
		return nil, fmt.Errorf("the snapshotter's database cannot be opened: %w", err)
	}
	defer ms.Close()
	var points []lazy.Mountpoint
	ctx, tx, err := ms.TransactionContext(ctx, false)
	if err != nil {
		return nil, fmt.Errorf("the snapshotter's database cannot be read; if it is damaged, move %s away and let containerd pull again: %w", root, err)
	}
	defer tx.Rollback()
	err = storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
		if _, ok := info.Labels[remoteLabel]; !ok {
			return nil
		}
		id, _, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		points = append(points, lazy.Mountpoint{Path: filepath.Join(dir, id, "fs"), Labels: info.Labels})
		return nil
	})
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("the snapshotter's database cannot be read; if it is damaged, move %s away and let containerd pull again: %w", root, err)
	}
	return points, nil
}
