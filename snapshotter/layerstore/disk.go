package layerstore

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// blocks is what one file takes on disk, in bytes.
func blocks(path string) int64 {
	var st unix.Stat_t
	if unix.Lstat(path, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// isFull tells that an error means that nothing more can be written for now.
func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// full makes an error of a full disk one of ErrNoSpace, and leaves others alone.
func full(err error) error {
	if err != nil && isFull(err) && !errors.Is(err, ErrNoSpace) {
		return fmt.Errorf("%w: the disk is full: %w", ErrNoSpace, err)
	}
	return err
}

// bootID names the time since this machine last came up.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	id := strings.TrimSpace(string(b))
	if err != nil || len(id) != 36 {
		// A name that never comes again: then only what was synced counts.
		return rand.Text()
	}
	return id
}

var zeros [64 << 10]byte

// isZero tells that p has only zero bytes: a sparse file holds them for nothing.
func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
