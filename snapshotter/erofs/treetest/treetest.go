// Package treetest compares two directory trees by everything that a container could
// tell them apart by: names, types and modes, owners, sizes, times to the nanosecond,
// device numbers, link targets, extended attributes, contents, and which names are
// the same file. It is for tests, which need root to see all of it.
//
// Not compared is what a file system makes up for itself: inode and block numbers,
// sizes of directories, and all times but that of modification.
package treetest

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Node is one name of a tree.
type Node struct {
	Path         string // relative; "" is the root
	Mode         uint32 // st_mode
	UID, GID     uint32
	Size         int64 // of a regular file or symbolic link
	Links        uint64
	Mtime        time.Time
	Major, Minor uint32            // of a device
	Link         string            // of a symbolic link: its target
	Sum          string            // of a regular file: the SHA-256 of its contents
	Xattrs       map[string]string // nil: none
	SameAs       string            // the first path, in order, of the same file: its own unless there is a hard link
}

// Options say what may differ. The zero value says nothing may.
type Options struct {
	// DirLinks leaves out the link counts of directories, which overlayfs makes up.
	DirLinks bool
	// Sums leaves out the contents, for files that are too large to read.
	Sums bool
	// Mtime and Xattr leave out what they are true for.
	Mtime func(path string) bool
	Xattr func(path, name string) bool
}

// Compare gives a line for each difference between the trees a and b, in the order of
// their paths; none when they are equal.
func Compare(a, b string, o Options) ([]string, error) {
	left, err := Read(a, o)
	if err != nil {
		return nil, err
	}
	right, err := Read(b, o)
	if err != nil {
		return nil, err
	}
	return Diff(left, right), nil
}

// Diff is Compare for what Read has given.
func Diff(left, right []Node) (out []string) {
	for len(left) > 0 || len(right) > 0 {
		switch {
		case len(right) == 0 || len(left) > 0 && before(left[0].Path, right[0].Path):
			out = append(out, fmt.Sprintf("%q: only in the first tree", left[0].Path))
			left = left[1:]
		case len(left) == 0 || before(right[0].Path, left[0].Path):
			out = append(out, fmt.Sprintf("%q: only in the second tree", right[0].Path))
			right = right[1:]
		default:
			out = append(out, diffNode(left[0], right[0])...)
			left, right = left[1:], right[1:]
		}
	}
	return out
}

// before orders paths as Read gives them: a directory's contents follow it.
func before(a, b string) bool {
	return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/")) < 0
}

func diffNode(a, b Node) (out []string) {
	differ := func(what string, x, y any) {
		if x != y {
			out = append(out, fmt.Sprintf("%q: %s is %v in the first tree, %v in the second", a.Path, what, x, y))
		}
	}
	differ("mode", fmt.Sprintf("%#o", a.Mode), fmt.Sprintf("%#o", b.Mode))
	differ("owner", fmt.Sprint(a.UID, ":", a.GID), fmt.Sprint(b.UID, ":", b.GID))
	differ("size", a.Size, b.Size)
	differ("link count", a.Links, b.Links)
	differ("time", a.Mtime.UTC().Format(time.RFC3339Nano), b.Mtime.UTC().Format(time.RFC3339Nano))
	differ("device", fmt.Sprint(a.Major, ":", a.Minor), fmt.Sprint(b.Major, ":", b.Minor))
	differ("target", fmt.Sprintf("%q", a.Link), fmt.Sprintf("%q", b.Link))
	differ("SHA-256", a.Sum, b.Sum)
	differ("first name of the same file", fmt.Sprintf("%q", a.SameAs), fmt.Sprintf("%q", b.SameAs))
	names := map[string]bool{}
	for name := range a.Xattrs {
		names[name] = true
	}
	for name := range b.Xattrs {
		names[name] = true
	}
	for _, name := range sorted(names) {
		x, inA := a.Xattrs[name]
		y, inB := b.Xattrs[name]
		differ(fmt.Sprintf("extended attribute %q", name), value(x, inA), value(y, inB))
	}
	return out
}

func value(v string, there bool) string {
	if !there {
		return "absent"
	}
	return fmt.Sprintf("%q", v)
}

func sorted(set map[string]bool) []string {
	var names []string
	for name := range set {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// Read reads a tree, each directory before its contents, which are in byte order.
func Read(root string, o Options) ([]Node, error) {
	r := reader{root: root, options: o, first: map[[2]uint64]string{}}
	if err := r.read(""); err != nil {
		return nil, fmt.Errorf("the tree %s cannot be read: %w", root, err)
	}
	return r.nodes, nil
}

type reader struct {
	root    string
	options Options
	nodes   []Node
	first   map[[2]uint64]string // by device and inode number
}

func (r *reader) read(path string) error {
	full := filepath.Join(r.root, path)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return fmt.Errorf("%q: %w", path, err)
	}
	n := Node{Path: path, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Links: uint64(st.Nlink)}
	if r.options.Mtime == nil || !r.options.Mtime(path) {
		n.Mtime = time.Unix(st.Mtim.Unix())
	}
	id := [2]uint64{uint64(st.Dev), st.Ino}
	if _, ok := r.first[id]; !ok {
		r.first[id] = path
	}
	n.SameAs = r.first[id]

	kind := st.Mode & unix.S_IFMT
	var err error
	switch kind {
	case unix.S_IFDIR:
		if r.options.DirLinks {
			n.Links = 0
		}
	case unix.S_IFREG:
		n.Size = st.Size
		if !r.options.Sums {
			n.Sum, err = sum(full)
		}
	case unix.S_IFLNK:
		n.Size = st.Size
		n.Link, err = os.Readlink(full)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Major, n.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))
	}
	if err != nil {
		return err
	}
	if n.Xattrs, err = r.xattrs(full, path); err != nil {
		return fmt.Errorf("the extended attributes of %q: %w", path, err)
	}
	r.nodes = append(r.nodes, n)
	if kind != unix.S_IFDIR {
		return nil
	}
	children, err := os.ReadDir(full) // sorted
	if err != nil {
		return err
	}
	for _, c := range children {
		if err := r.read(filepath.Join(path, c.Name())); err != nil {
			return err
		}
	}
	return nil
}

func sum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (r *reader) xattrs(full, path string) (map[string]string, error) {
	buf := make([]byte, 64<<10) // XATTR_LIST_MAX, XATTR_SIZE_MAX
	n, err := unix.Llistxattr(full, buf)
	if err != nil || n == 0 {
		return nil, err
	}
	out := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if r.options.Xattr != nil && r.options.Xattr(path, name) {
			continue
		}
		n, err := unix.Lgetxattr(full, name, buf)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", name, err)
		}
		out[name] = string(buf[:n])
	}
	return out, nil
}
