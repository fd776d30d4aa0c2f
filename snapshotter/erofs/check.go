package erofs

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// quotePath gives a path for a message. A hostile one may be megabytes long.
func quotePath(p string) string {
	const most = 300 // bytes: a whole name of 255 and something around it
	if len(p) > most {
		return fmt.Sprintf("%q…", p[:most])
	}
	return fmt.Sprintf("%q", p)
}

func isDir(e *index.Entry) bool     { return e.Mode&unix.S_IFMT == unix.S_IFDIR }
func isRegular(e *index.Entry) bool { return e.Mode&unix.S_IFMT == unix.S_IFREG }
func isSymlink(e *index.Entry) bool { return e.Mode&unix.S_IFMT == unix.S_IFLNK }
func isDevice(e *index.Entry) bool {
	t := e.Mode & unix.S_IFMT
	return t == unix.S_IFCHR || t == unix.S_IFBLK
}

// base gives the last element of a path.
func base(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// findParents gives each entry's parent, by their places in entries. It refuses names that
// no directory can hold and entries that are not in the order of index.Index, which
// also makes sure that no path is there twice.
func findParents(entries []index.Entry) ([]int32, error) {
	if len(entries) == 0 || entries[0].Path != "" {
		return nil, fmt.Errorf("the layer's tree does not begin with its root directory")
	}
	if !isDir(&entries[0]) || entries[0].HardLink >= 0 {
		return nil, fmt.Errorf("the root of the layer's tree is not a directory")
	}
	parents := make([]int32, len(entries))
	last := make([]int32, len(entries)) // the youngest child so far, 0: none
	open := []int32{0}                  // the directory that was last seen, and those that it is in
	for i := 1; i < len(entries); i++ {
		path := entries[i].Path
		slash := strings.LastIndexByte(path, '/')
		name := path[slash+1:]
		switch {
		case slash == 0:
			return nil, fmt.Errorf("%s: a path in a layer's tree must be relative", quotePath(path))
		case name == "" || name == "." || name == "..":
			return nil, fmt.Errorf("%s: a path in a layer's tree must not have the element %q", quotePath(path), name)
		case len(name) > maxName:
			return nil, fmt.Errorf("%s: the name has %d bytes; EROFS holds at most %d", quotePath(path), len(name), maxName)
		case strings.IndexByte(name, 0) >= 0:
			return nil, fmt.Errorf("%s: the name has a NUL byte", quotePath(path))
		}
		dir := path[:max(slash, 0)]
		for len(open) > 0 && entries[open[len(open)-1]].Path != dir {
			open = open[:len(open)-1]
		}
		if len(open) == 0 {
			return nil, fmt.Errorf("%s: the layer's tree is out of order, or has no directory %s before it", quotePath(path), quotePath(dir))
		}
		parent := open[len(open)-1]
		if before := last[parent]; before != 0 && base(entries[before].Path) >= name {
			return nil, fmt.Errorf("%s: the layer's tree is out of order, or has this path twice", quotePath(path))
		}
		parents[i], last[parent] = parent, int32(i)
		if isDir(&entries[i]) && entries[i].HardLink < 0 {
			open = append(open, int32(i))
		}
	}
	return parents, nil
}

// checkEntry refuses an entry that no inode can say.
func checkEntry(entries []index.Entry, i int, dataSize int64) error {
	e := &entries[i]
	if e.HardLink >= 0 {
		if e.HardLink >= len(entries) || e.HardLink == i || entries[e.HardLink].HardLink >= 0 {
			return fmt.Errorf("%s: the hard link leads to no file of the layer", quotePath(e.Path))
		}
		if isDir(&entries[e.HardLink]) {
			return fmt.Errorf("%s: the hard link leads to a directory", quotePath(e.Path))
		}
		return nil
	}
	if _, ok := fileType(e.Mode); !ok || e.Mode > 0xffff {
		return fmt.Errorf("%s: %#o is not the mode of any kind of file", quotePath(e.Path), e.Mode)
	}
	if e.Nsec > 999_999_999 {
		return fmt.Errorf("%s: its time has %d nanoseconds, more than a second", quotePath(e.Path), e.Nsec)
	}
	switch {
	case isRegular(e):
		if e.Size < 0 {
			return fmt.Errorf("%s: its size of %d bytes is negative", quotePath(e.Path), e.Size)
		}
		if e.Size > 0 && (e.Data < 0 || e.Data%blockSize != 0 || e.Data > dataSize || e.Size > dataSize-e.Data) {
			return fmt.Errorf("%s: its %d bytes at %d are not whole blocks of the layer's data, which has %d bytes",
				quotePath(e.Path), e.Size, e.Data, dataSize)
		}
	case isSymlink(e):
		if e.Link == "" || len(e.Link) > maxLink || strings.IndexByte(e.Link, 0) >= 0 {
			return fmt.Errorf("%s: its target of %d bytes is not one that a symbolic link can have (1 to %d bytes, no NUL)",
				quotePath(e.Path), len(e.Link), maxLink)
		}
	case isDevice(e):
		if e.Major > maxMajor || e.Minor > maxMinor {
			return fmt.Errorf("%s: Linux has no device %d:%d (at most %d:%d)",
				quotePath(e.Path), e.Major, e.Minor, maxMajor, maxMinor)
		}
	}
	return nil
}
