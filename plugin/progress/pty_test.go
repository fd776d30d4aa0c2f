package progress

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// openPty opens a pseudo-terminal of a size (pts(4)).
func openPty(t *testing.T, cols, rows uint16) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals: %v", err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no pseudo-terminals: %v", err)
	}
	resize(t, slave, cols, rows)
	t.Cleanup(func() { slave.Close(); master.Close() })
	return master, slave
}

func resize(t *testing.T, tty *os.File, cols, rows uint16) {
	t.Helper()
	if err := unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: cols, Row: rows}); err != nil {
		t.Fatal(err)
	}
}

// screen is what a terminal shows: enough of ECMA-48 for what we send, and a failure for anything else.
type screen struct {
	mu         sync.Mutex
	cols, rows int
	lines      []string // of the whole history; the last rows of them are on screen
	x, y       int      // y is an index into lines
	cursor     bool
	unknown    []string
	pending    string
}

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.pending + string(p)
	s.pending = ""
	for in != "" {
		if in[0] == 0x1b {
			end := strings.IndexFunc(in, func(r rune) bool { return r >= 'A' && r <= 'z' && r != '[' })
			if end < 0 {
				s.pending = in
				break
			}
			s.control(in[:end+1])
			in = in[end+1:]
			continue
		}
		switch c := in[0]; c {
		case '\r':
			s.x = 0
		case '\n':
			s.down()
		default:
			if s.x == s.cols { // wraps when the next character comes
				s.x = 0
				s.down()
			}
			l := []byte(s.line(s.y))
			for len(l) <= s.x {
				l = append(l, ' ')
			}
			l[s.x] = c
			s.lines[s.y] = string(l)
			s.x++
		}
		in = in[1:]
	}
	return len(p), nil
}

func (s *screen) down() { s.y++; s.line(s.y) }

func (s *screen) line(y int) string {
	for len(s.lines) <= y {
		s.lines = append(s.lines, "")
	}
	return s.lines[y]
}

func (s *screen) control(seq string) {
	var n int
	switch {
	case seq == hideCursor:
		s.cursor = false
	case seq == showCursor:
		s.cursor = true
	case seq == eraseLine:
		if l := s.line(s.y); len(l) > s.x {
			s.lines[s.y] = l[:s.x]
		}
	case seq == eraseBelow:
		if l := s.line(s.y); len(l) > s.x {
			s.lines[s.y] = l[:s.x]
		}
		s.lines = s.lines[:s.y+1]
	default:
		if _, err := fmt.Sscanf(seq, cursorUp, &n); err != nil {
			s.unknown = append(s.unknown, seq)
			return
		}
		// The cursor stops at the top of the screen: what scrolled off is out of reach.
		s.y = max(s.y-n, len(s.lines)-s.rows, 0)
	}
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.TrimRight(strings.Join(s.lines, "\n"), "\n ")
}

// waitFor waits until the screen shows something.
func (s *screen) waitFor(t *testing.T, what func(string) bool) string {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		if text := s.text(); what(text) {
			return text
		}
		time.Sleep(5 * time.Millisecond) // the terminal has no event for "drawn"
	}
	t.Fatalf("the terminal shows:\n%s", s.text())
	return ""
}

// TestTerminal looks at what a real terminal shows of many layers, during the pull and when it is interrupted.
func TestTerminal(t *testing.T) {
	t.Setenv("TERM", "xterm")
	master, slave := openPty(t, 80, 10)
	s := &screen{cols: 80, rows: 10, cursor: true}
	copied := make(chan struct{})
	go func() { defer close(copied); _, _ = io.Copy(s, master) }()

	size := TerminalSize(slave)
	if size == nil {
		t.Fatal("the pseudo-terminal is not seen as a terminal")
	}
	var mu sync.Mutex
	blobs := make([]Blob, 30)
	for i := range blobs {
		blobs[i] = Blob{Digest: digest.FromString(strconv.Itoa(i)), Size: 1_000_000, State: Waiting}
	}
	set := func(i int, b Blob) {
		mu.Lock()
		defer mu.Unlock()
		b.Digest, b.Size = blobs[i].Digest, blobs[i].Size
		blobs[i] = b
	}
	poll := func() []Blob {
		mu.Lock()
		defer mu.Unlock()
		return append([]Blob(nil), blobs...)
	}
	r := New(Options{Mode: Auto, Out: slave, Size: size})
	r.Say("before")
	set(20, Blob{State: Fetching, Have: 250_000, FromPeers: 250_000})
	r.Start(poll)
	text := s.waitFor(t, func(text string) bool { return strings.Contains(text, "250kB/1MB") })
	if !strings.HasPrefix(text, "before\n") || strings.Count(text, "total") != 1 || !strings.Contains(text, "more: ") {
		t.Errorf("the terminal shows:\n%s", text)
	}
	if lines := strings.Count(text, "\n"); lines > 9 {
		t.Errorf("%d lines on a terminal of 10", lines+1)
	}
	if s.cursor {
		t.Error("the cursor is shown amid redrawing")
	}
	r.Say("amid")
	set(20, Blob{State: Fetching, Have: 500_000, FromPeers: 500_000})
	set(21, Blob{State: Complete, Have: 1_000_000, FromOrigin: 1_000_000})
	text = s.waitFor(t, func(text string) bool { return strings.Contains(text, "500kB/1MB") })
	if !strings.HasPrefix(text, "before\namid\n") || strings.Count(text, "total") != 1 || strings.Contains(text, "250kB/") {
		t.Errorf("after a redraw the terminal shows:\n%s", text)
	}
	// Interrupted: the last state stays, the cursor is back, and what follows starts on a fresh line.
	r.Close()
	r.Close()
	fmt.Fprint(slave, "$ ")
	text = s.waitFor(t, func(text string) bool { return strings.HasSuffix(text, "\n$") })
	if strings.Count(text, "total") != 1 || !s.cursor {
		t.Errorf("cursor shown: %v; the terminal shows:\n%s", s.cursor, text)
	}
	if len(s.unknown) > 0 {
		t.Errorf("unknown control sequences %q", s.unknown)
	}
	slave.Close()
	<-copied
}

// TestResize: lines that a narrower terminal wrapped are redrawn from their first row.
func TestResize(t *testing.T) {
	s := &screen{cols: 100, rows: 20}
	cols := 100
	r := New(Options{Mode: TTY, Out: s, Size: func() (int, int) { return cols, 20 }})
	r.poll = func() []Blob { return []Blob{{Digest: first, Size: 100, Have: 50, FromPeers: 50, State: Fetching}} }
	r.tick(false)
	// The terminal wraps what it shows.
	s.cols, cols = 40, 40
	var wrapped []string
	for _, l := range s.lines[:s.y] {
		for len(l) > 40 {
			wrapped = append(wrapped, l[:40])
			l = l[40:]
		}
		wrapped = append(wrapped, l)
	}
	s.lines = append(wrapped, "")
	s.y = len(wrapped)
	r.tick(true)
	if text := s.text(); strings.Count(text, "total") != 1 || strings.Count(text, "a1a1a1a1a1a1") != 1 {
		t.Errorf("after resizing the terminal shows:\n%s", text)
	}
}

// TestTerminalSize: a pipe and a dumb terminal are no terminals.
func TestTerminalSize(t *testing.T) {
	_, slave := openPty(t, 80, 10)
	t.Setenv("TERM", "dumb")
	if TerminalSize(slave) != nil {
		t.Error("a dumb terminal was taken for one that can move its cursor")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	t.Setenv("TERM", "xterm")
	if TerminalSize(w) != nil {
		t.Error("a pipe was taken for a terminal")
	}
	if cols, rows := TerminalSize(slave)(); cols != 80 || rows != 10 {
		t.Errorf("size %d×%d", cols, rows)
	}
}
