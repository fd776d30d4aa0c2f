package index

import (
	"archive/tar"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"

	opaqueXattr = "trusted.overlay.opaque"
	paxXattr    = "SCHILY.xattr."
)

// tree is a layer's file tree while its tar's entries are applied one after another, in
// the way of containerd's archive.Apply onto an overlay's upper directory: what that
// would make of the entries is what comes out here, and what it would refuse is refused.
type tree struct {
	root     *node
	nodes    int
	xattrs   int
	bytes    int // of names, targets and attributes
	dirTimes []dirTime
}

// node is a name; two nodes that share an inode are hard links.
type node struct {
	*inode
	children map[string]*node // of a directory
}

type inode struct {
	Entry     // without Path and HardLink
	place int // in Entries, once there
}

// dirTime is a directory's modification time, which counts after all else is done.
type dirTime struct {
	name string
	sec  int64
	nsec uint32
}

func newTree() *tree {
	t := &tree{}
	t.root = newDir(0)
	t.root.Implicit = false // it is the same in every layer, named or not
	return t
}

// newDir makes a directory that the layer only implies.
func newDir(gid uint32) *node {
	return &node{inode: &inode{Entry: Entry{Mode: unix.S_IFDIR | 0o755, GID: gid, Implicit: true}, place: -1}}
}

func (n *node) is(format uint32) bool { return n.Mode&unix.S_IFMT == format }

func (t *tree) put(dir *node, name string, n *node) error {
	if len(name) > maxElement {
		return fmt.Errorf("the name %.40q… is longer than %d bytes", name, maxElement)
	}
	if strings.IndexByte(name, 0) >= 0 {
		return fmt.Errorf("the name %q has a zero byte in it", name)
	}
	if t.nodes++; t.nodes > maxEntries-1 {
		return fmt.Errorf("it has more than %d entries", maxEntries)
	}
	if err := t.grow(len(name) + len(n.Link)); err != nil {
		return err
	}
	if dir.children == nil {
		dir.children = make(map[string]*node)
	}
	dir.children[name] = n
	return nil
}

func (t *tree) grow(n int) error {
	if t.bytes += n; t.bytes > maxNameBytes {
		return fmt.Errorf("its names and attributes have more than %d MiB", maxNameBytes>>20)
	}
	return nil
}

// add applies one entry of the tar. When it is a regular file, its inode is returned,
// for whoever knows to set Data in.
func (t *tree) add(h *tar.Header) (*inode, error) {
	ino, err := t.apply(h)
	if err != nil {
		return nil, ErrNotIndexable{err}
	}
	return ino, nil
}

func (t *tree) apply(h *tar.Header) (*inode, error) {
	if len(h.Name) > maxPath {
		return nil, fmt.Errorf("the path %.40q… is longer than %d bytes", h.Name, maxPath)
	}
	p := path.Clean("/" + h.Name) // ".." ends at the root
	if p == "/" {
		return nil, nil // containerd leaves the root as it is
	}
	dir, dirPath, err := t.parent(p)
	if err != nil {
		return nil, err
	}
	base := path.Base(p)
	if len(dirPath)+len(base)+1 > maxPath+1 {
		return nil, fmt.Errorf("the path %.40q… is longer than %d bytes", p, maxPath)
	}
	if base == opaque {
		return nil, t.setXattr(dir.inode, opaqueXattr, "y")
	}
	if hidden, ok := strings.CutPrefix(base, whiteout); ok {
		return nil, t.whiteout(dir, hidden, h)
	}
	old := dir.children[base]
	if old != nil && !(old.is(unix.S_IFDIR) && h.Typeflag == tar.TypeDir) {
		delete(dir.children, base)
		old = nil
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil, nil // takes its name from who had it, and is nothing itself
	}
	n := old
	if n == nil {
		if n, err = t.create(h); err != nil {
			return nil, err
		}
		if h.Typeflag != tar.TypeLink && h.Typeflag != tar.TypeSymlink {
			if err := dir.noDefaultACL(); err != nil {
				return nil, fmt.Errorf("%q: %w", h.Name, err)
			}
		}
		if err := t.put(dir, base, n); err != nil {
			return nil, err
		}
	}
	if err := t.attributes(n.inode, h); err != nil {
		return nil, err
	}
	if h.Typeflag == tar.TypeDir {
		t.dirTimes = append(t.dirTimes, dirTime{p, n.Sec, n.Nsec})
	}
	if h.Typeflag == tar.TypeReg {
		return n.inode, nil
	}
	return nil, nil
}

// DefaultACL is the attribute of a directory from which what is made in it gets an access control list, of a kind that
// depends on the file system. That is left to who unpacks.
const DefaultACL = "system.posix_acl_default"

func (n *node) noDefaultACL() error {
	if slices.ContainsFunc(n.Xattrs, func(a Xattr) bool { return a.Name == DefaultACL }) {
		return errors.New("it is made in a directory that has a default access control list")
	}
	return nil
}

func (t *tree) whiteout(dir *node, name string, h *tar.Header) error {
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("the whiteout %q names nothing", whiteout+name)
	}
	if dir.children[name] != nil {
		return fmt.Errorf("%q is both there and removed", name)
	}
	n := &node{inode: &inode{Entry: Entry{Mode: unix.S_IFCHR}, place: -1}}
	var err error
	if n.UID, n.GID, err = owner(h); err != nil {
		return err
	}
	return t.put(dir, name, n)
}

func owner(h *tar.Header) (uid, gid uint32, err error) {
	// The highest number means "leave it" to chown(2).
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32-1 || int64(h.Gid) >= 1<<32-1 {
		return 0, 0, fmt.Errorf("%q belongs to user %d and group %d, which cannot be", h.Name, h.Uid, h.Gid)
	}
	return uint32(h.Uid), uint32(h.Gid), nil
}

// create makes the node of an entry that replaces nothing.
func (t *tree) create(h *tar.Header) (*node, error) {
	n := &node{inode: &inode{place: -1}}
	switch h.Typeflag {
	case tar.TypeReg:
		n.Mode, n.Size = unix.S_IFREG, h.Size
	case tar.TypeDir:
		n.Mode = unix.S_IFDIR
	case tar.TypeSymlink:
		n.Mode, n.Link = unix.S_IFLNK|0o777, h.Linkname
		if n.Link == "" || len(n.Link) > maxLink || strings.IndexByte(n.Link, 0) >= 0 {
			return nil, fmt.Errorf("the symbolic link %q has a target that cannot be", h.Name)
		}
	case tar.TypeChar, tar.TypeBlock:
		n.Mode = unix.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			n.Mode = unix.S_IFBLK
		}
		// What the kernel's 32 bit device numbers hold: 12 and 20 bits.
		if h.Devmajor < 0 || h.Devmajor >= 1<<12 || h.Devminor < 0 || h.Devminor >= 1<<20 {
			return nil, fmt.Errorf("the device %q has the numbers %d:%d, which cannot be", h.Name, h.Devmajor, h.Devminor)
		}
		n.Major, n.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		n.Mode = unix.S_IFIFO
	case tar.TypeLink:
		// Links in the directory's name are followed; the target itself may be one.
		to := path.Clean("/" + h.Linkname)
		dir, err := t.resolve(path.Dir(to))
		if err != nil {
			return nil, err
		}
		target := t.lookup(path.Join(dir, path.Base(to)))
		if target == nil {
			return nil, fmt.Errorf("%q is a hard link to %q, which is not in the layer", h.Name, h.Linkname)
		}
		if target.is(unix.S_IFDIR) {
			return nil, fmt.Errorf("%q is a hard link to the directory %q", h.Name, h.Linkname)
		}
		n.inode = target.inode
	default:
		return nil, fmt.Errorf("%q is of the type %q, which containerd does not unpack", h.Name, h.Typeflag)
	}
	return n, nil
}

// attributes sets what every kind of entry has. A hard link's own ones go to the
// inode that it shares, as they do when a tar is unpacked.
func (t *tree) attributes(ino *inode, h *tar.Header) (err error) {
	if ino.UID, ino.GID, err = owner(h); err != nil {
		return err
	}
	if ino.Mode&unix.S_IFMT != unix.S_IFLNK {
		ino.Mode = ino.Mode&unix.S_IFMT | uint32(h.Mode)&0o7777
	}
	if ino.Mode&unix.S_IFMT != unix.S_IFDIR {
		// chown(2) takes a file's capabilities away: of a hard link those count that the last name has.
		ino.Xattrs = slices.DeleteFunc(ino.Xattrs, func(a Xattr) bool { return a.Name == "security.capability" })
	}
	ino.Implicit = false
	ino.Sec, ino.Nsec = 0, 0
	// containerd's bounds: the epoch, and 2^63 ns after it.
	if m := h.ModTime; !m.Before(time.Unix(0, 0)) && !m.After(time.Unix(0, 1<<63-1)) {
		ino.Sec, ino.Nsec = m.Unix(), uint32(m.Nanosecond())
	}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, paxXattr); ok && KeptXattr(name, ino.Mode) {
			if err := t.setXattr(ino, name, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// KeptXattr tells whether an attribute of a file with this st_mode comes to be when containerd unpacks it: it leaves out
// trusted ones, those that the file system does not know, and user ones of
// what is neither file nor directory.
func KeptXattr(name string, mode uint32) bool {
	switch format := mode & unix.S_IFMT; {
	case strings.HasPrefix(name, "user."):
		return format == unix.S_IFREG || format == unix.S_IFDIR
	case name == "system.posix_acl_access", name == DefaultACL:
		return format != unix.S_IFLNK
	default:
		return strings.HasPrefix(name, "security.")
	}
}

func (t *tree) setXattr(ino *inode, name, value string) error {
	if strings.HasSuffix(name, ".") || len(name) > maxXattrName || strings.IndexByte(name, 0) >= 0 || len(value) > maxXattrValue {
		return fmt.Errorf("the attribute %.40q of %d bytes cannot be", name, len(value))
	}
	if err := t.grow(len(name) + len(value)); err != nil {
		return err
	}
	i, found := slices.BinarySearchFunc(ino.Xattrs, name, func(a Xattr, name string) int { return strings.Compare(a.Name, name) })
	if found {
		ino.Xattrs[i].Value = value
		return nil
	}
	if t.xattrs++; t.xattrs > maxXattrs {
		return fmt.Errorf("it has more than %d attributes", maxXattrs)
	}
	ino.Xattrs = slices.Insert(ino.Xattrs, i, Xattr{name, value})
	return nil
}

// entries ends the tree: the names in order, each hard link's number found.
func (t *tree) entries() ([]Entry, error) {
	for _, d := range t.dirTimes {
		p, err := t.resolve(d.name)
		if err != nil {
			return nil, ErrNotIndexable{err}
		}
		n := t.lookup(p)
		if n == nil {
			return nil, notIndexable("the directory %q is gone when its time is set", d.name)
		}
		n.Sec, n.Nsec = d.sec, d.nsec
	}
	out := make([]Entry, 0, t.nodes+1)
	total := 0
	var walk func(n *node, p string) error
	walk = func(n *node, p string) error {
		if total += len(p); total > maxNameBytes {
			return notIndexable("its paths have more than %d MiB", maxNameBytes>>20)
		}
		if n.place >= 0 {
			out = append(out, Entry{Path: p, HardLink: n.place})
		} else {
			n.place = len(out)
			e := n.Entry
			e.Path, e.HardLink = p, -1
			out = append(out, e)
		}
		names := make([]string, 0, len(n.children))
		for name := range n.children {
			names = append(names, name)
		}
		slices.Sort(names)
		for _, name := range names {
			child := name
			if p != "" {
				child = p + "/" + name
			}
			if err := walk(n.children[name], child); err != nil {
				return err
			}
		}
		return nil
	}
	err := walk(t.root, "")
	return out, err
}
