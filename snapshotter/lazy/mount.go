package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// cacheTime is how long the kernel may keep names and attributes, present and
	// absent. A layer never changes, so it is for ever; memory pressure still takes them.
	// With go-fuse's default of one second, `find` over a layer costs the daemon
	// a round of lookups each time.
	cacheTime = 365 * 24 * time.Hour

	// maxRead is the largest single read, in bytes: what the kernel asks for in one
	// piece of readahead.
	maxRead = 128 << 10

	// unmountWait is how long Unmount waits for the kernel to give the mount back. It
	// takes milliseconds unless somebody still uses it, and then there is no bound:
	// the mount then ends by itself when they are done.
	unmountWait = 2 * time.Second
)

// mounted is one tree at one place. Its serving goroutine ends when the kernel
// gives the file system back, whoever unmounted it, and only then closes the tree:
// a container that still has files open keeps being served.
type mounted struct {
	at     string
	target Target
	server *fuse.Server
	tree   *tree
	done   chan struct{} // closed when the tree is closed
}

// mountTree mounts a tree. It owns the tree from now on, also when there is an error.
func mountTree(at string, tr *tree, ended func(*mounted)) (*mounted, error) {
	forever := cacheTime
	raw := fusefs.NewNodeFS(tr.root, &fusefs.Options{
		AttrTimeout:     &forever,
		EntryTimeout:    &forever,
		NegativeTimeout: &forever,
		NullPermissions: true, // mode 0000 is a mode
	})
	server, err := fuse.NewServer(raw, at, &fuse.MountOptions{
		AllowOther:        true, // containers run as other users
		FsName:            "quay",
		Name:              "quay",
		MaxWrite:          maxRead, // also the limit of reads
		DirectMount:       true,    // mount(2); no fusermount needed
		DirectMountStrict: true,
		DirectMountFlags:  unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV,
		Logger:            stdlog.New(io.Discard, "", 0),
	})
	if err != nil {
		tr.close()
		return nil, fmt.Errorf("the layer cannot be mounted on %s (is /dev/fuse there?): %w", at, err)
	}
	m := &mounted{at: at, server: server, tree: tr, done: make(chan struct{})}
	go func() {
		server.Serve()
		tr.close()
		close(m.done)
		ended(m)
	}()
	if err := server.WaitMount(); err != nil {
		m.unmount(context.Background())
		return nil, fmt.Errorf("the layer mounted on %s does not answer: %w", at, err)
	}
	return m, nil
}

// unmount takes the mount away and waits until all of it is released. When it is
// in use it is only taken out of sight, and goes when its last user is gone; inUse then
// is true.
func (m *mounted) unmount(ctx context.Context) (inUse bool, err error) {
	if err := unmountPath(m.at); err != nil {
		return false, err
	}
	t := time.NewTimer(unmountWait)
	defer t.Stop()
	select {
	case <-m.done:
		return false, nil
	case <-t.C:
	case <-ctx.Done():
	}
	return true, nil
}

// alive tells whether the kernel still has the mount.
func (m *mounted) alive() bool {
	select {
	case <-m.done:
		return false
	default:
		return true
	}
}

// unmountPath unmounts what is mounted on path, if anything. A busy mount is detached.
func unmountPath(path string) error {
	for {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil, errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // EINVAL: not a mount
		default:
			return fmt.Errorf("%s cannot be unmounted: %w", path, err)
		}
	}
}
