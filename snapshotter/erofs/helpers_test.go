package erofs

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs/treetest"
	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// layer is a tree in the making.
type layer struct {
	entries  []index.Entry
	contents map[string]string // of regular files, by path
	links    map[string]string // hard links: path → the first name
}

func newLayer() *layer {
	l := &layer{contents: map[string]string{}, links: map[string]string{}}
	return l.add(index.Entry{Mode: unix.S_IFDIR | 0o755, Sec: 1_600_000_000})
}

func (l *layer) add(e index.Entry) *layer {
	e.HardLink = -1
	slices.SortFunc(e.Xattrs, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
	l.entries = append(l.entries, e)
	return l
}

func (l *layer) dir(path string, mode uint32, xattrs ...index.Xattr) *layer {
	return l.add(index.Entry{Path: path, Mode: unix.S_IFDIR | mode, Sec: 1_500_000_000, Nsec: 42, Xattrs: xattrs})
}

func (l *layer) file(path string, mode uint32, contents string, xattrs ...index.Xattr) *layer {
	l.contents[path] = contents
	return l.add(index.Entry{Path: path, Mode: unix.S_IFREG | mode, Size: int64(len(contents)),
		Sec: 1_234_567_890, Nsec: 123_456_789, Xattrs: xattrs})
}

func (l *layer) symlink(path, target string) *layer {
	return l.add(index.Entry{Path: path, Mode: unix.S_IFLNK | 0o777, Link: target, Sec: 7})
}

func (l *layer) link(path, to string) *layer {
	l.links[path] = to
	return l.add(index.Entry{Path: path})
}

func (l *layer) whiteout(path string) *layer {
	return l.add(index.Entry{Path: path, Mode: unix.S_IFCHR})
}

// finish puts the entries in order and gives the files their places in the data.
func (l *layer) finish() (entries []index.Entry, data []byte) {
	slices.SortFunc(l.entries, func(a, b index.Entry) int {
		return slices.Compare(strings.Split(a.Path, "/"), strings.Split(b.Path, "/"))
	})
	at := map[string]int{}
	for i := range l.entries {
		e := &l.entries[i]
		at[e.Path] = i
		if e.Size > 0 {
			e.Data = int64(len(data))
			data = append(data, l.contents[e.Path]...)
			data = append(data, make([]byte, alignUp(int64(len(data)), blockSize)-int64(len(data)))...)
		}
	}
	for path, to := range l.links {
		l.entries[at[path]].HardLink = at[to]
	}
	return l.entries, data
}

// body is n bytes that no other seed gives.
func body(seed string, n int) string {
	var b strings.Builder
	for i := 0; b.Len() < n; i++ {
		s := sha256.Sum256(fmt.Append(nil, seed, i))
		b.Write(s[:])
	}
	return b.String()[:n]
}

// workDir is a folder in which what can be mounted is mounted.
func workDir(t testing.TB, way Support) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	var why error
	for _, in := range []string{os.TempDir(), "/var/tmp", "/dev/shm"} {
		dir, err := os.MkdirTemp(in, "erofs-test-")
		if err != nil {
			why = err
			continue
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if way == Loop {
			try := filepath.Join(dir, "try")
			if why = os.Mkdir(try, 0o700); why == nil {
				why = tryMount(try, MountOptions{Loop: true})
			}
		} else {
			_, why = Probe(dir)
		}
		if why == nil {
			return dir
		}
	}
	t.Skipf("this machine cannot mount images as %v: %v", way, why)
	return ""
}

// mountLayer writes a layer's two files in a folder and mounts them.
func mountLayer(t testing.TB, dir string, entries []index.Entry, data []byte, o MountOptions) string {
	t.Helper()
	meta, err := os.Create(filepath.Join(dir, "meta"))
	if err != nil {
		t.Fatal(err)
	}
	defer meta.Close()
	if err := Write(meta, entries, int64(len(data))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "data"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	return mountFiles(t, dir, o)
}

func mountFiles(t testing.TB, dir string, o MountOptions) string {
	t.Helper()
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Mount(filepath.Join(dir, "meta"), mnt, filepath.Join(dir, "data"), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(mnt); err != nil {
			t.Error(err)
		}
	})
	return mnt
}

// unpack makes the same tree as ordinary files: what the mounted image must equal.
func unpack(t testing.TB, root string, l *layer, entries []index.Entry) string {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(root, 0o700))
	at := func(path string) string { return filepath.Join(root, path) }
	for _, e := range entries {
		if e.HardLink >= 0 {
			continue
		}
		switch p := at(e.Path); e.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			if e.Path != "" {
				must(os.Mkdir(p, 0o700))
			}
		case unix.S_IFREG:
			must(os.WriteFile(p, []byte(l.contents[e.Path]), 0o600))
		case unix.S_IFLNK:
			must(os.Symlink(e.Link, p))
		default:
			must(unix.Mknod(p, e.Mode, int(unix.Mkdev(e.Major, e.Minor))))
		}
	}
	for _, e := range entries {
		if e.HardLink >= 0 {
			must(os.Link(at(entries[e.HardLink].Path), at(e.Path)))
		}
	}
	for _, e := range slices.Backward(entries) {
		if e.HardLink >= 0 {
			continue
		}
		p := at(e.Path)
		must(unix.Lchown(p, int(e.UID), int(e.GID)))
		if !isSymlink(&e) {
			must(unix.Chmod(p, e.Mode&0o7777))
		}
		for _, x := range e.Xattrs {
			must(unix.Lsetxattr(p, x.Name, []byte(x.Value), 0))
		}
		times := []unix.Timespec{{Sec: e.Sec, Nsec: int64(e.Nsec)}, {Sec: e.Sec, Nsec: int64(e.Nsec)}}
		must(unix.UtimesNanoAt(unix.AT_FDCWD, p, times, unix.AT_SYMLINK_NOFOLLOW))
	}
	return root
}

// equal fails the test with what differs.
func equal(t *testing.T, want, got string, o treetest.Options) {
	t.Helper()
	differences, err := treetest.Compare(want, got, o)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range differences {
		if i == 20 {
			t.Fatalf("and %d more", len(differences)-i)
		}
		t.Error(d)
	}
}

func image(t testing.TB, entries []index.Entry, dataSize int64) []byte {
	t.Helper()
	l, err := Plan("", entries, dataSize)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if n, err := l.WriteTo(&b); err != nil || n != l.Size() || n != int64(b.Len()) {
		t.Fatalf("WriteTo gave %d, %v and wrote %d bytes; the plan has %d", n, err, b.Len(), l.Size())
	}
	return b.Bytes()
}

var _ io.WriterTo = (*Layout)(nil)

var longAgo = time.Date(1938, 7, 6, 5, 4, 3, 0, time.UTC).Unix()
