package candidate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/image"
)

// Touched is what a program needs of its image until its first useful output.
type Touched struct {
	Read int64 // bytes of files, in whole pages
	All  int64 // bytes of all files of the image
}

// Touched runs an image once with containerd alone, from a disk whose cache is empty and which reads nothing ahead, and counts the
// pages of the image's files that are in the cache then. Folders, links and attributes are not counted: they are no file's bytes.
func (w *World) Touched(ctx context.Context, node int, ref string, first image.First) (t Touched, err error) {
	m, err := w.Start(ctx, Overlayfs(), node)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	root := m.containerd.Root()
	disk := filepath.Join(m.dir, "disk")
	if err := makeDisk(ctx, disk); err != nil {
		return t, err
	}
	if err := m.remount(ctx, root, disk); err != nil {
		return t, err
	}
	if err := m.Pull(ctx, ref); err != nil {
		return t, err
	}
	// A file system that was just mounted has nothing in the cache.
	if err := m.remount(ctx, root, disk); err != nil {
		return t, err
	}
	layers, err := filepath.Glob(filepath.Join(root, "io.containerd.snapshotter.v1.overlayfs", "snapshots", "*", "fs"))
	if err != nil || len(layers) == 0 {
		return t, errors.Join(fmt.Errorf("find the layers of %s below %s", ref, root), err)
	}
	c, err := m.Run(ctx, ref, "touched", first)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(c.Close(), err) }()
	for _, layer := range layers {
		if err := t.add(layer); err != nil {
			return t, err
		}
	}
	return t, nil
}

// diskSize is more than any image here takes; the file is sparse.
const diskSize = 8 << 30

func makeDisk(ctx context.Context, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", path).CombinedOutput(); err != nil {
		return fmt.Errorf("make a file system: %w: %s", err, out)
	}
	return nil
}

// remount stops containerd, mounts the disk over its root, which ends an earlier mount, and starts it again.
func (m *Machine) remount(ctx context.Context, root, disk string) error {
	if err := errors.Join(m.client.Close(), m.containerd.Stop()); err != nil {
		return err
	}
	mounted, err := mountinfo.Mounted(root)
	if err != nil {
		return err
	}
	if mounted {
		if err := unix.Unmount(root, 0); err != nil {
			return fmt.Errorf("unmount %s: %w", root, err)
		}
	}
	if out, err := exec.CommandContext(ctx, "mount", "-o", "loop", disk, root).CombinedOutput(); err != nil {
		return fmt.Errorf("mount a file system: %w: %s", err, out)
	}
	var st unix.Stat_t
	if err := unix.Stat(root, &st); err != nil {
		return err
	}
	ahead := fmt.Sprintf("/sys/dev/block/%d:%d/queue/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if err := os.WriteFile(ahead, []byte("0"), 0); err != nil {
		return fmt.Errorf("turn reading ahead off: %w", err)
	}
	if err := m.containerd.Start(ctx); err != nil {
		return err
	}
	m.client, err = m.containerd.Client("")
	return err
}

// add counts the files of a layer, each once.
func (t *Touched) add(layer string) error {
	seen := map[uint64]bool{}
	return filepath.WalkDir(layer, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if inode := info.Sys().(*syscall.Stat_t).Ino; seen[inode] || info.Size() == 0 {
			return nil
		} else {
			seen[inode] = true
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		var cached unix.Cachestat_t
		// A length of 0 is the rest of the file.
		if err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{}, &cached, 0); err != nil {
			return fmt.Errorf("ask what is cached of %s: %w", path, err)
		}
		t.All += info.Size()
		t.Read += min(int64(cached.Cache)*int64(os.Getpagesize()), info.Size())
		return nil
	})
}
