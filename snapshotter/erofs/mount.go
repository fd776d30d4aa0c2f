package erofs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// mountFlags: see the package comment for why nodev and nosuid do layers no harm.
const mountFlags = unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID

// MountOptions say how an image is mounted.
type MountOptions struct {
	// Loop puts both files behind loop devices, for kernels whose Support is Loop. The
	// devices go away with the mount.
	Loop bool
	// DirectIO reads the data file past its own page cache, so that what is read is kept in
	// memory once, as pages of the mount. A kernel or file system that cannot do that
	// reads through the cache.
	DirectIO bool
}

// Mount mounts the image in the file meta on dir, with the file data as its data file.
// The data file must have its full length, though not its contents; whoever serves it
// must be serving, as its length is asked for. Root's rights are needed.
func Mount(meta, dir, data string, o MountOptions) error {
	meta, err := filepath.Abs(meta) // the kernel resolves it, perhaps elsewhere
	if err != nil {
		return fmt.Errorf("the layer's metadata image cannot be found: %w", err)
	}
	data, err = filepath.Abs(data)
	if err != nil {
		return fmt.Errorf("the layer's data file cannot be found: %w", err)
	}
	if err := checkFiles(meta, data); err != nil {
		return err
	}
	source, device := meta, data
	if o.Loop {
		m, err := attachLoop(meta, false)
		if err != nil {
			return err
		}
		defer m.Close() // the mount holds the device; without it, it goes away
		d, err := attachLoop(data, o.DirectIO)
		if err != nil {
			return err
		}
		defer d.Close()
		source, device = m.Name(), d.Name()
	} else if strings.Contains(data, ",") {
		return fmt.Errorf("the layer's data file %s cannot be mounted: mount(2) cannot say a path with a comma", data)
	}
	options := "device=" + device
	if o.DirectIO && !o.Loop {
		err = unix.Mount(source, dir, "erofs", mountFlags, options+",directio")
	}
	// The option came after file-backed mounts did: a kernel between the two says EINVAL.
	if !o.DirectIO || o.Loop || errors.Is(err, unix.EINVAL) {
		err = unix.Mount(source, dir, "erofs", mountFlags, options)
	}
	if err != nil {
		return fmt.Errorf("the layer's image %s cannot be mounted on %s: %s: %w", meta, dir, whyNot(err), err)
	}
	return nil
}

// whyNot says what an error of the kernel's means here, where the kernel says it only to
// its log.
func whyNot(err error) string {
	switch {
	case errors.Is(err, unix.ENOTBLK):
		return "the kernel mounts EROFS from plain files only since Linux 6.12 (CONFIG_EROFS_FS_BACKED_BY_FILE), " +
			"and not from files on overlayfs or tmpfs"
	case errors.Is(err, unix.ENODEV):
		return "the kernel has no EROFS (CONFIG_EROFS_FS; modprobe erofs)"
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "it takes root's rights in the host's user namespace"
	case errors.Is(err, unix.ELOOP):
		return "too many file systems are stacked under it; keep the layers on a plain file system"
	}
	return "the kernel's log says why"
}

// checkFiles refuses two files that the kernel would mount, but not read rightly: it
// reads zeros where a file ends too early.
func checkFiles(meta, data string) error {
	f, err := os.Open(meta)
	if err != nil {
		return fmt.Errorf("the layer's metadata image cannot be read: %w", err)
	}
	defer f.Close()
	head := make([]byte, rootOffset)
	if _, err := io.ReadFull(f, head); err != nil {
		return fmt.Errorf("the layer's metadata image %s cannot be read: %w", meta, err)
	}
	super, slot := head[superOffset:], head[deviceOffset:]
	if binary.LittleEndian.Uint32(super) != superMagic || binary.LittleEndian.Uint16(super[86:]) != 1 {
		return fmt.Errorf("%s is not a layer's metadata image", meta)
	}
	for _, file := range []struct {
		path, what string
		blocks     uint32
	}{
		{meta, "metadata image", binary.LittleEndian.Uint32(super[36:])},
		{data, "data file", binary.LittleEndian.Uint32(slot[64:])},
	} {
		info, err := os.Stat(file.path)
		if err != nil {
			return fmt.Errorf("the layer's %s cannot be mounted: %w", file.what, err)
		}
		if want := int64(file.blocks) * blockSize; info.Size() < want {
			return fmt.Errorf("the layer's %s %s has %d bytes of %d; it must have its full length to be mounted",
				file.what, file.path, info.Size(), want)
		}
	}
	return nil
}

// Unmount takes the mount on dir away, and is content if there is none. One that is in
// use goes out of sight, and away when its last user is done.
func Unmount(dir string) error {
	for {
		err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // EINVAL: not a mount
		default:
			return fmt.Errorf("the layer on %s cannot be unmounted: %w", dir, err)
		}
	}
}
