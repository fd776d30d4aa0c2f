package layerfs

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/blobfs"
	"github.com/docker-quay/docker-quay/snapshotter/keeper"
)

// keeperArgument has the test binary be the keeper.
const keeperArgument = "keeper-of-the-test"

func TestMain(m *testing.M) {
	if len(os.Args) < 3 || os.Args[1] != keeperArgument {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	if err := keeper.Run(ctx, os.Args[2]); err != nil {
		os.Exit(1)
	}
}

// text is a data file that is there.
type text string

func (t text) Size() int64 { return int64(len(t)) }

func (t text) ReadAt(_ context.Context, p []byte, off int64) error {
	copy(p, t[off:])
	return nil
}

// TestLinkThatCannotGoOn: where the kernel does not send again what the former daemon did not answer, its connection is given up, which
// is said, and the next one serves.
func TestLinkThatCannotGoOn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var log strings.Builder
	o := Options{
		State: dir, Socket: filepath.Join(dir, "keeper.sock"), Log: slog.New(slog.NewTextHandler(&log, nil)),
	}
	o.Keeper = []string{exe, keeperArgument, o.Socket}
	t.Cleanup(func() {
		if err := Abandon(context.Background(), o.State, o.Socket); err != nil {
			t.Error(err)
		}
	})
	former, err := newLink(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	names, err := former.kept.List(t.Context())
	if err != nil || former.taken || len(names) != 1 {
		t.Errorf("the first: taken %v, kept %q, %v", former.taken, names, err)
	}
	if err := errors.Join(former.stop(), former.close()); err != nil {
		t.Fatal(err)
	}
	l, err := newLinkBy(t.Context(), o, func(*blobfs.Server) error { return errors.New("the kernel is too old") })
	if err != nil {
		t.Fatal(err)
	}
	now, err := l.kept.List(t.Context())
	if err != nil || l.taken || len(now) != 1 || now[0] == names[0] {
		t.Errorf("the second: taken %v, kept %q after %q, %v", l.taken, now, names, err)
	}
	if !strings.Contains(log.String(), "level=ERROR") || !strings.Contains(log.String(), "the kernel is too old") {
		t.Errorf("the log says %q", &log)
	}
	if err := l.server.Add(1<<32, "a", text("hello")); err != nil {
		t.Fatal(err)
	}
	// Go's own files would be polled, which a process that serves itself must not wait for.
	if b, err := readOwn(l.path("a")); err != nil || b != "hello" {
		t.Errorf("got %q, %v", b, err)
	}
	if err := l.destroy(); err != nil {
		t.Error(err)
	}
}

func readOwn(path string) (string, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	b := make([]byte, 100)
	n, err := unix.Pread(fd, b, 0)
	return string(b[:max(n, 0)]), err
}
