package index

import (
	"github.com/opencontainers/go-digest"
)

// Compression is how a layer's blob wraps its tar.
type Compression string

// The compressions of the OCI image specification's layers.
const (
	Tar  Compression = "tar"
	Gzip Compression = "gzip"
	Zstd Compression = "zstd"
)

// Index says what is in a layer and where. It is immutable once made: whoever gets
// one shares it.
//
// A layer has three coordinates: offsets in the blob (compressed), offsets in its
// stream (what the blob decodes to) and offsets in its data file, which holds the
// contents of the regular files one after another, each at a multiple of Align, and
// zeros between them.
type Index struct {
	Blob        digest.Digest // of the compressed layer, SHA-256
	BlobSize    int64         // bytes, > 0
	DiffID      digest.Digest // of the whole tar; "" when a table of contents is all that was read: the stream is what that names
	Compression Compression
	Entries     []Entry  // the tree: each path once, parents before children, in byte order of the path's elements
	DataSize    int64    // bytes in the data file, a multiple of Align
	Extents     []Extent // by Data; they do not overlap, and Stream rises with Data
	Points      []Point  // by Stream; the first at Stream 0 unless there is no data
	Chunks      []Chunk  // by Off; without gaps from 0 to DataSize

	// First are the parts of the data file that somebody's containers read first, in that order. They are a hint, and
	// nothing is wrong if they are.
	First []Range

	text []byte // what it was decoded from; nil when it was made otherwise
}

// WithoutTree is an index that fills chunks as x does, without what takes the most memory.
func (x *Index) WithoutTree() *Index {
	y := *x
	y.Entries, y.text = nil, nil
	return &y
}

// Align is what each file's contents in the data file begin at a multiple of: the
// block size of the EROFS image whose files they are.
const Align = 4096

// Entry is one name in a layer's tree as overlayfs wants it: a whiteout is a
// character device 0:0 and an opaque directory has the xattr
// trusted.overlay.opaque=y.
type Entry struct {
	Path         string // relative, "/" between elements, no ".", ".." or empty ones; any bytes but NUL; "" is the root
	Mode         uint32 // st_mode: type and permissions as in inode(7)
	UID, GID     uint32
	Size         int64 // of a regular file, bytes
	Sec          int64 // mtime, seconds of Unix time
	Nsec         uint32
	Major, Minor uint32  // of a device
	Link         string  // of a symbolic link: its target
	Xattrs       []Xattr // by name
	// HardLink is the place in Entries of the entry that this is another name of, and
	// whose attributes and data count for both; -1 for all others. It points at an
	// entry whose own HardLink is -1, at any place. The other fields but Path are then
	// not set.
	HardLink int
	// Implicit tells of a directory that the layer has things in but does not have
	// itself: 0755 and root's, at the epoch. containerd gives such a directory the
	// attributes that the nearest lower layer has for it.
	Implicit bool
	Data     int64 // of a regular file of Size > 0: where its contents begin in the data file
}

// Xattr is one extended attribute.
type Xattr struct {
	Name  string // with its namespace: "security.capability"
	Value string // any bytes
}

// Extent says where a run of the data file is in the stream. What no extent covers is
// zeros: the padding, and the holes of sparse files.
type Extent struct{ Data, Stream, Len int64 }

// Range is a part of the data file.
type Range struct{ Off, Len int64 }

// Point is a place in the blob where decoding can begin.
type Point struct {
	Blob   int64  // offset of the byte in the blob that holds the first bit
	Bit    uint8  // of a gzip blob: bits of that byte that belong to what is before, 0 to 7
	Stream int64  // offset in the stream of the first byte that is decoded from here
	Window []byte // of a point within a DEFLATE stream: up to 32 KiB that came before, else nil
	// Raw tells that DEFLATE data follows at once, in the middle of a member; a gzip
	// member's or zstd frame's header follows otherwise.
	Raw bool
}

// Chunk is the unit that is checked, and present or absent: Len bytes of the data file
// from Off, with the SHA-256 that they have, padding included.
type Chunk struct {
	Off, Len int64
	Sum      [32]byte
	// Pad is how many of the chunk's bytes, at its end, Sum does not cover: zeros that
	// fill up a file to a multiple of Align. It is 0 unless the index was made from a table
	// of contents, whose digests know nothing of padding. See Index.Check.
	Pad int64
}
