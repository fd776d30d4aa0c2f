package blobfs

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
)

// fsType is what mounts of ours are called in /proc/self/mountinfo.
const fsType = "fuse.quay"

// Connect gets the FUSE connection of the mount at mountpoint. If the store has it and
// it is alive, it is that one, and taken is true: the caller adds the files that were
// there, then calls Resend. Otherwise what is left of former mounts of ours is unmounted,
// and a new mount made and stored; EROFS mounts above a former one are lost then.
//
// The mount's source is the name of its connection in the store, so that the two are
// never confused. Nothing here asks the mounted file system, which would wait for a
// daemon that is dead.
func Connect(ctx context.Context, store keeper.Store, mountpoint string) (dev *os.File, taken bool, err error) {
	mountpoint, prefix, err := place(mountpoint)
	if err != nil {
		return nil, false, err
	}
	all, err := store.List(ctx)
	if err != nil {
		return nil, false, fmt.Errorf("the store of open files cannot tell whether it has the connection of %s: %w", mountpoint, err)
	}
	names := slices.DeleteFunc(all, func(n string) bool { return !strings.HasPrefix(n, prefix) })
	source, err := mounted(mountpoint)
	if err != nil {
		return nil, false, err
	}
	if slices.Contains(names, source) {
		if dev, err = store.Get(ctx, source); err != nil {
			return nil, false, fmt.Errorf("the connection of %s cannot be taken over: %w", mountpoint, err)
		}
		taken = alive(dev)
		if !taken {
			dev.Close()
		}
	}
	if !taken {
		if err := detach(mountpoint); err != nil {
			return nil, false, err
		}
	}
	for _, n := range names {
		if taken && n == source {
			continue
		}
		if err := store.Drop(ctx, n); err != nil && !errors.Is(err, os.ErrNotExist) {
			err = fmt.Errorf("a former connection of %s cannot be dropped: %w", mountpoint, err)
			if taken {
				dev.Close()
			}
			return nil, false, err
		}
	}
	if !taken {
		dev, err = mount(ctx, store, mountpoint, prefix)
	}
	return dev, taken, err
}

// Keep puts the connection of a mount that Connect made into a store that lacks it,
// because its keeper had to be started anew. It is no error when it is there already.
func Keep(ctx context.Context, store keeper.Store, mountpoint string, dev *os.File) error {
	mountpoint, prefix, err := place(mountpoint)
	if err != nil {
		return err
	}
	source, err := mounted(mountpoint)
	if err != nil {
		return err
	}
	if !strings.HasPrefix(source, prefix) || !alive(dev) {
		return fmt.Errorf("the connection of %s cannot be stored: %w", mountpoint, ErrGone)
	}
	if err := store.Put(ctx, source, dev); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("the connection of %s cannot be stored: %w", mountpoint, err)
	}
	return nil
}

// place makes a mountpoint's path what the kernel calls it, and tells how names of its
// connections begin. Only the parent is looked at.
func place(mountpoint string) (path, prefix string, err error) {
	path, err = filepath.Abs(mountpoint)
	if err != nil {
		return "", "", err
	}
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", "", fmt.Errorf("the folder of the mountpoint %s cannot be made: %w", path, err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return "", "", fmt.Errorf("the folder of the mountpoint %s cannot be found: %w", path, err)
	}
	path = filepath.Join(dir, filepath.Base(path))
	sum := sha256.Sum256([]byte(path))
	return path, fmt.Sprintf("blobfs-%x-", sum[:6]), nil
}

// mount makes a new mount, and stores its connection before anything can be served.
func mount(ctx context.Context, store keeper.Store, mountpoint, prefix string) (*os.File, error) {
	if err := os.Mkdir(mountpoint, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("the mountpoint %s cannot be made: %w", mountpoint, err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("/dev/fuse cannot be opened; is the kernel's module fuse there? %w", err)
	}
	var id [8]byte
	rand.Read(id[:]) // never fails
	name := fmt.Sprintf("%s%x", prefix, id)
	// allow_other: containers read through EROFS as whoever they are. Who may open the
	// files here is a matter of their mode, which default_permissions has the kernel check.
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read=%d", fd, maxRead)
	err = unix.Mount(name, mountpoint, fsType, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID|unix.MS_NOEXEC, opts)
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	if err != nil {
		dev.Close()
		return nil, fmt.Errorf("the FUSE mount on %s fails: %w", mountpoint, err)
	}
	if err := store.Put(ctx, name, dev); err != nil {
		err = errors.Join(fmt.Errorf("the connection of %s cannot be stored, so it is not used: %w", mountpoint, err),
			unix.Unmount(mountpoint, unix.MNT_DETACH))
		dev.Close()
		return nil, err
	}
	return dev, nil
}

// alive tells whether the connection still has its mount.
func alive(dev *os.File) bool {
	raw, err := dev.SyscallConn()
	if err != nil {
		return false
	}
	ok := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		for {
			_, err := unix.Poll(p, 0)
			if err != unix.EINTR {
				ok = err == nil && p[0].Revents&(unix.POLLERR|unix.POLLNVAL|unix.POLLHUP) == 0
				return
			}
		}
	})
	return err == nil && ok
}

// detach unmounts all of ours that lie on the mountpoint, in use or not.
func detach(mountpoint string) error {
	for {
		source, err := mounted(mountpoint)
		if err != nil || source == "" {
			return err
		}
		if err := unix.Unmount(mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("the dead mount on %s cannot be unmounted: %w", mountpoint, err)
		}
	}
}

// mounted tells the source of the uppermost mount on path, "" when it is none of ours.
func mounted(path string) (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("the mounts of this process cannot be listed: %w", err)
	}
	source := ""
	for l := range strings.Lines(string(b)) {
		left, right, _ := strings.Cut(l, " - ")
		at, what := strings.Fields(left), strings.Fields(right)
		if len(at) < 5 || len(what) < 2 || unescape(at[4]) != path {
			continue
		}
		source = ""
		if what[0] == fsType {
			source = unescape(what[1])
		}
	}
	return source, nil
}

// unescape undoes the kernel's octal escapes (seq_escape) for blanks and backslashes.
func unescape(s string) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '\\')
		if i < 0 || len(s) < i+4 {
			b.WriteString(s)
			return b.String()
		}
		n, err := strconv.ParseUint(s[i+1:i+4], 8, 8)
		if err != nil {
			b.WriteString(s[:i+1])
			s = s[i+1:]
			continue
		}
		b.WriteString(s[:i])
		b.WriteByte(byte(n))
		s = s[i+4:]
	}
}
