package erofs

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// loopTries bounds how often a free loop device is asked for. Another process may take
// the same one first; LOOP_CTL_GET_FREE does not reserve it.
const loopTries = 64

// attachLoop puts a file behind a read-only loop device, which goes away when the last
// that has it open is gone: with the file that is returned, unless it was mounted.
// LOOP_CONFIGURE is as old as Linux 5.8, and so older than what the images need.
func attachLoop(path string, direct bool) (*os.File, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("no loop device for %s: %w", path, err)
	}
	defer file.Close() // the device has its own reference
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("no loop device for %s (is the loop module there?): %w", path, err)
	}
	defer control.Close()
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("no loop device for %s: none is free: %w", path, err)
		}
		dev, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDONLY, 0)
		if err != nil {
			return nil, fmt.Errorf("no loop device for %s: %w", path, err)
		}
		config := unix.LoopConfig{
			Fd: uint32(file.Fd()),
			// EROFS reads nothing smaller, and direct reads of any disk are aligned then.
			Size: blockSize,
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR},
		}
		if direct {
			config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
		}
		copy(config.Info.File_name[:len(config.Info.File_name)-1], path) // for losetup(8) to show
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if direct && errors.Is(err, unix.EINVAL) {
			config.Info.Flags &^= unix.LO_FLAGS_DIRECT_IO
			err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		}
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("no loop device for %s: /dev/loop%d refuses it: %w", path, n, err)
		}
	}
	return nil, fmt.Errorf("no loop device for %s: others took each of the %d that were free", path, loopTries)
}
