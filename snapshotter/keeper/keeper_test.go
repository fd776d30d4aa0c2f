package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The test binary is the keeper's process too.
const socketEnv = "KEEPER_TEST_SOCKET"

func TestMain(m *testing.M) {
	path := os.Getenv(socketEnv)
	if path == "" {
		goleak.VerifyTestMain(m)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	err := Run(ctx, path)
	cancel()
	if err != nil {
		os.Exit(1)
	}
	os.Exit(0)
}

// run runs a keeper in this process, and gives its socket.
func run(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keeper.sock")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, path) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error("Run:", err)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Error("the socket is left:", err)
		}
	})
	for {
		if _, err := Dial(t.Context(), path); err == nil {
			return path
		}
		select {
		case err := <-done:
			done <- nil
			t.Fatal(err)
		case <-time.After(time.Millisecond):
		}
	}
}

// pipe gives the reading end of a pipe that holds text.
func pipe(t *testing.T, text string) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(w, text)
	w.Close()
	t.Cleanup(func() { r.Close() })
	return r
}

// suite is what every Store does. again gives the store that the next process has.
func suite(t *testing.T, s Store, again func() Store) {
	ctx := t.Context()
	if l, err := s.List(ctx); len(l) != 0 || err != nil {
		t.Fatalf("a new store has %v, %v", l, err)
	}
	if _, err := s.Get(ctx, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Get of what is not there: %v", err)
	}
	if err := s.Drop(ctx, "a"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Drop of what is not there: %v", err)
	}
	f := pipe(t, "hello")
	for _, name := range []string{"", "a b", "a:b", "a/b", "a\nb", "a\x00b", strings.Repeat("n", maxName+1)} {
		if err := s.Put(ctx, name, f); err == nil {
			t.Errorf("the name %q is accepted", name)
		}
	}
	if err := s.Put(ctx, "b", f); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(ctx, "a", pipe(t, "x")); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(ctx, "b", pipe(t, "y")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Put of a name twice: %v", err)
	}
	f.Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}

	s = again()
	defer func() { s.Close() }()
	if l, err := s.List(ctx); !slices.Equal(l, []string{"a", "b"}) || err != nil {
		t.Fatalf("List: %v, %v", l, err)
	}
	g, err := s.Get(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := io.ReadAll(g); string(text) != "hello" || err != nil {
		t.Errorf("the file has %q, %v", text, err)
	}
	raw, _ := g.SyscallConn()
	raw.Control(func(fd uintptr) {
		if flags, err := unix.FcntlInt(fd, unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Error("the file is open in children")
		}
	})
	g.Close()
	for _, name := range []string{"a", "b"} {
		if err := s.Drop(ctx, name); err != nil {
			t.Error(err)
		}
	}
	if l, err := s.List(ctx); len(l) != 0 || err != nil {
		t.Errorf("after Drop: %v, %v", l, err)
	}
	for i := range MaxFiles {
		if err := s.Put(ctx, fmt.Sprint(strings.Repeat("n", maxName-2), 10+i), f2(t)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Put(ctx, "more", f2(t)); !errors.Is(err, ErrFull) {
		t.Errorf("one too many: %v", err)
	}
	if l, err := s.List(ctx); len(l) != MaxFiles || err != nil {
		t.Errorf("List of a full store: %d, %v", len(l), err)
	}
	done, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Drop(done, "more"); err == nil {
		t.Error("Drop after the end of its context")
	}
	var all sync.WaitGroup
	for i := range MaxFiles {
		all.Go(func() {
			if err := s.Drop(ctx, fmt.Sprint(strings.Repeat("n", maxName-2), 10+i)); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func f2(t *testing.T) *os.File { return pipe(t, "") }

func TestClient(t *testing.T) {
	path := run(t)
	dial := func() Store {
		c, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	suite(t, dial(), dial)
	if i, err := os.Stat(path); err != nil || i.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", i.Mode(), err)
	}
	if err := Run(t.Context(), path); !errors.Is(err, ErrRunning) {
		t.Errorf("a second keeper: %v", err)
	}
}

func TestDialWithoutKeeper(t *testing.T) {
	if _, err := Dial(t.Context(), filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("there is no keeper, and no error")
	}
	// One that takes connections and does not answer.
	path := filepath.Join(t.TempDir(), "mute")
	l, err := net.Listen("unixpacket", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a mute keeper: %v", err)
	}
}

// Whatever comes, the keeper goes on, keeps what it has, and keeps no file of garbage.
func TestGarbage(t *testing.T) {
	path := run(t)
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Put(t.Context(), "kept", pipe(t, "x")); err != nil {
		t.Fatal(err)
	}
	head := func(code byte, text string) []byte { return append([]byte{'Q', 'K', version, code}, text...) }
	for name, g := range map[string]struct {
		p     []byte
		files int
	}{
		"zeros":            {make([]byte, 100), 0},
		"short":            {[]byte("QK"), 1},
		"version":          {[]byte{'Q', 'K', version + 1, opDrop, 'k'}, 0},
		"long":             {head(opList, strings.Repeat("x", messageSize)), 1},
		"longer":           {make([]byte, 100<<10), 0},
		"op":               {head(99, "kept"), 1},
		"put without file": {head(opPut, "new"), 0},
		"put of two":       {head(opPut, "new"), 2},
		"put of many":      {head(opPut, "new"), 200},
		"put over":         {head(opPut, "kept"), 1},
		"bad name":         {head(opPut, "n/w"), 1},
		"get with file":    {head(opGet, "kept"), 1},
	} {
		conn, err := net.Dial("unixpacket", path)
		if err != nil {
			t.Fatal(err)
		}
		r, w, _ := os.Pipe()
		var rights []byte
		if g.files > 0 {
			fds := make([]int, g.files)
			for i := range fds {
				fds[i] = int(w.Fd())
			}
			rights = unix.UnixRights(fds...)
		}
		if _, _, err := conn.(*net.UnixConn).WriteMsgUnix(g.p, rights, nil); err != nil {
			t.Fatal(name, err)
		}
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		io.Copy(io.Discard, io.LimitReader(conn, 1))
		conn.Close()
		w.Close()
		// The pipe ends only when the keeper has closed what came along.
		r.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := r.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%s: the keeper keeps a file: %v", name, err)
		}
		r.Close()
	}
	if l, err := c.List(t.Context()); !slices.Equal(l, []string{"kept"}) || err != nil {
		t.Errorf("after garbage: %v, %v", l, err)
	}
}

func FuzzMessage(f *testing.F) {
	f.Add([]byte{'Q', 'K', version, opPut, 'a'})
	f.Add([]byte{'Q', 'K', version, opList})
	f.Add([]byte("QK\x01\x02"))
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := parse(p)
		if err != nil {
			return
		}
		k := &keeper{files: map[string]int{}}
		if a := k.answer(m); a.fd != none || len(k.files) != 0 {
			t.Fatal("it has a file that nobody gave")
		}
		m.check("x")
	})
}
