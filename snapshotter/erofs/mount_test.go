package erofs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs/treetest"
	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// Values of attributes as the kernel has them. The capability is cap_net_raw=ep of
// revision 2; the ACLs let user 1000 read.
const (
	netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	acl    = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x04\x00\xe8\x03\x00\x00" +
		"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" +
		"\x20\x00\x05\x00\xff\xff\xff\xff"
)

// nasty is a layer with one of everything that has ever been lost by something.
func nasty() *layer {
	l := newLayer()
	l.entries[0] = index.Entry{Mode: unix.S_IFDIR | unix.S_ISVTX | 0o751, UID: 70_000, GID: 4_000_000_000, Sec: 1_111_111_111, Nsec: 999_999_999,
		HardLink: -1, Xattrs: []index.Xattr{{Name: "trusted.root", Value: "yes"}}}
	l.dir("bin", 0o755).
		file("bin/su", 0o4755, body("su", 10_000)).
		file("bin/wall", 0o2755, "setgid").
		file("bin/ping", 0o755, body("ping", 4096), index.Xattr{Name: "security.capability", Value: netRaw}).
		link("bin/ping4", "bin/ping").
		link("a-name-before-its-file", "bin/ping").
		file("bin/empty", 0, "").
		link("bin/empty-too", "bin/empty").
		dir("empty-dir", 0o700).
		dir("tmp", 0o1777).
		dir("acl", 0o755, index.Xattr{Name: "system.posix_acl_default", Value: acl}).
		file("acl/file", 0o755, "x", index.Xattr{Name: "system.posix_acl_access", Value: acl}).
		file("xattrs", 0o644, body("xattrs", 4097),
			index.Xattr{Name: "user.empty", Value: ""},
			index.Xattr{Name: "user." + strings.Repeat("n", 250), Value: "long name"},
			index.Xattr{Name: "user.binary", Value: "\x00\xff\x00"},
			index.Xattr{Name: "trusted.large", Value: body("large", 3000)},
			index.Xattr{Name: "security.other", Value: "1"}).
		dir("xattr-dir", 0o755, index.Xattr{Name: "user.large", Value: body("dir", 3500)}).
		symlink("link", "bin/../bin/su").
		symlink("dangling", "/\xff/nowhere").
		symlink("long-link", strings.Repeat("x/", 2047)+"y").
		symlink("half-link", strings.Repeat("z", 2500)).
		link("link-to-link", "link")
	// The kernel lets nobody set user attributes of links, but trusted ones.
	l.add(index.Entry{Path: "link-xattr", Mode: unix.S_IFLNK | 0o777, Link: "x", Sec: longAgo, Nsec: 1,
		Xattrs: []index.Xattr{{Name: "trusted.t", Value: "v"}}}).
		add(index.Entry{Path: "future", Mode: unix.S_IFREG | 0o600, UID: 65_536, GID: 65_535, Sec: 8_000_000_000, Nsec: 5}).
		add(index.Entry{Path: "fifo", Mode: unix.S_IFIFO | 0o622}).
		add(index.Entry{Path: "socket", Mode: unix.S_IFSOCK | 0o777}).
		add(index.Entry{Path: "null", Mode: unix.S_IFCHR | 0o666, Major: 1, Minor: 3}).
		add(index.Entry{Path: "disk", Mode: unix.S_IFBLK | 0o660, GID: 6, Major: 4095, Minor: 1<<20 - 1}).
		link("disk-too", "disk").
		whiteout("gone").
		dir("opaque", 0o755, index.Xattr{Name: "trusted.overlay.opaque", Value: "y"}).
		file("opaque/new", 0o644, "new")
	// Names before, between and after "." and "..".
	l.dir("names", 0o755)
	for _, name := range []string{"!", "-", "\x01", ".-", ".\x01", "...", "..a", "a b", "new\nline", "\xff\xfe", "\x80", "ü", "\\", "*",
		strings.Repeat("n", 255), strings.Repeat("\xfe", 255)} {
		l.file("names/"+name, 0o644, name)
	}
	deep := "deep"
	l.dir(deep, 0o755)
	for range 20 {
		deep += "/" + strings.Repeat("d", 100)
		l.dir(deep, 0o755)
	}
	// Directories of each length around a block.
	for _, n := range []int{6, 8, 9, 18, 19, 20, 38, 39} {
		for length := 199; length <= 203; length++ { // 4096 = 27 for the dots + 19 × (12 + 202) + 3
			dir := fmt.Sprintf("block%d-%d", n, length)
			l.dir(dir, 0o755)
			for i := range n {
				l.symlink(fmt.Sprintf("%s/%0*d", dir, length, i), "t")
			}
		}
	}
	return l
}

// ways are the two ways to mount, with and without direct reads.
var ways = []struct {
	name string
	need Support
	o    MountOptions
}{
	{"file-backed", FileBacked, MountOptions{}},
	{"file-backed, direct", FileBacked, MountOptions{DirectIO: true}},
	{"loop", Loop, MountOptions{Loop: true}},
	{"loop, direct", Loop, MountOptions{Loop: true, DirectIO: true}},
}

func TestMountedImageEqualsTheTree(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			dir := workDir(t, way.need)
			l := nasty()
			entries, data := l.finish()
			mnt := mountLayer(t, dir, entries, data, way.o)
			equal(t, unpack(t, filepath.Join(dir, "tree"), l, entries), mnt, treetest.Options{})
		})
	}
}

// A tree may have nothing in its files at all.
func TestLayerWithoutData(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			dir := workDir(t, way.need)
			l := newLayer().dir("d", 0o755)
			entries, data := l.finish()
			mnt := mountLayer(t, dir, entries, data, way.o)
			equal(t, unpack(t, filepath.Join(dir, "tree"), l, entries), mnt, treetest.Options{})
		})
	}
}

// The image followed by its data is an image by itself.
func TestImageAndDataInOneFile(t *testing.T) {
	dir := workDir(t, FileBacked)
	l := nasty()
	entries, data := l.finish()
	whole := append(image(t, entries, int64(len(data))), data...)
	file, mnt := filepath.Join(dir, "whole"), filepath.Join(dir, "mnt")
	if err := os.WriteFile(file, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(file, mnt, "erofs", unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Unmount(mnt) })
	equal(t, unpack(t, filepath.Join(dir, "tree"), l, entries), mnt, treetest.Options{})
}

func overlay(t *testing.T, dir string, lowers ...string) string {
	t.Helper()
	paths := map[string]string{}
	for _, p := range []string{"upper", "work", "merged"} {
		paths[p] = filepath.Join(dir, p)
		if err := os.Mkdir(paths[p], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := "lowerdir=" + strings.Join(lowers, ":") + ",upperdir=" + paths["upper"] + ",workdir=" + paths["work"]
	if err := unix.Mount("overlay", paths["merged"], "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Unmount(paths["merged"]) })
	// The root's own attributes are the upper's; containerd copies them, and so must this.
	if err := unix.Chmod(paths["merged"], 0o755); err != nil {
		t.Fatal(err)
	}
	return paths["merged"]
}

func TestOverlayOfImagesEqualsOverlayOfTrees(t *testing.T) {
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			dir := workDir(t, way.need)
			base := newLayer().
				file("gone", 0o644, "deleted above").
				dir("opaque", 0o755).file("opaque/old", 0o644, "hidden above").
				dir("bin", 0o700).file("bin/sh", 0o755, body("sh", 9000)).
				dir("gone-dir", 0o755).file("gone-dir/x", 0o644, "x").
				file("kept", 0o644, "kept").link("kept-too", "kept")
			top := nasty().whiteout("gone-dir").whiteout("never-was")
			var trees, images []string
			for i, l := range []*layer{top, base} {
				sub := filepath.Join(dir, fmt.Sprint(i))
				if err := os.Mkdir(sub, 0o755); err != nil {
					t.Fatal(err)
				}
				entries, data := l.finish()
				images = append(images, mountLayer(t, sub, entries, data, way.o))
				trees = append(trees, unpack(t, filepath.Join(sub, "tree"), l, entries))
			}
			a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
			for _, d := range []string{a, b} {
				if err := os.Mkdir(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			want, got := overlay(t, a, trees...), overlay(t, b, images...)
			root := func(path string) bool { return path == "" }
			equal(t, want, got, treetest.Options{Mtime: root})

			for _, p := range []string{"gone", "gone-dir", "never-was", "opaque/old"} {
				if _, err := os.Lstat(filepath.Join(got, p)); !os.IsNotExist(err) {
					t.Errorf("%s is seen through its whiteout: %v", p, err)
				}
			}
			for _, p := range []string{"opaque/new", "bin/sh", "bin/su", "kept-too"} {
				if _, err := os.Lstat(filepath.Join(got, p)); err != nil {
					t.Error(err)
				}
			}
			// What containers do to it: open a device of the layer, write, delete, make anew.
			if f, err := os.OpenFile(filepath.Join(got, "null"), os.O_WRONLY, 0); err != nil {
				t.Errorf("the mount's nodev reaches through overlayfs: %v", err)
			} else {
				f.Close()
			}
			for _, root := range []string{want, got} {
				must := func(err error) {
					t.Helper()
					if err != nil {
						t.Error(err)
					}
				}
				at := func(p string) string { return filepath.Join(root, p) }
				must(os.WriteFile(at("kept"), []byte("changed"), 0o644))
				must(os.Remove(at("bin/su")))
				must(os.RemoveAll(at("opaque")))
				must(os.Mkdir(at("opaque"), 0o755))
				must(os.Chmod(at("bin/ping"), 0o700))
				must(os.Rename(at("names/ü"), at("names/u")))
			}
			equal(t, want, got, treetest.Options{Mtime: func(string) bool { return true }})
		})
	}
}

// Programs of a layer that are setuid stay so in a container, but not on the host.
func TestSetuidThroughOverlayOnly(t *testing.T) {
	dir := workDir(t, FileBacked)
	l := newLayer().file("su", 0o4755, "x")
	entries, data := l.finish()
	mnt := mountLayer(t, dir, entries, data, MountOptions{})
	flags := func(path string) int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Flags)
	}
	const both = unix.ST_NOSUID | unix.ST_NODEV
	if flags(mnt)&both != both {
		t.Error("the layer's own mount lets setuid programs and devices work")
	}
	if flags(overlay(t, dir, mnt))&both != 0 {
		t.Error("overlayfs takes nosuid and nodev over from its layer")
	}
	// containerd's way of a read-only view of a single layer: a bind mount, made read-only.
	bind := filepath.Join(dir, "bind")
	if err := os.Mkdir(bind, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(mnt, bind, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Unmount(bind) })
	if err := unix.Mount("", bind, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if flags(bind)&both != 0 {
		t.Error("a view of a single layer has nosuid and nodev")
	}
}

// A container that is started anew finds the files that it changed under their old inode
// numbers. overlayfs remembers them by the layer's UUID.
func TestInodeNumberOutlivesCopyUpAndRemount(t *testing.T) {
	dir := workDir(t, FileBacked)
	entries, data := newLayer().file("f", 0o644, "x").finish()
	l, err := Plan(digest.FromString("layer"), entries, int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	var meta bytes.Buffer
	if _, err := l.WriteTo(&meta); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"meta": meta.Bytes(), "data": data} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	mnt := mountFiles(t, dir, MountOptions{})
	merged := overlay(t, dir, mnt)
	number := func() uint64 {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(merged, "f"), &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	before := number()
	if err := os.Chmod(filepath.Join(merged, "f"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Unmount(merged); err != nil {
		t.Fatal(err)
	}
	options := "lowerdir=" + mnt + ",upperdir=" + filepath.Join(dir, "upper") + ",workdir=" + filepath.Join(dir, "work")
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		t.Fatal(err)
	}
	if after := number(); after != before {
		t.Errorf("inode %d was %d before it was copied up", after, before)
	}
}
