package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
}

// lines is a log that tests look into.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lines) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// rig is a snapshotter in a test's folder, that leaves neither mounts nor goroutines behind.
type rig struct {
	*Snapshots
	t     *testing.T
	root  string
	log   *lines
	erofs *layerfs.Options // nil: FUSE trees
}

func newRig(t *testing.T, layers lazy.Layers) *rig {
	t.Helper()
	needRoot(t)
	// Another snapshotter's database keeps no goroutine; go-fuse's end with the mounts.
	before := goleak.IgnoreCurrent()
	root := filepath.Join(t.TempDir(), "root")
	r := &rig{t: t, root: root, log: new(lines)}
	r.open(layers)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error("Close:", err)
		}
		if left := mountsBelow(t, root); len(left) > 0 {
			t.Errorf("mounts left: %v", left)
		}
		goleak.VerifyNone(t, before)
		if t.Failed() {
			t.Log(r.log)
		}
	})
	return r
}

// open opens the rig's folder, again after a Close.
func (r *rig) open(layers lazy.Layers) {
	r.t.Helper()
	captureLibraryLog(r.log.logger())
	s, err := OpenSnapshots(r.t.Context(), r.root, Mounting{EROFS: r.erofs, Layers: layers}, r.log.logger())
	if err != nil {
		r.t.Fatal(err)
	}
	r.Snapshots = s
	<-s.Restored()
}

// pull prepares layers as containerd does, bottom first, unpacking those that are
// not lazy, and returns the chain IDs and whether each layer was lazy.
func (r *rig) pull(layers ...lazytest.Layer) (chain []string, lazily []bool) {
	r.t.Helper()
	return r.pullAs(func(map[string]string) {}, layers...)
}

// pullAs is pull with labels changed by relabel.
func (r *rig) pullAs(relabel func(map[string]string), layers ...lazytest.Layer) (chain []string, lazily []bool) {
	r.t.Helper()
	parent := ""
	for i, l := range layers {
		name := fmt.Sprintf("%s/%d-%s", r.t.Name(), i, l.Desc.Digest.Encoded()[:12])
		labels := lazytest.Labels(l, layers[i+1:]...)
		relabel(labels)
		was := r.prepare(name, parent, l, labels)
		chain, lazily = append(chain, name), append(lazily, was)
		parent = name
	}
	return chain, lazily
}

// layer prepares one layer under a name.
func (r *rig) layer(name, parent string, l lazytest.Layer) (lazily bool) {
	r.t.Helper()
	return r.prepare(name, parent, l, lazytest.Labels(l))
}

func (r *rig) prepare(name, parent string, l lazytest.Layer, labels map[string]string) (lazily bool) {
	r.t.Helper()
	ctx := r.t.Context()
	labels[targetLabel] = name
	key := "extract-" + name
	m, err := r.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		if _, err := r.Stat(ctx, name); err != nil {
			r.t.Fatal("the layer is said to be there, but is not:", err)
		}
		return true
	}
	if err != nil {
		r.t.Fatal(err)
	}
	if err := mount.WithTempMount(ctx, m, func(dir string) error {
		_, err := archive.Apply(ctx, dir, bytes.NewReader(l.Tar))
		return err
	}); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Commit(ctx, name, key); err != nil {
		r.t.Fatal(err)
	}
	return false
}

// in mounts what is on top of the chain and calls fn with the folder.
func (r *rig) in(parent string, fn func(dir string)) {
	r.t.Helper()
	ctx := r.t.Context()
	key := "container-" + parent
	m, err := r.Prepare(ctx, key, parent)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := mount.WithTempMount(ctx, m, func(dir string) error { fn(dir); return nil }); err != nil {
		r.t.Fatal(err)
	}
	if err := r.Remove(ctx, key); err != nil {
		r.t.Fatal(err)
	}
}

// unpacked unpacks layers into a folder, as containerd does without a snapshotter.
func unpacked(t *testing.T, layers ...lazytest.Layer) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "reference")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		if _, err := archive.Apply(context.Background(), dir, bytes.NewReader(l.Tar)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// describe writes a tree down, one line a file, with everything a program can see of it.
func describe(t *testing.T, root string) string {
	t.Helper()
	links := map[uint64]string{} // inode → first name
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		line := fmt.Sprintf("%s mode=%o uid=%d gid=%d", rel, st.Mode, st.Uid, st.Gid)
		if rel != "." { // the root's time and size are those of the snapshot's folder
			line += fmt.Sprintf(" mtime=%d", st.Mtim.Sec)
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" nlink=%d size=%d sum=%x", st.Nlink, st.Size, sum(b))
			if st.Nlink > 1 {
				if _, ok := links[st.Ino]; !ok {
					links[st.Ino] = rel
				}
				line += " same as " + links[st.Ino]
			}
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" rdev=%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		line += xattrs(t, path)
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

func xattrs(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil && !errors.Is(err, unix.ENOTSUP) {
		t.Fatal(path, err)
	}
	var all []string
	for name := range strings.SplitSeq(string(buf[:max(n, 0)]), "\x00") {
		if name == "" {
			continue
		}
		val := make([]byte, 4096)
		n, err := unix.Lgetxattr(path, name, val)
		if err != nil {
			t.Fatal(path, name, err)
		}
		all = append(all, fmt.Sprintf(" %s=%q", name, val[:n]))
	}
	sort.Strings(all)
	return strings.Join(all, "")
}

// mountsBelow lists the mountpoints below dir.
func mountsBelow(t *testing.T, dir string) (found []string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir) {
			found = append(found, f[4])
		}
	}
	return found
}

func file(name, body string, mode int64) lazytest.Entry {
	return lazytest.Entry{Header: tar.Header{Name: name, Mode: mode}, Body: body}
}

func special(h tar.Header) lazytest.Entry { return lazytest.Entry{Header: h} }
