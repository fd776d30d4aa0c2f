package store

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	digest "github.com/opencontainers/go-digest"
)

// Options say where a store is and what bounds it.
type Options struct {
	// Dir is the store's folder, made if absent. It must lie on a local file system.
	Dir string
	// Quota bounds the bytes that blobs may take on disk; 0 is no bound. Each process that has the store open applies its own.
	Quota int64
	// Log gets what nobody is there to be told: failed background work, damaged files. nil: nothing is logged.
	Log *slog.Logger
	// OnWait is told once per wait that another process is filling the blob; pid is 0 when it is not known (and another process's
	// number when that runs in a pid namespace of its own). It must not block. May be nil.
	OnWait func(d digest.Digest, pid int)
}

// Store is a folder of blobs. All methods may be called at the same time.
type Store struct {
	dir    string
	quota  int64
	log    *slog.Logger
	onWait func(digest.Digest, int)
	bootID string // "" when it could not be read: then nothing is taken to be of this boot

	lockMu sync.Mutex // with the flock on lock: see lockStore
	lock   *os.File

	mu     sync.Mutex
	open   map[digest.Digest]*entry // guarded by mu
	closed bool                     // guarded by mu
}

// bootIDFile changes with every start of the kernel, and with nothing else.
const bootIDFile = "/proc/sys/kernel/random/boot_id"

// Open opens the store in o.Dir and creates what is missing of it. Several processes may have it open.
func Open(o Options) (*Store, error) {
	b, err := os.ReadFile(bootIDFile)
	id := strings.TrimSpace(string(b))
	if err != nil || len(id) > bootIDSize {
		id = ""
	}
	return openBoot(o, id)
}

// openBoot is Open with the boot id given, for tests of what happens after a reboot.
func openBoot(o Options, bootID string) (*Store, error) {
	if o.Dir == "" {
		return nil, errors.New("open store: no folder given")
	}
	if o.Quota < 0 {
		return nil, fmt.Errorf("open store %s: a quota of %d bytes cannot be", o.Dir, o.Quota)
	}
	// A daemon or a person may change the working folder later.
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s := &Store{
		dir:    dir,
		quota:  o.Quota,
		log:    o.Log,
		onWait: o.OnWait,
		bootID: bootID,
		open:   make(map[digest.Digest]*entry),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.makeLayout(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", dir, noSpace(err))
	}
	s.emptyTrash()
	return s, nil
}

func (s *Store) makeLayout() error {
	dirs := []string{dirPins, dirRefs, dirTrash}
	for _, a := range algorithms {
		dirs = append(dirs, filepath.Join(dirBlobs, a.String()), filepath.Join(dirContent, a.String()))
	}
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(s.dir, d), modeDir); err != nil {
			return err
		}
	}
	var err error
	s.lock, err = os.OpenFile(filepath.Join(s.dir, fileLock), os.O_RDWR|os.O_CREATE, modeFile)
	return err
}

// Dir is the store's folder, absolute.
func (s *Store) Dir() string { return s.dir }

// Close waits for the records of completion that are still being written and returns what went wrong with them. Handles that are still
// open stay usable until they are closed, but no new ones are given out.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	var open []*state
	for _, e := range s.open {
		if e.st != nil {
			open = append(open, e.st)
		}
	}
	s.mu.Unlock()

	var errs []error
	for _, st := range open {
		errs = append(errs, st.wait())
	}
	s.mu.Lock()
	last := len(s.open) == 0
	s.mu.Unlock()
	if last { // else the last handle closes it, it may still have to take an empty blob away
		s.closeLock()
	}
	return errors.Join(errs...)
}

// closeLock may be called twice.
func (s *Store) closeLock() {
	s.lockMu.Lock()
	defer s.lockMu.Unlock()
	s.lock.Close()
}

// tempAge is how old a temporary file must be before Open takes it for one that a crash left: writing one takes well under a second.
const tempAge = time.Hour

const tempPrefix = "new-"

// emptyTrash deletes what removals and writes that were cut short have left. Another process may be doing the same.
func (s *Store) emptyTrash() {
	dir := filepath.Join(s.dir, dirTrash)
	es, err := os.ReadDir(dir)
	if err != nil {
		s.log.Warn("store: trash cannot be read", "dir", dir, "error", err)
		return
	}
	for _, e := range es {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			if fi, err := e.Info(); err != nil || time.Since(fi.ModTime()) < tempAge {
				continue // another process is writing it
			}
		}
		s.delete(filepath.Join(dir, e.Name()))
	}
}

func (s *Store) delete(path string) {
	if err := os.RemoveAll(path); err != nil {
		s.log.Warn("store: leftover cannot be deleted", "path", path, "error", err)
	}
}

// trash takes path away in one step; the caller deletes what it returns, best without a lock.
func (s *Store) trash(path string) (trashed string, err error) {
	trashed = filepath.Join(s.dir, dirTrash, "old-"+unique())
	return trashed, os.Rename(path, trashed)
}

func unique() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// writeFile puts b at path in one step: other processes and a crash find all of it or what was there before.
func (s *Store) writeFile(path string, b []byte) (err error) {
	f, err := os.OpenFile(filepath.Join(s.dir, dirTrash, tempPrefix+unique()), os.O_WRONLY|os.O_CREATE|os.O_EXCL, modeFile)
	if err != nil {
		return noSpace(err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
			err = noSpace(err)
		}
	}()
	if _, err = f.Write(b); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func notExist(what string) error { return fmt.Errorf("%s: %w", what, fs.ErrNotExist) }
