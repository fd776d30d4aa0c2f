package store

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

var (
	// ErrMissing: the bytes asked for lie, at least in part, in a piece that is not held.
	ErrMissing = errors.New("piece not held")
	// ErrHeld: the piece is held already and stays as it is; nothing was written.
	ErrHeld = errors.New("piece already held")
	// ErrMismatch: the content does not have the digest that it is stored under.
	ErrMismatch = errors.New("digest mismatch")
	// ErrSize: the size cannot be, or the blob is stored with another size.
	ErrSize = errors.New("wrong blob size")
	// ErrDigest: not a sha256 or sha512 digest.
	ErrDigest = errors.New("digest not usable")
	// ErrIncomplete: the blob's digest has not been checked yet.
	ErrIncomplete = errors.New("blob not complete")
	// ErrInUse: this or another process has the blob open.
	ErrInUse = errors.New("blob in use")
	// ErrPinned: the blob is pinned.
	ErrPinned = errors.New("blob pinned")
	// ErrQuota: the quota leaves no room, even if everything evictable went.
	ErrQuota = errors.New("store quota exceeded")
	// ErrNoSpace: the file system is full (ENOSPC), or the user's disk quota is (EDQUOT); the system's error is wrapped too.
	ErrNoSpace = errors.New("no space left for the store")
	// ErrTooLarge: content above MaxContent, or an entry above its bound.
	ErrTooLarge = errors.New("too large for the store")
	// ErrClosed: the store or the handle was closed.
	ErrClosed = fmt.Errorf("store: %w", os.ErrClosed)
)

// noSpace adds ErrNoSpace to errors that mean a full disk, so that callers need not know the errno.
func noSpace(err error) error {
	if errors.Is(err, ErrNoSpace) {
		return err
	}
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	return err
}
