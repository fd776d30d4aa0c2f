package layerfs

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
)

const (
	// maxOrder bounds one line between the daemon and its mounter: three paths.
	maxOrder = 32 << 10
	// mountWithin bounds a mount or its end, which take milliseconds: to unmount may have to wait
	// for reads that are under way, up to layerstore's patience.
	mountWithin = 75 * time.Second
	// closeWithin is how long the daemon's end waits for its mounter's, which takes milliseconds.
	closeWithin = 3 * time.Second
	// mountsBelow bounds how many mounts are taken away from one place.
	mountsBelow = 16
)

// The orders of a mounter.
const (
	opMount   = "mount"
	opUnmount = "unmount"
	opReplace = "replace" // a mount by another, with no moment between
)

// order is what the daemon wants from its mounter, a line of JSON.
type order struct {
	ID   uint64 `json:"id"`
	Op   string `json:"op"`
	At   string `json:"at"`
	Meta string `json:"meta,omitempty"`
	Data string `json:"data,omitempty"`
	// Direct reads past the page cache of Data; Loop needs loop devices.
	Direct bool `json:"direct,omitempty"`
	Loop   bool `json:"loop,omitempty"`
}

// answer is how it went.
type answer struct {
	ID  uint64 `json:"id"`
	Err string `json:"err,omitempty"`
	// Busy: the former mount is in use, and lives on out of sight.
	Busy bool `json:"busy,omitempty"`
}

// RunMounter is the whole life of the process that mounts and unmounts for the daemon: it does what in
// says, side by side, and ends when that does.
func RunMounter(in io.Reader, out io.Writer) error {
	var mu sync.Mutex // guards out
	enc := json.NewEncoder(out)
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, 4096), maxOrder)
	var wg sync.WaitGroup
	for lines.Scan() {
		var o order
		if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
			return fmt.Errorf("the daemon's order is not understood: %w", err)
		}
		wg.Go(func() {
			a := answer{ID: o.ID}
			if err := o.run(&a); err != nil {
				a.Err = err.Error()
			}
			mu.Lock()
			defer mu.Unlock()
			_ = enc.Encode(a) // without the daemon there is nobody to tell
		})
	}
	wg.Wait()
	return lines.Err()
}

func (o *order) run(a *answer) error {
	switch o.Op {
	case opMount:
		return erofs.Mount(o.Meta, o.At, o.Data, erofs.MountOptions{Loop: o.Loop, DirectIO: o.Direct})
	case opUnmount:
		return unmountAll(o.At, a)
	case opReplace:
		return o.replace(a)
	}
	return fmt.Errorf("the daemon's order %q is unknown", o.Op)
}

// unmountAll takes away all that is mounted on a place: two, if a mounter whose daemon was
// killed came late.
func unmountAll(at string, a *answer) error {
	for range mountsBelow {
		err := unix.Unmount(at, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			if err = unix.Unmount(at, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err == nil {
				a.Busy = true
			}
		}
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // not a mount
		default:
			return fmt.Errorf("%s cannot be unmounted: %w", at, err)
		}
	}
	return fmt.Errorf("%s has more mounts than can be taken away", at)
}

// replace puts a new mount below the present one, and takes that away (Linux 6.5).
func (o *order) replace(a *answer) error {
	aside, err := os.MkdirTemp(filepath.Dir(o.At), "swap-")
	if err != nil {
		return fmt.Errorf("a mount cannot be replaced: %w", err)
	}
	defer os.Remove(aside)
	if err := erofs.Mount(o.Meta, aside, o.Data, erofs.MountOptions{Loop: o.Loop, DirectIO: o.Direct}); err != nil {
		return err
	}
	// A clone can be moved also where the mount it is of cannot: below a shared one.
	tree, err := unix.OpenTree(unix.AT_FDCWD, aside, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if uerr := unix.Unmount(aside, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err == nil && uerr != nil {
		unix.Close(tree)
		err = uerr
	}
	if err != nil {
		return fmt.Errorf("the mount on %s cannot be replaced: %w", o.At, err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, o.At, unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath); err != nil {
		return fmt.Errorf("nothing can be mounted below the mount on %s: %w", o.At, err)
	}
	err = unix.Unmount(o.At, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		a.Busy = true
		err = unix.Unmount(o.At, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("the former mount on %s cannot be unmounted: %w", o.At, err)
	}
	return nil
}

// moveMountBeneath is MOVE_MOUNT_BENEATH of linux/mount.h.
const moveMountBeneath = 0x200

// mounter is the daemon's side: it starts the process when it is needed first, and again when it
// has ended.
type mounter struct {
	argv []string

	mu      sync.Mutex // guards following
	in      io.WriteCloser
	waiting map[uint64]chan answer
	last    uint64
	closed  bool
	over    chan struct{} // closed when nothing is waited for any more
	wg      sync.WaitGroup
}

func newMounter(argv []string) *mounter {
	return &mounter{argv: argv, waiting: map[uint64]chan answer{}, over: make(chan struct{})}
}

// do has an order done. When that takes longer than it may, what comes of it is undone.
func (m *mounter) do(o order) (answer, error) {
	ch, err := m.send(o)
	if err != nil {
		return answer{}, err
	}
	timer := time.NewTimer(mountWithin)
	defer timer.Stop()
	select {
	case a := <-ch:
		if a.Err != "" {
			return a, errors.New(a.Err)
		}
		return a, nil
	case <-m.over:
		return answer{}, errClosed
	case <-timer.C:
	}
	if o.Op == opMount {
		go func() {
			if a := <-ch; a.Err == "" {
				_, _ = m.send(order{Op: opUnmount, At: o.At})
			}
		}()
	}
	return answer{}, fmt.Errorf("to %s %s takes longer than %s", o.Op, o.At, mountWithin)
}

func (m *mounter) send(o order) (<-chan answer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errClosed
	}
	if m.in == nil {
		if err := m.startLocked(); err != nil {
			return nil, fmt.Errorf("the process that mounts cannot be started: %w", err)
		}
	}
	m.last++
	o.ID = m.last
	line, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	ch := make(chan answer, 1)
	m.waiting[o.ID] = ch
	if _, err := m.in.Write(append(line, '\n')); err != nil {
		delete(m.waiting, o.ID)
		return nil, fmt.Errorf("the process that mounts does not listen: %w", err)
	}
	return ch, nil
}

func (m *mounter) startLocked() error {
	cmd := exec.Command(m.argv[0], m.argv[1:]...)
	// Its own group: a terminal's Ctrl-C is for the daemon, which then needs it still.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	m.in = in
	m.wg.Go(func() {
		lines := bufio.NewScanner(out)
		lines.Buffer(make([]byte, 0, 4096), maxOrder)
		for lines.Scan() {
			var a answer
			if json.Unmarshal(lines.Bytes(), &a) != nil {
				continue
			}
			m.mu.Lock()
			ch := m.waiting[a.ID]
			delete(m.waiting, a.ID)
			m.mu.Unlock()
			if ch != nil {
				ch <- a
			}
		}
		_ = in.Close()
		_, _ = io.Copy(io.Discard, out)
		err := cmd.Wait()
		m.mu.Lock()
		defer m.mu.Unlock()
		for id, ch := range m.waiting {
			ch <- answer{ID: id, Err: fmt.Sprintf("the process that mounts ended: %v", errors.Join(err))}
			delete(m.waiting, id)
		}
		m.in = nil
	})
	return nil
}

// close ends the process, which first ends what is under way. What waits for a server that is
// no more is left to it.
func (m *mounter) close() {
	m.mu.Lock()
	m.closed = true
	if m.in != nil {
		_ = m.in.Close()
	}
	m.mu.Unlock()
	done := make(chan struct{})
	go func() { m.wg.Wait(); close(done) }()
	timer := time.NewTimer(closeWithin)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
	}
	close(m.over)
}
