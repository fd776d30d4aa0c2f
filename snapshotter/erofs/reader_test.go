package erofs

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// reader reads an image by what the format says, and finds fault with what the kernel
// would call corrupt. It shares nothing with the writer but index.Entry.
type reader struct {
	image []byte
	data  uint64 // bytes behind the image
	inode map[string]uint64
}

type inode struct {
	nid              uint64
	mode             uint32
	size             uint64
	raw, uid, gid    uint32
	sec              int64
	nsec, links      uint32
	xattrs, contents []byte // of a directory or symbolic link
}

// checkImage reads all of an image and compares it with its entries.
func checkImage(image []byte, entries []index.Entry, dataSize int64) error {
	le := binary.LittleEndian
	if len(image)%4096 != 0 || len(image) == 0 {
		return fmt.Errorf("%d bytes are not whole blocks", len(image))
	}
	first := bytes.Clone(image[1024:4096])
	sum := le.Uint32(first[4:])
	clear(first[4:8])
	if want := crc32.Update(0, crc32.MakeTable(crc32.Castagnoli), first) ^ 0xffffffff; sum != want {
		return fmt.Errorf("checksum %#x, not %#x", sum, want)
	}
	r := &reader{image: image, data: uint64(dataSize), inode: map[string]uint64{}}
	if blocks := le.Uint32(first[36:]); int(blocks) != len(image)/4096 {
		return fmt.Errorf("the superblock has %d blocks, the image %d", blocks, len(image)/4096)
	}
	root := uint64(le.Uint16(first[14:]))
	if err := r.walk("", root, root); err != nil {
		return err
	}
	if len(r.inode) != len(entries) {
		return fmt.Errorf("the image has %d names, the tree %d", len(r.inode), len(entries))
	}
	links, inodes := map[uint64]uint32{}, map[uint64]bool{}
	for _, e := range entries {
		links[r.inode[e.Path]]++
		inodes[r.inode[e.Path]] = true
	}
	if n := le.Uint64(first[16:]); n != uint64(len(inodes)) {
		return fmt.Errorf("the superblock has %d inodes, the image %d", n, len(inodes))
	}
	for _, e := range entries {
		nid, ok := r.inode[e.Path]
		if !ok {
			return fmt.Errorf("%q is missing", e.Path)
		}
		if e.HardLink >= 0 {
			if other := r.inode[entries[e.HardLink].Path]; nid != other {
				return fmt.Errorf("%q is inode %d, its first name %d", e.Path, nid, other)
			}
			continue
		}
		n, err := r.read(nid)
		if err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
		if err := r.same(e, n, links[nid]); err != nil {
			return fmt.Errorf("%q: %w", e.Path, err)
		}
	}
	return nil
}

func (r *reader) same(e index.Entry, n *inode, links uint32) error {
	if n.mode != e.Mode || n.uid != e.UID || n.gid != e.GID || n.sec != e.Sec || n.nsec != e.Nsec {
		return fmt.Errorf("attributes differ: %+v", n)
	}
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if n.size != uint64(e.Size) {
			return fmt.Errorf("size %d, not %d", n.size, e.Size)
		}
		if at := uint64(n.raw) * 4096; n.size > 0 && (at != uint64(len(r.image))+uint64(e.Data) || at+n.size > uint64(len(r.image))+r.data) {
			return fmt.Errorf("contents at %d", at)
		}
	case unix.S_IFLNK:
		if string(n.contents) != e.Link {
			return errors.New("target differs")
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if major, minor := n.raw>>8&0xfff, n.raw&0xff|n.raw>>12&0xfff00; major != e.Major || minor != e.Minor {
			return fmt.Errorf("device %d:%d", major, minor)
		}
	}
	if e.Mode&unix.S_IFMT != unix.S_IFDIR && n.links != links {
		return fmt.Errorf("%d links, not %d", n.links, links)
	}
	var xattrs []index.Xattr
	for b := n.xattrs; len(b) > 0; {
		name, size := int(b[0]), int(binary.LittleEndian.Uint16(b[2:]))
		prefix := map[byte]string{1: "user.", 2: "system.posix_acl_access", 3: "system.posix_acl_default", 4: "trusted.", 6: "security."}[b[1]]
		xattrs = append(xattrs, index.Xattr{Name: prefix + string(b[4:4+name]), Value: string(b[4+name : 4+name+size])})
		b = b[(4+name+size+3)/4*4:]
	}
	if !slices.Equal(xattrs, e.Xattrs) {
		return fmt.Errorf("extended attributes %q, not %q", xattrs, e.Xattrs)
	}
	return nil
}

func (r *reader) read(nid uint64) (*inode, error) {
	le := binary.LittleEndian
	at := nid * 32
	if at+64 > uint64(len(r.image)) || at%4096+64 > 4096 {
		return nil, fmt.Errorf("inode at %d", at)
	}
	b := r.image[at:]
	n := &inode{nid: nid, mode: uint32(le.Uint16(b[4:])), size: le.Uint64(b[8:]), raw: le.Uint32(b[16:]),
		uid: le.Uint32(b[24:]), gid: le.Uint32(b[28:]), sec: int64(le.Uint64(b[32:])), nsec: le.Uint32(b[40:]), links: le.Uint32(b[44:])}
	format, end := le.Uint16(b), at+64
	if count := uint64(le.Uint16(b[2:])); count > 0 {
		end += 12 + 4*(count-1)
		n.xattrs = b[64+12 : end-at]
	}
	if kind := n.mode & unix.S_IFMT; kind != unix.S_IFDIR && kind != unix.S_IFLNK {
		if format != 1 {
			return nil, fmt.Errorf("format %#x", format)
		}
		return n, nil
	}
	blocks, tail := n.size, uint64(0)
	switch format {
	case 1:
	case 1 | 2<<1:
		if tail = n.size % 4096; end%4096+tail > 4096 || at/4096 != end/4096 {
			return nil, fmt.Errorf("inline contents from %d on, %d bytes, are in two blocks", end, tail)
		}
		blocks -= tail
	default:
		return nil, fmt.Errorf("format %#x", format)
	}
	if from := uint64(n.raw) * 4096; blocks > 0 {
		if from == 0 || from+blocks > uint64(len(r.image)) {
			return nil, fmt.Errorf("blocks at %d", from)
		}
		n.contents = append(n.contents, r.image[from:from+blocks]...)
	}
	n.contents = append(n.contents, r.image[end:end+tail]...)
	return n, nil
}

func (r *reader) walk(path string, nid, parent uint64) error {
	le := binary.LittleEndian
	r.inode[path] = nid
	dir, err := r.read(nid)
	if err != nil {
		return err
	}
	last, links := "", uint32(0)
	for rest := dir.contents; len(rest) > 0; {
		b := rest[:min(4096, len(rest))]
		rest = rest[len(b):]
		count := int(le.Uint16(b[8:])) / 12
		for i := range count {
			d := b[12*i:]
			from, to := int(le.Uint16(d[8:])), len(b)
			if i+1 < count {
				to = int(le.Uint16(d[12+8:]))
			} else if zero := bytes.IndexByte(b[from:], 0); zero >= 0 {
				to = from + zero
			}
			name, child := string(b[from:to]), le.Uint64(d)
			if name <= last {
				return fmt.Errorf("%q: %q follows %q", path, name, last)
			}
			last = name
			if d[10] == 2 {
				links++
			}
			full := name
			if path != "" {
				full = path + "/" + name
			}
			switch {
			case name == "." && child != nid, name == ".." && child != parent:
				return fmt.Errorf("%q: %q is %d", path, name, child)
			case name == "." || name == "..":
			case d[10] == 2:
				err = r.walk(full, child, nid)
			default:
				r.inode[full] = child
			}
			if err != nil {
				return err
			}
		}
	}
	if links != dir.links {
		return fmt.Errorf("%q has %d links, and %d directories in it", path, dir.links, links)
	}
	return nil
}
