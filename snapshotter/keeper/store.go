package keeper

import (
	"context"
	"errors"
	"fmt"
	"os"
)

// Store keeps open files under names, beyond the life of this process.
//
// Files that are put and got are duplicates in the sense of dup(2): each side closes
// its own. All methods may be called side by side.
type Store interface {
	// Put stores f. A name that is taken is refused with an error that is
	// fs.ErrExist, a full store with ErrFull. When Put returns nil, the file is safe.
	Put(ctx context.Context, name string, f *os.File) error
	// Get gives the file back, or an error that is fs.ErrNotExist. It is closed on exec.
	Get(ctx context.Context, name string) (*os.File, error)
	// Drop forgets the file. A name that is not there is an error that is fs.ErrNotExist.
	Drop(ctx context.Context, name string) error
	// List tells the names, sorted.
	List(ctx context.Context) ([]string, error)
	// Close ends the use of the store here; what it keeps stays kept.
	Close() error
}

// MaxFiles is how many files a keeper holds. A node needs one for each FUSE mount, and
// for a moment two while it makes a mount anew; the rest is room for later versions.
const MaxFiles = 64

// maxName is the longest name, in bytes. All names fit into one answer.
const maxName = 64

var (
	// ErrFull tells that a store holds as many files as it may.
	ErrFull = errors.New("the store of open files is full")
	// ErrRunning tells that a socket has a keeper already.
	ErrRunning = errors.New("another keeper has the socket")
)

// checkName refuses names that one of the stores cannot hold: systemd separates names
// with colons, and the protocol with NUL.
func checkName(name string) error {
	if name == "" || len(name) > maxName {
		return fmt.Errorf("a stored file's name has 1 to %d bytes, this one has %d", maxName, len(name))
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '-', c == '_':
		default:
			return fmt.Errorf("a stored file's name %q has letters, digits and .-_ only", name)
		}
	}
	return nil
}
