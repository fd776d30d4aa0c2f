package layerstore

import (
	"errors"
	"syscall"
)

var (
	// ErrNotFound: the store has no such layer.
	ErrNotFound = errors.New("the layer is not in the store")
	// ErrClosed: the layer's handle, or the store, was closed.
	ErrClosed = errors.New("closed")
	// ErrRemoved: the layer was removed while it was being filled.
	ErrRemoved = errors.New("the layer was removed")
	// ErrNoSpace: the disk is full or, for what nobody waits for, the quota reached, and
	// nothing unused is left to evict. It is also syscall.ENOSPC.
	ErrNoSpace error = noSpace{}
	// ErrCorrupt: the blob does not decode to what the layer's index says.
	ErrCorrupt = errors.New("the blob does not match the layer's index")
	// ErrNoSource: chunks are missing and there is nowhere to get them from.
	ErrNoSource = errors.New("the layer is incomplete and has no source")
	// ErrLocked: another process owns the store.
	ErrLocked = errors.New("another process uses the layer store")
)

// errEnough ends a decoder that nobody needs to go on; it is not a failure.
var errEnough = errors.New("decoded far enough")

type noSpace struct{}

func (noSpace) Error() string        { return "no space for layers" }
func (noSpace) Is(target error) bool { return target == syscall.ENOSPC }
