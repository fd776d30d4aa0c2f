package erofs

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

func TestHundredThousandNamesInOneDirectory(t *testing.T) {
	dir := workDir(t, FileBacked)
	entries := manyNames(100_000)
	if err := checkImage(image(t, entries, 0), entries, 0); err != nil {
		t.Fatal(err)
	}
	mnt := mountLayer(t, dir, entries, nil, MountOptions{})
	list, err := os.ReadDir(filepath.Join(mnt, "d"))
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 100_000 {
		t.Fatalf("%d names", len(list))
	}
	for i, e := range entries[2:] {
		if list[i].Name() != base(e.Path) {
			t.Fatalf("name %d is %q, not %q", i, list[i].Name(), base(e.Path))
		}
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(mnt, e.Path), &st); err != nil {
			t.Fatal(err)
		}
		if err := unix.Lstat(filepath.Join(mnt, e.Path+"-"), &st); !errors.Is(err, unix.ENOENT) {
			t.Fatalf("%q is there: %v", e.Path+"-", err)
		}
	}
}

func TestFilesBeyond4GiB(t *testing.T) {
	dir := workDir(t, FileBacked)
	const (
		size     = 5<<30 + 123
		dataSize = 9 << 30
		second   = 8 << 30 // where the other file's contents begin
	)
	l := newLayer().
		add(index.Entry{Path: "large", Mode: unix.S_IFREG | 0o644, Size: size}).
		add(index.Entry{Path: "small", Mode: unix.S_IFREG | 0o644, Size: 5, Data: second})
	f, err := os.Create(filepath.Join(dir, "data"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(dataSize); err != nil {
		t.Skipf("no sparse file of 9 GiB here: %v", err)
	}
	marks := map[int64]string{0: "start", 4<<30 - 2: "border", size - 3: "end", second: "small"}
	for at, text := range marks {
		if _, err := f.WriteAt([]byte(text), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "meta"), image(t, l.entries, dataSize), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range []MountOptions{{}, {DirectIO: true}} {
		mnt := mountFiles(t, dir, o)
		large, err := os.Open(filepath.Join(mnt, "large"))
		if err != nil {
			t.Fatal(err)
		}
		info, _ := large.Stat()
		if info.Size() != size {
			t.Errorf("%d bytes, not %d", info.Size(), int64(size))
		}
		for at, text := range marks {
			if at >= size {
				continue
			}
			got := make([]byte, len(text))
			if _, err := large.ReadAt(got, at); err != nil || string(got) != text {
				t.Errorf("at %d: %q, %v; want %q", at, got, err, text)
			}
		}
		large.Close()
		if got, err := os.ReadFile(filepath.Join(mnt, "small")); err != nil || string(got) != "small" {
			t.Errorf("the file behind it reads %q, %v", got, err)
		}
		if err := Unmount(mnt); err != nil {
			t.Error(err)
		}
		os.Remove(mnt)
	}
}

// Other file systems hold less than EROFS does; these have no tree to compare with.
func TestLargestAttributes(t *testing.T) {
	dir := workDir(t, FileBacked)
	want := []index.Xattr{
		{Name: "user.1", Value: body("1", maxXattrValue)},
		{Name: "user.2", Value: body("2", maxXattrValue)},
		{Name: "user.3", Value: body("3", maxXattrValue)},
		{Name: "user.4", Value: body("4", 60_000)},
	}
	l := newLayer().
		dir("d", 0o755, want...).
		file("d/f", 0o644, "after", want...).
		file("d/g", 0o644, "after that")
	l.add(index.Entry{Path: "link", Mode: unix.S_IFLNK | 0o777, Link: strings.Repeat("l", maxLink), Sec: longAgo,
		Xattrs: []index.Xattr{{Name: "trusted.x", Value: want[0].Value}}})
	entries, data := l.finish()
	mnt := mountLayer(t, dir, entries, data, MountOptions{})
	buf := make([]byte, 64<<10)
	for _, e := range entries {
		for _, x := range e.Xattrs {
			n, err := unix.Lgetxattr(filepath.Join(mnt, e.Path), x.Name, buf)
			if err != nil || string(buf[:n]) != x.Value {
				t.Errorf("%q of %q: %d bytes, %v", x.Name, e.Path, n, err)
			}
		}
	}
	for path, want := range l.contents {
		if got, err := os.ReadFile(filepath.Join(mnt, path)); err != nil || string(got) != want {
			t.Errorf("%q reads %q, %v", path, got, err)
		}
	}
	if got, err := os.Readlink(filepath.Join(mnt, "link")); err != nil || len(got) != maxLink {
		t.Errorf("the longest target has %d bytes, %v", len(got), err)
	}
}

func TestShortFilesAreNotMounted(t *testing.T) {
	dir := workDir(t, FileBacked)
	l := newLayer().file("f", 0o644, body("f", 3*blockSize))
	entries, data := l.finish()
	mnt := mountLayer(t, dir, entries, data, MountOptions{})
	meta, dataFile := filepath.Join(dir, "meta"), filepath.Join(dir, "data")
	if err := Unmount(mnt); err != nil {
		t.Fatal(err)
	}
	if err := Mount(meta, mnt, filepath.Join(dir, "none"), MountOptions{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the data file: %v", err)
	}
	for _, c := range []struct {
		says string
		path string
		size int64
	}{
		{"full length", dataFile, 2 * blockSize},
		{"metadata image", meta, 100},
		{"not a layer's metadata image", meta, 2 * blockSize},
	} {
		if err := os.Truncate(c.path, c.size); err != nil {
			t.Fatal(err)
		}
		if err := Mount(meta, mnt, dataFile, MountOptions{}); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s of %d bytes: got %v, want an error with %q", filepath.Base(c.path), c.size, err, c.says)
		}
	}
}

func TestUnmount(t *testing.T) {
	dir := workDir(t, FileBacked)
	if err := Unmount(dir); err != nil {
		t.Errorf("of what is not mounted: %v", err)
	}
	if err := Unmount(filepath.Join(dir, "none")); err != nil {
		t.Errorf("of what is not there: %v", err)
	}
	entries, data := newLayer().file("f", 0o644, "still there").finish()
	mnt := mountLayer(t, dir, entries, data, MountOptions{})
	f, err := os.Open(filepath.Join(mnt, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Unmount(mnt); err != nil {
		t.Fatalf("of what is in use: %v", err)
	}
	if _, err := os.Stat(filepath.Join(mnt, "f")); !os.IsNotExist(err) {
		t.Errorf("it is still to be seen: %v", err)
	}
	b := make([]byte, 20)
	if n, _ := f.Read(b); string(b[:n]) != "still there" {
		t.Errorf("who has it open reads %q", b[:n])
	}
}

// A loop device must not outlive its mount.
func TestLoopDevicesGoAway(t *testing.T) {
	dir := workDir(t, Loop)
	entries, data := newLayer().file("f", 0o644, "x").finish()
	mnt := mountLayer(t, dir, entries, data, MountOptions{Loop: true})
	attached := func() (n int) {
		backing, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
		for _, b := range backing {
			if path, _ := os.ReadFile(b); strings.HasPrefix(string(path), dir+"/") {
				n++
			}
		}
		return n
	}
	if n := attached(); n != 2 {
		t.Errorf("%d devices, not 2, while it is mounted", n)
	}
	if err := Unmount(mnt); err != nil {
		t.Fatal(err)
	}
	// At once, unless something that watches for devices is having a look at it.
	for end := time.Now().Add(5 * time.Second); attached() != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d devices after it is unmounted", attached())
		}
	}
}

func TestProbe(t *testing.T) {
	dir := workDir(t, FileBacked)
	clean := func(in string) {
		t.Helper()
		if left, _ := filepath.Glob(filepath.Join(in, "erofs-probe-*")); len(left) > 0 {
			t.Errorf("the probe left %q", left)
		}
	}
	if s, err := Probe(dir); s != FileBacked || err != nil {
		t.Errorf("got %v, %v", s, err)
	}
	clean(dir)
	if s, err := Probe(filepath.Join(dir, "none")); s != None || err == nil {
		t.Errorf("in no folder: got %v, %v", s, err)
	}
	// The kernel takes no metadata file that lies on overlayfs, but a loop device does.
	lower := filepath.Join(dir, "lower")
	if err := os.Mkdir(lower, 0o755); err != nil {
		t.Fatal(err)
	}
	merged := overlay(t, dir, lower)
	s, err := Probe(merged)
	if s == FileBacked || err == nil || !errors.Is(err, unix.ENOTBLK) || !strings.Contains(err.Error(), "overlayfs") {
		t.Errorf("on overlayfs: got %v, %v", s, err)
	}
	clean(merged)
	t.Logf("on overlayfs: %v: %v", s, err)
}

// fsck.erofs of erofs-utils is a second reader of the format.
func TestFsckFindsNoFault(t *testing.T) {
	fsck, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skipf("no erofs-utils here: %v", err)
	}
	dir := t.TempDir()
	for name, entries := range map[string]func() ([]index.Entry, []byte){
		"nasty": nasty().finish,
		"many":  func() ([]index.Entry, []byte) { return manyNames(100_000), nil },
	} {
		list, data := entries()
		meta, dataFile := filepath.Join(dir, name+".meta"), filepath.Join(dir, name+".data")
		if err := os.WriteFile(meta, image(t, list, int64(len(data))), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dataFile, data, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(fsck, "--device="+dataFile, meta).CombinedOutput()
		if err != nil {
			lines := strings.Split(strings.TrimSpace(string(out)), "\n")
			t.Errorf("%s: %v\n%s", name, err, strings.Join(lines[max(0, len(lines)-10):], "\n"))
		}
	}
}
