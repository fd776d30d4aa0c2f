package candidate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"
)

// Mounted is the files of a pulled image, as a container sees them, to read.
type Mounted struct {
	Dir string
	// On are the kinds of file system that the layers lie on, below overlayfs: ext4, erofs, fuse.
	On string

	unmount func() error
}

// Read opens and reads every file, one after the other, and returns how many bytes that were.
func (m *Mounted) Read() (n int64, err error) { return ReadAll(m.Dir) }

// ReadAll opens and reads every file below a folder, one after the other, and returns how many bytes that were.
func ReadAll(dir string) (n int64, err error) {
	buf := make([]byte, 1<<20) // more than any file system reads ahead
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		got, err := readFile(path, buf)
		n += got
		return err
	})
	return n, err
}

func readFile(path string, buf []byte) (n int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for {
		got, err := f.Read(buf)
		n += int64(got)
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// Close unmounts it.
func (m *Mounted) Close() error { return m.unmount() }

// Mount mounts the files of a pulled image read-only. The name is unique on the machine.
func (m *Machine) Mount(ctx context.Context, ref, name string) (_ *Mounted, err error) {
	ctx = namespaces.WithNamespace(ctx, namespaces.Default)
	img, err := m.client.GetImage(ctx, ref)
	if err != nil {
		return nil, err
	}
	ids, err := img.RootFS(ctx)
	if err != nil {
		return nil, err
	}
	// Without a lease the garbage collector takes what no container names.
	ctx, release, err := m.client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	sn := m.client.SnapshotService(m.snapshotter)
	mounts, err := sn.View(ctx, name, identity.ChainID(ids).String())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s on %s: %w", ref, m.name, err), release(ctx))
	}
	remove := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeWithin)
		defer cancel()
		return errors.Join(sn.Remove(ctx, name), release(ctx))
	}
	dir := filepath.Join(m.dir, "mnt-"+name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, errors.Join(err, remove())
	}
	if err := mount.All(mounts, dir); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s on %s: %w", ref, m.name, err), remove())
	}
	on, err := kinds(mounts)
	unmount := func() error {
		return errors.Join(mount.UnmountAll(dir, 0), os.Remove(dir), remove())
	}
	if err != nil {
		return nil, errors.Join(err, unmount())
	}
	return &Mounted{Dir: dir, On: on, unmount: unmount}, nil
}

// kinds are the kinds of file system below a mount, each once.
func kinds(mounts []mount.Mount) (string, error) {
	var names []string
	for _, m := range mounts {
		lowers := []string{m.Source}
		for _, o := range m.Options {
			if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
				lowers = strings.Split(dirs, ":")
			}
		}
		for _, lower := range lowers {
			var st unix.Statfs_t
			if err := unix.Statfs(lower, &st); err != nil {
				return "", fmt.Errorf("find out what %s lies on: %w", lower, err)
			}
			name, ok := map[int64]string{
				unix.EXT4_SUPER_MAGIC: "ext4", unix.EROFS_SUPER_MAGIC_V1: "erofs", unix.FUSE_SUPER_MAGIC: "fuse",
				unix.XFS_SUPER_MAGIC: "xfs", unix.TMPFS_MAGIC: "tmpfs",
			}[int64(st.Type)]
			if !ok {
				name = fmt.Sprintf("%#x", st.Type)
			}
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), "+"), nil
}
