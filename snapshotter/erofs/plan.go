package erofs

import (
	_ "crypto/sha256" // go-digest knows no algorithm by itself
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"slices"
	"sort"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// inlineMost is how large an inode may be with what follows it to be moved to the next
// block when it does not fit this one: half a block, so that what is skipped is never
// more than the block that it saves.
const inlineMost = blockSize / 2

// The entries "." and ".." of a directory, which have no place in the tree.
const (
	dot    = -1
	dotdot = -2
)

// Layout is the plan of one image: where each part of it lies. It is immutable, and uses
// the entries that it was made from.
type Layout struct {
	entries  []index.Entry
	dataSize int64
	blob     digest.Digest

	nodes   []node  // of the entries, by place
	parents []int32 // by place; of the root, itself
	// names are the directories' contents, in the order of their names: places in
	// entries, dot and dotdot. Each directory has a run of them.
	names []int32

	inodes int64 // how many
	blocks int64 // where the blocks behind the inodes begin, in blocks
	size   int64 // bytes of the image
}

// node is what is planned for an entry that is not a hard link.
type node struct {
	at    int64 // of the inode, bytes from the start of the image
	block int64 // the first of its own blocks, counted from Layout.blocks

	names [2]int32 // of a directory: its run of Layout.names
	tail  int32    // of a directory: where in Layout.names its last block begins

	full   int32  // own blocks before the last one
	last   uint16 // bytes in the last block, 1 to 4096; 0: there are no contents in the image
	inline bool   // the last block is behind the inode
	xattrs int32  // bytes of extended attributes
	links  uint32 // names in the tree, or what a directory has for that
}

// ownBlocks counts the blocks that the entry has behind all inodes.
func (n *node) ownBlocks() int64 {
	if n.last == 0 || n.inline {
		return int64(n.full)
	}
	return int64(n.full) + 1
}

// Plan lays out the image of a tree that fulfils what index.Index says of Entries and
// DataSize, or says what is wrong with it or too much for EROFS. The image tells blob,
// the layer's digest, as the name of its data and as its own UUID; both are empty if
// blob is. The entries must not change while the Layout is in use.
func Plan(blob digest.Digest, entries []index.Entry, dataSize int64) (*Layout, error) {
	switch {
	case len(entries) > math.MaxInt32/4:
		return nil, fmt.Errorf("the layer's tree has %d entries, more than this node handles", len(entries))
	case dataSize < 0 || dataSize%blockSize != 0:
		return nil, fmt.Errorf("the layer's data have %d bytes, which are not whole blocks of %d", dataSize, blockSize)
	case dataSize/blockSize > maxBlocks:
		return nil, fmt.Errorf("the layer's data have %d bytes; EROFS holds at most %d", dataSize, int64(maxBlocks)*blockSize)
	case blob != "" && (blob.Validate() != nil || blob.Algorithm() != digest.SHA256):
		return nil, fmt.Errorf("%s is not the SHA-256 digest of a layer", quotePath(blob.String()))
	}
	parents, err := findParents(entries)
	if err != nil {
		return nil, err
	}
	l := &Layout{entries: entries, dataSize: dataSize, blob: blob, parents: parents, nodes: make([]node, len(entries))}
	for i := range entries {
		if err := checkEntry(entries, i, dataSize); err != nil {
			return nil, err
		}
	}
	l.listDirectories()
	if err := l.place(); err != nil {
		return nil, err
	}
	return l, nil
}

// Size is the length of the image in bytes.
func (l *Layout) Size() int64 { return l.size }

// Write writes the image of a tree, without the layer's digest in it. See Plan.
func Write(w io.Writer, entries []index.Entry, dataSize int64) error {
	l, err := Plan("", entries, dataSize)
	if err != nil {
		return err
	}
	_, err = l.WriteTo(w)
	return err
}

// uuid gives the image a name that is the same wherever it is made. overlayfs tells layers
// apart by it: without one, a file that was copied up has another inode number after
// the overlay is mounted anew.
func (l *Layout) uuid() (u [16]byte) {
	if l.blob == "" {
		return u
	}
	raw, _ := hex.DecodeString(l.blob.Encoded()) // Plan has checked it
	copy(u[:], raw)
	u[6] = u[6]&0x0f | 0x80 // version 8 and the variant, RFC 9562
	u[8] = u[8]&0x3f | 0x80
	return u
}

// listDirectories fills names, and the nodes' names and links.
func (l *Layout) listDirectories() {
	counts := make([]int32, len(l.entries))
	for i := range l.entries {
		n := &l.nodes[i]
		switch e := &l.entries[i]; {
		case e.HardLink >= 0:
			l.nodes[e.HardLink].links++
		case isDir(e):
			n.links += 2 // its name and its "."
			l.nodes[l.parents[i]].links++
		default:
			n.links++
		}
		counts[l.parents[i]]++
	}
	l.nodes[0].links-- // the root is in no directory
	counts[0]--

	total := int32(0)
	for i := range l.entries {
		if l.holdsNames(i) {
			l.nodes[i].names = [2]int32{total, total}
			total += counts[i] + 2
		}
	}
	l.names = make([]int32, total)
	for i := 1; i < len(l.entries); i++ {
		run := &l.nodes[l.parents[i]].names
		l.names[run[1]] = int32(i)
		run[1]++
	}
	for i := range l.entries {
		if !l.holdsNames(i) {
			continue
		}
		run := &l.nodes[i].names
		for _, d := range []int32{dot, dotdot} {
			// Not at the front: "!" and others are before ".".
			list := l.names[run[0]:run[1]]
			at := sort.Search(len(list), func(k int) bool { return l.name(list[k]) >= l.name(d) })
			run[1]++
			list = l.names[run[0]:run[1]]
			copy(list[at+1:], list[at:])
			list[at] = d
		}
	}
}

func (l *Layout) holdsNames(i int) bool {
	return isDir(&l.entries[i]) && l.entries[i].HardLink < 0
}

// name gives the name of one of names.
func (l *Layout) name(k int32) string {
	switch k {
	case dot:
		return "."
	case dotdot:
		return ".."
	}
	return base(l.entries[k].Path)
}

// place gives each inode and each block its place.
func (l *Layout) place() error {
	at, blocks := int64(rootOffset), int64(0)
	for i := range l.entries {
		e, n := &l.entries[i], &l.nodes[i]
		if e.HardLink >= 0 {
			continue
		}
		l.inodes++
		size, err := sizeXattrs(e)
		if err != nil {
			return err
		}
		n.xattrs = int32(size)
		switch {
		case isDir(e):
			l.packDirectory(n)
		case isSymlink(e):
			n.last = uint16(len(e.Link))
		}
		at = alignUp(at, slotSize)
		whole := inodeSize + int64(n.xattrs)
		if n.last > 0 {
			with := whole + int64(n.last)
			if with <= blockSize-at%blockSize {
				n.inline, whole = true, with
			} else if with <= inlineMost {
				n.inline, whole = true, with
				at = alignUp(at, blockSize)
			}
		}
		if at%blockSize+inodeSize > blockSize {
			at = alignUp(at, blockSize)
		}
		n.at, n.block = at, blocks
		at += whole
		blocks += n.ownBlocks()
	}
	l.blocks = (at + blockSize - 1) / blockSize
	if all := l.blocks + blocks + l.dataSize/blockSize; all > maxBlocks {
		return fmt.Errorf("the layer's tree and data take %d blocks; EROFS holds at most %d", all, int64(maxBlocks))
	}
	l.size = (l.blocks + blocks) * blockSize
	return nil
}

// packDirectory sees how the names fill blocks: each block has the records of its
// names and then the names, and no name is in two blocks.
func (l *Layout) packDirectory(n *node) {
	n.tail = n.names[0]
	used := 0
	for k := n.names[0]; k < n.names[1]; k++ {
		need := direntSize + len(l.name(l.names[k]))
		if used+need > blockSize {
			n.full++
			n.tail, used = k, 0
		}
		used += need
	}
	n.last = uint16(used)
}

// fill gives the part of run, from its start, that goes into one block.
func (l *Layout) fill(run []int32) []int32 {
	used := 0
	n := slices.IndexFunc(run, func(k int32) bool {
		used += direntSize + len(l.name(k))
		return used > blockSize
	})
	if n < 0 {
		return run
	}
	return run[:n]
}
