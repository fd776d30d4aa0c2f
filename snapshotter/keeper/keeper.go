package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxConns is how many clients are served at once; others wait. There is one
	// daemon, for a moment two.
	maxConns = 8
	// idle is how long a client may stay silent. Ours say what they want at once.
	idle = 10 * time.Second
)

// Run is the whole life of a keeper's process: it holds files and serves socketPath
// until ctx ends. It fails with ErrRunning when the socket has a keeper. When Start made
// this process, Run first leaves the daemon's process tree, and the first call returns
// at once with nil.
func Run(ctx context.Context, socketPath string) error {
	leave, report := inherited()
	if leave {
		return detach()
	}
	l, err := listen(socketPath)
	if err != nil {
		report(err)
		return err
	}
	defer l.close()
	report(nil)
	k := &keeper{files: map[string]int{}}
	defer k.drop()
	return k.serve(ctx, l.UnixListener)
}

// listener is the socket with the lock that goes with it.
type listener struct {
	*net.UnixListener
	path string
	lock *os.File
}

// listen makes the socket. It appears under its name with its permissions, never
// before, and replaces what a dead keeper left.
func listen(path string) (*listener, error) {
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("the keeper's lock %s.lock cannot be made; does its folder exist? %w", path, err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w %s", ErrRunning, path)
		}
		return nil, fmt.Errorf("the keeper's lock %s.lock cannot be taken: %w", path, err)
	}
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path))
	l, err := bind(tmp, path)
	if err != nil {
		os.Remove(tmp)
		lock.Close()
		return nil, fmt.Errorf("the keeper's socket %s cannot be made: %w", path, err)
	}
	return &listener{l, path, lock}, nil
}

func bind(tmp, path string) (*net.UnixListener, error) {
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: tmp, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // by then it has another name
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, path)); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// close removes the socket while the lock is still ours.
func (l *listener) close() {
	l.UnixListener.Close()
	os.Remove(l.path)
	l.lock.Close()
}

// keeper is what one process holds.
type keeper struct {
	mu    sync.Mutex     // guards following
	files map[string]int // descriptors
}

// serve answers clients until ctx ends or the socket breaks.
func (k *keeper) serve(ctx context.Context, l *net.UnixListener) error {
	ctx, cancel := context.WithCancel(ctx)
	var clients sync.WaitGroup
	defer clients.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	slots := make(chan struct{}, maxConns)
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.ENOMEM) {
			// The files that are held must not be lost over this: wait until some are free.
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if err != nil {
			return fmt.Errorf("the keeper's socket broke: %w", err)
		}
		if allowed(c) != nil {
			c.Close()
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			c.Close()
			return nil
		}
		clients.Add(1)
		go func() {
			defer func() { c.Close(); <-slots; clients.Done() }()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			k.client(c)
		}()
	}
}

// client answers one connection until it ends, errs or stays silent.
func (k *keeper) client(c *net.UnixConn) {
	for {
		if c.SetDeadline(time.Now().Add(idle)) != nil {
			return
		}
		m, err := receive(c)
		if errors.Is(err, errMalformed) {
			send(c, message{code: statusBad, text: err.Error(), fd: none})
		}
		if err != nil {
			return
		}
		a := k.answer(m)
		err = send(c, a)
		if a.fd != none {
			unix.Close(a.fd)
		}
		if err != nil {
			return
		}
	}
}

// answer does what m asks for. It owns m's file, and the caller the answer's.
func (k *keeper) answer(m message) message {
	k.mu.Lock()
	defer k.mu.Unlock()
	fd, have := k.files[m.text]
	if m.code == opPut && m.fd != none && checkName(m.text) == nil && !have && len(k.files) < MaxFiles {
		k.files[m.text] = m.fd
		return message{code: statusOK, fd: none}
	}
	if m.fd != none {
		unix.Close(m.fd)
	}
	bad := func(text string) message { return message{code: statusBad, text: text, fd: none} }
	switch {
	case m.code == opList:
		return message{code: statusOK, text: strings.Join(k.namesLocked(), "\x00"), fd: none}
	case checkName(m.text) != nil:
		return bad("the name is none")
	case m.code == opPut && have:
		return message{code: statusExists, fd: none}
	case m.code == opPut && m.fd == none:
		return bad("no file came along")
	case m.code == opPut:
		return message{code: statusFull, fd: none}
	case m.code != opGet && m.code != opDrop:
		return bad("there is no such call")
	case !have:
		return message{code: statusAbsent, fd: none}
	case m.code == opDrop:
		delete(k.files, m.text)
		unix.Close(fd)
		return message{code: statusOK, fd: none}
	}
	d, err := duplicate(fd)
	if err != nil {
		return bad(err.Error())
	}
	return message{code: statusOK, fd: d}
}

func (k *keeper) namesLocked() []string {
	return slices.Sorted(maps.Keys(k.files))
}

// drop closes everything, at the end.
func (k *keeper) drop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for n, fd := range k.files {
		unix.Close(fd)
		delete(k.files, n)
	}
}
