package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// Snapshots is containerd's snapshotter interface over overlayfs, with lazily mounted layers.
// Close unmounts all lazy layers; they come back with the next OpenSnapshots.
type Snapshots struct {
	snapshots.Snapshotter
	fs   *lazy.FileSystem
	lock *os.File

	cancel    context.CancelFunc // ends the restore
	restored  chan struct{}
	closeOnce sync.Once
	closeErr  error
}

// OpenSnapshots opens the snapshotter whose state is in the folder root, making it
// if need be. layers may be nil: then every layer is unpacked. ErrInUse when another
// process has the folder.
//
// Lazy mounts of an earlier process are made again in the background; Restored tells when.
func OpenSnapshots(ctx context.Context, root string, layers lazy.Layers, log *slog.Logger) (_ *Snapshots, err error) {
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
	// From here on whatever is mounted below root was mounted by a daemon that is dead.
	dir := filepath.Join(root, "snapshots")
	if err := unmountBelow(dir, log); err != nil {
		return nil, err
	}
	points, err := lazyPoints(ctx, root, dir)
	if err != nil {
		return nil, err
	}
	userXattr, err := overlayutils.NeedsUserXAttr(root)
	if err != nil {
		log.Warn("cannot find out whether overlayfs needs userxattr; assuming it does not", "error", err)
	}
	fs, err := lazy.New(lazy.Options{Dir: filepath.Join(root, "chunks"), Layers: layers, Log: log, UserXattr: userXattr})
	if err != nil {
		return nil, err
	}
	// NoRestore: the library's own restore mounts one after another and, unless told to
	// leave broken mounts for somebody to clean up by hand, ends the start at the first failure.
	sn, err := snapshot.NewSnapshotter(ctx, root, fs, snapshot.NoRestore)
	if err != nil {
		fs.Close()
		return nil, fmt.Errorf("the snapshotter's state in %s cannot be opened: %w", root, err)
	}
	s := &Snapshots{Snapshotter: sn, fs: fs, lock: lock, restored: make(chan struct{})}
	rctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.restored)
		if len(points) == 0 {
			return
		}
		failed := fs.Restore(rctx, points)
		log.Info("lazy layers of the last run mounted again", "layers", len(points)-failed, "failed", failed)
	}()
	return s, nil
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

// unmountBelow unmounts what lies below dir in this mount namespace, innermost first.
func unmountBelow(dir string, log *slog.Logger) error {
	found, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		return !strings.HasPrefix(i.Mountpoint, dir+"/"), false
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
