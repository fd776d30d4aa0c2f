package layerfs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/snapshotter/layerstore"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// checkTimeout bounds the making of a lost mount: containerd waits, and the snapshotter holds a read
// transaction on its database. What has to be fetched for it goes on.
const checkTimeout = 15 * time.Second

// errClosed is the answer of a file system that was closed.
var errClosed = errors.New("the daemon is shutting down")

// Options make a FileSystem.
type Options struct {
	Store string // the layer store's folder; not on overlayfs
	// State is a folder for what the file system needs beside that: notes of its mounts, and the
	// mountpoint of blobfs.
	State  string
	Source Source // nil: only what is in the store can be mounted
	Quota  int64  // bytes in Store; 0 is no bound
	Loop   bool   // mount by loop devices
	Quiet  time.Duration
	// NoPublished and NoMembers leave out indexes that somebody published, and other nodes'.
	NoPublished, NoMembers bool
	Log                    *slog.Logger // nil: slog.Default()
	Socket                 string       // the keeper's
	Keeper                 []string     // the command that runs keeper.Run on Socket
	Mounter                []string     // the command that runs RunMounter
	// Beside also keeps what the keeper does: systemd, where there is one. May be nil. It is the file system's from New on.
	Beside keeper.Store
}

// FileSystem mounts layers. Its methods may be called from many goroutines; calls for one
// mountpoint wait for each other, calls for different ones do not.
type FileSystem struct {
	o       Options
	log     *slog.Logger
	store   *layerstore.Store
	link    *link
	mounter *mounter
	unpack  chan struct{} // holds one for each layer that is unpacked
	look    chan struct{} // the same, whose index is looked for
	fill    chan struct{} // the same, that is fetched in the background
	decode  chan struct{} // the same, that is decoded in the background
	words   chan struct{} // holds one while an index of or for another node is in memory

	compares *comparing   // Options.Source
	failures atomic.Int64 // mounts that failed

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex // guards following
	places map[string]*place
	served map[digest.Digest]*served
	pulls  map[string]*pull
	gone   map[string]bool // mountpoints unmounted during a Restore; nil outside one
	closed bool
}

var _ snapshot.FileSystem = (*FileSystem)(nil)

// kind is what a mount reads its data from.
type kind string

const (
	kindData  kind = "data"  // the plain file
	kindBlobs kind = "blobs" // a file of blobfs
)

// place is what is known of one mountpoint. It exists while something is mounted or
// somebody works there.
type place struct {
	turn  chan struct{} // holds one token; who has it may mount and unmount
	s     *served       // what is mounted, or being mounted; guarded by FileSystem.mu
	kind  kind          // guarded by FileSystem.mu
	users int           // guarded by FileSystem.mu
}

// Mount mounts the layer that the labels name on the folder at. The layer must have been
// brought. An error means that nothing is mounted there.
func (f *FileSystem) Mount(ctx context.Context, at string, labels map[string]string) error {
	t, err := lazy.ParseLabels(labels)
	if err != nil {
		return err
	}
	p, leave, err := f.enter(ctx, at)
	if err != nil {
		return err
	}
	defer leave()
	s, err := f.acquire(t)
	if err != nil {
		return err
	}
	if parents, ok := ctx.Value(parentsKey{}).([]string); ok && s.h.Implicit() {
		if err := f.inherit(at, s, parents); err != nil {
			f.release(s, false)
			return err
		}
	}
	return f.attach(p, at, s)
}

// attach mounts s, whose reference it takes over, on at. The caller is in p.
func (f *FileSystem) attach(p *place, at string, s *served) error {
	if err := f.forged(s.digest); err != nil {
		f.release(s, false)
		return err
	}
	k := kindBlobs
	if s.h.Completed() {
		k = kindData
	}
	f.mu.Lock()
	p.s, p.kind = s, k
	f.mu.Unlock()
	err := f.note(at, k)
	if err == nil {
		err = f.mount(at, s, k)
	}
	if err != nil {
		f.failures.Add(1)
		f.mu.Lock()
		p.s = nil
		f.mu.Unlock()
		f.settle(s)
		f.release(s, false)
		f.unnote(at)
		return err
	}
	s.mounted.Store(true)
	if k == kindBlobs || f.claimed(s.digest) {
		f.background(s)
	}
	return nil
}

func (f *FileSystem) mount(at string, s *served, k kind) error {
	o := order{Op: opMount, At: at, Meta: f.metaOf(at, s), Data: s.h.DataPath(), Loop: f.o.Loop}
	if k == kindBlobs {
		if err := f.offer(s); err != nil {
			return err
		}
		o.Data, o.Direct = f.link.path(s.name), true
	}
	_, err := f.mounter.do(o)
	return err
}

// Check tells whether the layer mounted on at can be used. A mount that is not there is
// made again first.
func (f *FileSystem) Check(ctx context.Context, at string, labels map[string]string) error {
	if s := f.mountedOn(at); s != nil {
		return f.forged(s.digest)
	}
	p, leave, err := f.enter(ctx, at)
	if err != nil {
		return err
	}
	defer leave()
	if s := f.mountedOn(at); s != nil {
		return f.forged(s.digest)
	}
	return f.remount(ctx, p, at, labels)
}

// remount makes a lost mount again. The caller is in p.
func (f *FileSystem) remount(ctx context.Context, p *place, at string, labels map[string]string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, checkTimeout, fmt.Errorf("the layer is not there within %s", checkTimeout))
	defer cancel()
	if err := f.detach(p, at); err != nil {
		return err
	}
	// What is in the store needs nobody to be asked.
	t, err := lazy.ParseLabels(labels)
	if err != nil {
		return err
	}
	s, err := f.acquire(t)
	if errors.Is(err, layerstore.ErrNotFound) {
		b, berr := f.Bring(ctx, labels)
		if berr != nil {
			return berr
		}
		defer b.Close()
		s, err = f.acquire(t)
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		f.release(s, false)
		return fmt.Errorf("the folder of a layer cannot be made again: %w", err)
	}
	return f.attach(p, at, s)
}

// Unmount takes away what is mounted on at, and releases what it holds, when the last container
// that uses it has ended. It is no error when nothing is mounted. After Close it does nothing.
func (f *FileSystem) Unmount(ctx context.Context, at string) error {
	f.mu.Lock()
	if f.gone != nil {
		f.gone[at] = true
	}
	f.mu.Unlock()
	p, leave, err := f.enter(ctx, at)
	if errors.Is(err, errClosed) {
		return nil
	}
	if err != nil {
		return err
	}
	defer leave()
	if err := f.detach(p, at); err != nil {
		return err
	}
	_ = os.Remove(f.ownMeta(at))
	return nil
}

// detach unmounts what is on at. The caller is in p.
func (f *FileSystem) detach(p *place, at string) error {
	f.mu.Lock()
	s := p.s
	f.mu.Unlock()
	if s == nil && !isMount(at) {
		f.unnote(at)
		return nil
	}
	a, err := f.mounter.do(order{Op: opUnmount, At: at})
	if err != nil {
		return err
	}
	f.unnote(at)
	if s == nil {
		return nil
	}
	f.mu.Lock()
	p.s = nil
	f.mu.Unlock()
	if a.Busy {
		f.log.Info("layer unmounted, but still in use; it is released when its last user is gone", "mountpoint", at, "digest", s.digest)
	}
	f.settle(s)
	f.release(s, true)
	return nil
}

// mountedOn is the layer on a mountpoint, nil when it is not mounted there.
func (f *FileSystem) mountedOn(at string) *served {
	f.mu.Lock()
	p := f.places[at]
	var s *served
	if p != nil {
		s = p.s
	}
	f.mu.Unlock()
	if s == nil || !isEROFS(at) {
		return nil
	}
	return s
}

// isEROFS asks the kernel what is on a path, which it answers from memory.
func isEROFS(at string) bool {
	var st unix.Statfs_t
	return unix.Statfs(at, &st) == nil && uint32(st.Type) == unix.EROFS_SUPER_MAGIC_V1
}

// isMount tells whether a folder is a mountpoint, by its device.
func isMount(at string) bool {
	var st, up unix.Stat_t
	return unix.Lstat(at, &st) == nil && unix.Lstat(filepath.Dir(at), &up) == nil && st.Dev != up.Dev
}

// enter waits for the turn at a mountpoint. leave must be called.
func (f *FileSystem) enter(ctx context.Context, at string) (_ *place, leave func(), _ error) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil, nil, errClosed
	}
	p := f.places[at]
	if p == nil {
		p = &place{turn: make(chan struct{}, 1)}
		p.turn <- struct{}{}
		f.places[at] = p
	}
	p.users++
	f.mu.Unlock()
	release := func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if p.users--; p.users == 0 && p.s == nil {
			delete(f.places, at)
		}
	}
	select {
	case <-p.turn:
		return p, func() { p.turn <- struct{}{}; release() }, nil
	case <-ctx.Done():
		release()
		return nil, nil, context.Cause(ctx)
	}
}
