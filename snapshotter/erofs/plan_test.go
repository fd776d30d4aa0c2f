package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

func TestImageSaysWhatTheEntriesSay(t *testing.T) {
	entries, data := nasty().finish()
	if err := checkImage(image(t, entries, int64(len(data))), entries, int64(len(data))); err != nil {
		t.Error(err)
	}
}

func TestSameEntriesSameBytes(t *testing.T) {
	a, data := nasty().finish()
	b, _ := nasty().finish()
	if !bytes.Equal(image(t, a, int64(len(data))), image(t, b, int64(len(data)))) {
		t.Error("the same tree gave two images")
	}
}

func TestBlobIsInTheImage(t *testing.T) {
	entries, data := nasty().finish()
	plan := func(blob digest.Digest) []byte {
		l, err := Plan(blob, entries, int64(len(data)))
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if _, err := l.WriteTo(&b); err != nil {
			t.Fatal(err)
		}
		if err := checkImage(b.Bytes(), entries, int64(len(data))); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	one, two := digest.FromString("1"), digest.FromString("2")
	a, b := plan(one), plan(two)
	if tag := string(a[deviceOffset : deviceOffset+64]); tag != one.Encoded() {
		t.Errorf("the data file's tag is %q", tag)
	}
	if uuid := a[superOffset+48:][:16]; bytes.Equal(uuid, b[superOffset+48:][:16]) || bytes.Equal(uuid, make([]byte, 16)) {
		t.Error("two layers have the same UUID, or none")
	}
	for _, bad := range []digest.Digest{"x", "sha256:zz", digest.Digest("sha512:" + strings.Repeat("0", 128))} {
		if _, err := Plan(bad, entries, int64(len(data))); err == nil {
			t.Errorf("%s was taken for a layer's digest", bad)
		}
	}
}

func TestWhatCannotBeHeldIsRefused(t *testing.T) {
	root := index.Entry{Mode: unix.S_IFDIR | 0o755, HardLink: -1}
	file := func(path string) index.Entry { return index.Entry{Path: path, Mode: unix.S_IFREG, HardLink: -1} }
	dir := func(path string) index.Entry { return index.Entry{Path: path, Mode: unix.S_IFDIR, HardLink: -1} }
	with := func(e index.Entry, change func(*index.Entry)) index.Entry { change(&e); return e }
	xattrs := func(x ...index.Xattr) index.Entry {
		return with(file("f"), func(e *index.Entry) { e.Xattrs = x })
	}
	large := strings.Repeat("x", 65535)
	for _, c := range []struct {
		says    string
		entries []index.Entry
		data    int64
	}{
		{"begin with its root", nil, 0},
		{"begin with its root", []index.Entry{dir("a")}, 0},
		{"root of the layer's tree is not a directory", []index.Entry{file("")}, 0},
		{"whole blocks", []index.Entry{root}, 4095},
		{"whole blocks", []index.Entry{root}, -4096},
		{"at most", []index.Entry{root}, 1 << 44},
		{"take 4294967296 blocks", []index.Entry{root}, maxBlocks * blockSize},
		{"relative", []index.Entry{root, file("/a")}, 0},
		{`element ""`, []index.Entry{root, file("a/")}, 0},
		{"no directory", []index.Entry{root, file("a//b")}, 0},
		{`element "."`, []index.Entry{root, file(".")}, 0},
		{`element ".."`, []index.Entry{root, dir("a"), file("a/..")}, 0},
		{"256 bytes", []index.Entry{root, file(strings.Repeat("n", 256))}, 0},
		{"NUL", []index.Entry{root, file("a\x00b")}, 0},
		{"no directory", []index.Entry{root, file("a/b")}, 0},
		{"no directory", []index.Entry{root, file("a"), file("a/b")}, 0},
		{"out of order", []index.Entry{root, file("b"), file("a")}, 0},
		{"twice", []index.Entry{root, file("a"), file("a")}, 0},
		{"no directory", []index.Entry{root, dir("a"), file("b"), file("a/c")}, 0},
		{"element", []index.Entry{root, root}, 0},
		{"not the mode", []index.Entry{root, {Path: "a", Mode: 0o644, HardLink: -1}}, 0},
		{"not the mode", []index.Entry{root, {Path: "a", Mode: 1<<16 | unix.S_IFREG, HardLink: -1}}, 0},
		{"nanoseconds", []index.Entry{root, with(file("a"), func(e *index.Entry) { e.Nsec = 1e9 })}, 0},
		{"negative", []index.Entry{root, with(file("a"), func(e *index.Entry) { e.Size = -1 })}, 0},
		{"whole blocks", []index.Entry{root, with(file("a"), func(e *index.Entry) { e.Size = 4097 })}, 4096},
		{"whole blocks", []index.Entry{root, with(file("a"), func(e *index.Entry) { e.Size, e.Data = 1, 1 })}, 4096},
		{"whole blocks", []index.Entry{root, with(file("a"), func(e *index.Entry) { e.Size, e.Data = 1, -4096 })}, 4096},
		{"whole blocks", []index.Entry{root, with(file("a"), func(e *index.Entry) { e.Size, e.Data = 1<<63-1, 1<<63-4096 })}, 4096},
		{"target of 0 bytes", []index.Entry{root, {Path: "a", Mode: unix.S_IFLNK, HardLink: -1}}, 0},
		{"target of 4096 bytes", []index.Entry{root, {Path: "a", Mode: unix.S_IFLNK, Link: large[:4096], HardLink: -1}}, 0},
		{"NUL", []index.Entry{root, {Path: "a", Mode: unix.S_IFLNK, Link: "a\x00", HardLink: -1}}, 0},
		{"4096:0", []index.Entry{root, {Path: "a", Mode: unix.S_IFCHR, Major: 4096, HardLink: -1}}, 0},
		{"0:1048576", []index.Entry{root, {Path: "a", Mode: unix.S_IFBLK, Minor: 1 << 20, HardLink: -1}}, 0},
		{"no file of the layer", []index.Entry{root, {Path: "a", HardLink: 2}}, 0},
		{"no file of the layer", []index.Entry{root, {Path: "a", HardLink: 1}}, 0},
		{"no file of the layer", []index.Entry{root, {Path: "a", HardLink: 2}, {Path: "b", HardLink: 1}}, 0},
		{"to a directory", []index.Entry{root, {Path: "a", HardLink: 0}}, 0},
		{"cannot hold", []index.Entry{root, xattrs(index.Xattr{Name: "system.nfs4_acl"})}, 0},
		{"cannot hold", []index.Entry{root, xattrs(index.Xattr{Name: "system.posix_acl_access2"})}, 0},
		{"cannot hold", []index.Entry{root, xattrs(index.Xattr{Name: "user."})}, 0},
		{"cannot hold", []index.Entry{root, xattrs(index.Xattr{Name: ""})}, 0},
		{"256 bytes", []index.Entry{root, xattrs(index.Xattr{Name: "user." + large[:251]})}, 0},
		{"65536 bytes", []index.Entry{root, xattrs(index.Xattr{Name: "user.a", Value: large + "x"})}, 0},
		{"twice", []index.Entry{root, xattrs(index.Xattr{Name: "user.a"}, index.Xattr{Name: "user.a"})}, 0},
		{"more than the 262148", []index.Entry{root, xattrs(index.Xattr{Name: "user.a", Value: large}, index.Xattr{Name: "user.b", Value: large},
			index.Xattr{Name: "user.c", Value: large}, index.Xattr{Name: "user.d", Value: large})}, 0},
	} {
		_, err := Plan("", c.entries, c.data)
		if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%.200s: got %v, want an error with %q", fmt.Sprintf("%+v", c.entries), err, c.says)
		}
	}
}

// fullDisk takes some bytes and then no more.
type fullDisk struct{ left int }

func (f *fullDisk) Write(b []byte) (int, error) {
	if len(b) > f.left {
		return f.left, unix.ENOSPC
	}
	f.left -= len(b)
	return len(b), nil
}

func TestErrorOfTheWriterIsReported(t *testing.T) {
	entries := manyNames(100_000)
	l, err := Plan("", entries, 0)
	if err != nil {
		t.Fatal(err)
	}
	const room = 1 << 20
	if n, err := l.WriteTo(&fullDisk{room}); !errors.Is(err, unix.ENOSPC) || n > room {
		t.Errorf("got %d bytes and %v", n, err)
	}
}

// manyNames is one directory with n empty files.
func manyNames(n int) []index.Entry {
	l := newLayer().dir("d", 0o755)
	for i := range n {
		l.add(index.Entry{Path: fmt.Sprintf("d/%07d-%s", i, strings.Repeat("x", i%50)), Mode: unix.S_IFREG | 0o644})
	}
	return l.entries
}

// usual is a tree such as images have: files in nested directories, some links.
func usual(n int) (entries []index.Entry, dataSize int64) {
	l := newLayer()
	for d := 0; len(l.entries) < n; d++ {
		dir := fmt.Sprintf("usr-%05d", d)
		l.dir(dir, 0o755)
		for f := range 14 {
			l.add(index.Entry{Path: fmt.Sprintf("%s/lib-module-%02d.py", dir, f), Mode: unix.S_IFREG | 0o644, Size: 5000, Data: dataSize})
			dataSize += 8192
		}
		l.symlink(dir+"/link", "lib-module-01.py")
	}
	return l.entries[:n], dataSize
}

func BenchmarkWrite(b *testing.B) {
	entries, dataSize := usual(20_000)
	l, err := Plan("", entries, dataSize)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := Write(io.Discard, entries, dataSize); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(l.Size())/float64(len(entries)), "image-B/entry")
}
