package keeper

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// manager is as much of systemd as a unit with a file descriptor store sees.
type manager struct {
	t     *testing.T
	c     *net.UnixConn
	done  chan struct{}
	mu    sync.Mutex
	names []string
	fds   []int
}

func newManager(t *testing.T) *manager {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	m := &manager{t: t, c: c, done: make(chan struct{})}
	go m.loop()
	t.Cleanup(func() { c.Close(); <-m.done; closeAll(m.fds) })
	t.Setenv("NOTIFY_SOCKET", path)
	for _, e := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		t.Setenv(e, "")
	}
	return m
}

func (m *manager) loop() {
	defer close(m.done)
	p, oob := make([]byte, 4096), make([]byte, 1024)
	for {
		n, on, _, _, err := m.c.ReadMsgUnix(p, oob)
		if err != nil {
			return
		}
		fds := descriptors(oob[:on])
		lines := strings.Split(string(p[:n]), "\n")
		name := ""
		for _, l := range lines {
			if v, ok := strings.CutPrefix(l, "FDNAME="); ok {
				name = v
			}
		}
		m.mu.Lock()
		switch {
		case slices.Contains(lines, "FDSTORE=1"):
			for _, fd := range fds {
				m.names, m.fds = append(m.names, name), append(m.fds, fd)
			}
			fds = nil
		case slices.Contains(lines, "FDSTOREREMOVE=1"):
			for i := len(m.names) - 1; i >= 0; i-- {
				if m.names[i] == name {
					unix.Close(m.fds[i])
					m.names, m.fds = slices.Delete(m.names, i, i+1), slices.Delete(m.fds, i, i+1)
				}
			}
		}
		m.mu.Unlock()
		closeAll(fds) // also a barrier's
	}
}

// TestSystemd has the next process's descriptors where this process's own ones are, so
// it moves the numbers that systemd would use by way of adopt.
func TestSystemd(t *testing.T) {
	m := newManager(t)
	s, err := NewSystemd()
	if err != nil {
		t.Fatal(err)
	}
	suite(t, s, func() Store {
		m.mu.Lock()
		defer m.mu.Unlock()
		base := 500
		for i, fd := range m.fds {
			if err := unix.Dup2(fd, base+i); err != nil {
				t.Fatal(err)
			}
		}
		// Files that are not ours are left alone, and so are names that we cannot have.
		t.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		t.Setenv("LISTEN_FDS", strconv.Itoa(len(m.fds)))
		t.Setenv("LISTEN_FDNAMES", strings.Join(append(slices.Clone(m.names), "stored", "quay.a b"), ":"))
		s, err := adopt(base)
		if err != nil {
			t.Fatal(err)
		}
		if os.Getenv("LISTEN_FDS") != "" {
			t.Error("children would take the files for theirs")
		}
		return s
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.fds) != 0 {
		t.Errorf("systemd is left with %v", m.names)
	}
}

func TestSystemdAbsent(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	if _, err := NewSystemd(); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("without systemd: %v", err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "none"))
	s, err := NewSystemd()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Put(t.Context(), "a", pipe(t, "")); err == nil {
		t.Error("nobody took the file, and no error")
	}
	if l, _ := s.List(t.Context()); len(l) != 0 {
		t.Errorf("a file that nobody took is listed: %v", l)
	}
}
