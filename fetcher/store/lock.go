package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// lockPoll is how often a lock held by another process is tried again. flock(2) cannot be bounded by a context, so it is polled; 50 ms
// is below what a person notices and costs nothing beside the download that is being waited for.
const lockPoll = 50 * time.Millisecond

// tryFlock takes the lock without waiting; false when somebody else holds one that excludes it.
func tryFlock(f *os.File, how int) (bool, error) {
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		switch {
		case err == nil:
			return true, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EWOULDBLOCK):
			return false, nil
		default:
			return false, fmt.Errorf("lock %s: %w (the store needs a file system with flock)", f.Name(), err)
		}
	}
}

// lockStore excludes pinning, evicting and removing from each other, in this process and in others. What runs under it is short: no
// data is read or deleted, so waiting is not bounded by a context.
func (s *Store) lockStore() (unlock func(), err error) {
	s.lockMu.Lock()
	for {
		err = unix.Flock(int(s.lock.Fd()), unix.LOCK_EX)
		if err == nil {
			return func() {
				_ = unix.Flock(int(s.lock.Fd()), unix.LOCK_UN)
				s.lockMu.Unlock()
			}, nil
		}
		if !errors.Is(err, unix.EINTR) {
			s.lockMu.Unlock()
			if errors.Is(err, unix.EBADF) {
				return nil, ErrClosed
			}
			return nil, fmt.Errorf("lock store %s: %w", s.dir, err)
		}
	}
}

// lockUse makes the blob's folder if need be and takes the lock that keeps it from being removed. Between opening the file and locking
// it the folder may have gone to the trash: only a lock on the file that the path still names counts.
func lockUse(ctx context.Context, dir string) (*os.File, error) {
	path := filepath.Join(dir, fileUsed)
	for {
		if err := os.Mkdir(dir, modeDir); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, noSpace(err)
		}
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, modeFile)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, noSpace(err)
		}
		if err == nil {
			ok, err := tryFlock(f, unix.LOCK_SH)
			if err == nil && ok && samePath(f, path) {
				return f, nil
			}
			f.Close()
			if err != nil {
				return nil, err
			}
			if ok { // locked, but gone: begin again at once
				continue
			}
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

// lockRemove takes the lock under which a blob may be removed, nil when somebody has it open. The caller holds the store lock, so
// nobody else renames the folder meanwhile.
func lockRemove(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, fileUsed), os.O_RDWR|os.O_CREATE, modeFile)
	if err != nil {
		return nil, err
	}
	ok, err := tryFlock(f, unix.LOCK_EX)
	if err != nil || !ok {
		f.Close()
		return nil, err
	}
	return f, nil
}

// lockWriter waits until this process alone may fill the blob in dir.
func (s *Store) lockWriter(ctx context.Context, d digest.Digest, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, fileWriter), os.O_RDWR|os.O_CREATE, modeFile)
	if err != nil {
		return nil, noSpace(err)
	}
	told := false
	for {
		ok, err := tryFlock(f, unix.LOCK_EX)
		if err != nil {
			f.Close()
			return nil, err
		}
		if ok {
			break
		}
		if !told {
			told = true
			pid := readPid(f)
			s.log.Debug("blob is being filled by another process, waiting", "digest", d, "pid", pid)
			if s.onWait != nil {
				s.onWait(d, pid)
			}
		}
		if err := pause(ctx); err != nil {
			pid := readPid(f)
			f.Close()
			return nil, fmt.Errorf("blob %s is being filled by process %d: %w", d, pid, err)
		}
	}
	// The pid only serves the message above: no error here is worth failing for.
	if f.Truncate(0) == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

// readPid is the pid that the holder wrote, 0 when it has not yet.
func readPid(f *os.File) int {
	b := make([]byte, 16)
	n, _ := f.ReadAt(b, 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil || pid < 0 {
		return 0
	}
	return pid
}

// samePath tells whether path still names the open file f.
func samePath(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

func pause(ctx context.Context) error {
	t := time.NewTimer(lockPoll)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
