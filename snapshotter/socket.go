package snapshotter

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"os/user"

	"golang.org/x/sys/unix"
)

// probeTimeout is how long a socket file found at start may take to answer. A live
// daemon's kernel answers connect(2) at once, busy or not.
const probeTimeout = time.Second

// umaskMu guards the process's umask while a socket is made.
var umaskMu sync.Mutex

// Listen makes a unix socket at path with the permissions of mode, from the first
// moment on. A socket file left by a dead daemon is replaced; one that answers is left
// alone, and so is a file that is no socket (ErrInUse). When group names a group of
// this system, the socket is given to it; a group that does not exist is ignored.
func Listen(path string, mode os.FileMode, group string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("the folder of the socket %s cannot be made: %w", path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	umaskMu.Lock()
	old := unix.Umask(0o777 &^ int(mode.Perm()))
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	umaskMu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("the socket %s cannot be made: %w", path, err)
	}
	if gid, ok := groupID(group); ok {
		if err := os.Chown(path, -1, gid); err != nil {
			l.Close()
			return nil, fmt.Errorf("the socket %s cannot be given to group %s: %w", path, group, err)
		}
	}
	return l, nil
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	i, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("the socket %s cannot be looked at: %w", path, err)
	}
	if i.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s is there and is no socket: remove it, or configure another path", path)
	}
	c, err := net.DialTimeout("unix", path, probeTimeout)
	if err == nil {
		c.Close()
		return fmt.Errorf("the socket %s is %w; stop that one, or configure another path", path, ErrInUse)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("the socket %s is there, and whether a daemon has it cannot be told: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("the socket %s of a dead daemon cannot be removed: %w", path, err)
	}
	return nil
}

func groupID(name string) (int, bool) {
	if name == "" {
		return 0, false
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, false
	}
	gid, err := strconv.Atoi(g.Gid)
	return gid, err == nil
}
