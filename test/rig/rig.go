package rig

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
)

// KeepVariable names the environment variable that, when not empty, keeps a rig's folder (logs, stores) after Close.
const KeepVariable = "QUAY_RIG_KEEP"

// TB is the part of *testing.T and *testing.B that a rig uses; the demo has neither.
type TB interface {
	Helper()
	Cleanup(func())
	Failed() bool
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Skipf(format string, args ...any)
}

// Rig owns processes, namespaces, mounts and folders. Make one with New or ForTest.
type Rig struct {
	id   string // four hex digits, unique among the rigs of this machine
	dir  string
	keep bool

	closing sync.Mutex // held while Close runs, so that a second caller waits for the first

	mu        sync.Mutex // guards following
	closed    bool
	cleanups  []func() error
	processes []*Process
	// namespaces counts those that were made: the number is part of the name, so that two networks of a rig do not collide.
	namespaces int
	names      map[string]int // how many of each kind were named
}

// New makes an empty rig and, first, removes what dead runs left behind. Its folder is short on purpose: the path of a
// unix socket has at most 107 bytes.
func New() (*Rig, error) {
	base := baseDir()
	if err := os.MkdirAll(base, 0o755); err != nil {
		return nil, fmt.Errorf("make the folder of test rigs: %w", err)
	}
	sweep(base)
	// 65,536 names and a handful of rigs: a few attempts are plenty.
	for range 16 {
		raw := make([]byte, 2)
		rand.Read(raw) // never fails
		id := hex.EncodeToString(raw)
		dir := filepath.Join(base, id)
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("make a test rig's folder: %w", err)
		}
		if err := writeOwner(dir); err != nil {
			return nil, errors.Join(err, os.RemoveAll(dir))
		}
		r := &Rig{id: id, dir: dir, keep: os.Getenv(KeepVariable) != ""}
		track(r)
		return r, nil
	}
	return nil, fmt.Errorf("no free name for a test rig in %s", base)
}

// ForTest makes a rig that lives as long as the test. When the test fails, the tail of every process's log is printed.
func ForTest(t TB) *Rig {
	t.Helper()
	r, err := New()
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		t.Helper()
		if t.Failed() {
			r.DumpLogs(logWriter{t})
		}
		if err := r.Close(); err != nil {
			t.Errorf("take the rig down: %v", err)
		}
	})
	return r
}

// RequireRoot skips the test when it does not run as root, which namespaces, mounts and the engines need.
func RequireRoot(t TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("needs root, for namespaces, mounts and containers")
	}
}

// ID is the part of every name (namespaces, folders) that is this rig's own.
func (r *Rig) ID() string { return r.id }

// Dir makes, if needed, and returns the folder of this name inside the rig's own. It is removed by Close.
func (r *Rig) Dir(name string) (string, error) {
	dir := filepath.Join(r.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make the rig's folder %s: %w", name, err)
	}
	return dir, nil
}

// Cleanup has f called by Close, before everything that was registered earlier.
func (r *Rig) Cleanup(f func() error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

// Close takes everything down, newest first, and goes on past errors, which it returns together. A second Close does
// nothing.
func (r *Rig) Close() error {
	r.closing.Lock()
	defer r.closing.Unlock()
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	r.mu.Unlock()

	var errs []error
	for {
		r.mu.Lock()
		n := len(r.cleanups)
		if n == 0 {
			r.mu.Unlock()
			break
		}
		f := r.cleanups[n-1]
		r.cleanups = r.cleanups[:n-1]
		r.mu.Unlock()
		errs = append(errs, f())
	}
	// Whatever a daemon forgot: its children that outlive it on purpose (shims, containers), then mounts.
	killUnder(r.dir)
	forgetContainers(r.dir)
	errs = append(errs, unmountUnder(r.dir))
	if !r.keep {
		errs = append(errs, os.RemoveAll(r.dir))
	}
	untrack(r)
	return errors.Join(errs...)
}

// DumpLogs writes the tail of every process's log, in the order of their first starts.
func (r *Rig) DumpLogs(w io.Writer) {
	r.mu.Lock()
	processes := slices.Clone(r.processes)
	r.mu.Unlock()
	dumped := map[string]bool{}
	for i, p := range processes {
		if dumped[p.LogPath()] {
			continue
		}
		dumped[p.LogPath()] = true
		for _, later := range processes[i:] {
			if later.LogPath() == p.LogPath() {
				p = later // a restart: its state is the one that counts
			}
		}
		fmt.Fprintf(w, "--- %s (%s)\n%s\n", p.Name(), p.State(), p.Tail(dumpLines))
	}
}

// dumpLines is how much of a log a failed test shows: enough for a stack trace, few enough for seven daemons on one screen.
const dumpLines = 40

// logWriter lets DumpLogs write into a test's log.
type logWriter struct{ t TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Helper()
	w.t.Logf("%s", p)
	return len(p), nil
}

func baseDir() string { return filepath.Join(os.TempDir(), "quay-rig") }

// live holds the rigs that a signal must take down.
var live struct {
	mu      sync.Mutex // guards following
	rigs    []*Rig
	signals chan os.Signal
}

func track(r *Rig) {
	live.mu.Lock()
	defer live.mu.Unlock()
	live.rigs = append(live.rigs, r)
	if live.signals != nil {
		return
	}
	c := make(chan os.Signal, 1)
	live.signals = c
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM)
	go closeOnSignal(c)
}

func untrack(r *Rig) {
	live.mu.Lock()
	defer live.mu.Unlock()
	live.rigs = slices.DeleteFunc(live.rigs, func(other *Rig) bool { return other == r })
	if len(live.rigs) == 0 && live.signals != nil {
		signal.Stop(live.signals)
		close(live.signals)
		live.signals = nil
	}
}

// closeOnSignal takes all rigs down at the first signal and then lets the signal do what it does by default.
func closeOnSignal(c chan os.Signal) {
	s, ok := <-c
	if !ok {
		return
	}
	live.mu.Lock()
	rigs := slices.Clone(live.rigs)
	live.mu.Unlock()
	fmt.Fprintf(os.Stderr, "rig: %s, taking everything down\n", s)
	for _, r := range slices.Backward(rigs) {
		if err := r.Close(); err != nil {
			fmt.Fprintf(os.Stderr, "rig: %v\n", err)
		}
	}
	signal.Reset(s)
	if number, ok := s.(syscall.Signal); ok {
		_ = syscall.Kill(os.Getpid(), number)
	}
}

// writeOwner records who made the rig in dir: process ID and its start time, since process IDs come again.
func writeOwner(dir string) error {
	pid := os.Getpid()
	owner := strconv.Itoa(pid) + " " + startTime(pid)
	if err := os.WriteFile(filepath.Join(dir, ownerFile), []byte(owner), 0o644); err != nil {
		return fmt.Errorf("record the owner of a test rig: %w", err)
	}
	return nil
}

const ownerFile = "owner"
