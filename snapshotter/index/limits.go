package index

import (
	"errors"
	"fmt"
	"math"
)

// What an index may have. A layer that needs more is not indexed, and an encoded index
// that claims more is refused, so that neither can fill the memory of the node.
const (
	// maxEntries is twice the files of the largest layers that are met; an entry takes
	// about 200 bytes of memory.
	maxEntries = 1 << 20

	// maxNameBytes bounds the paths, link targets and attributes of all entries together.
	maxNameBytes = 128 << 20

	// maxPath, maxElement and maxLink are Linux's PATH_MAX, NAME_MAX and the longest
	// target of a symbolic link; a longer one could not be unpacked either.
	maxPath    = 4095
	maxElement = 255
	maxLink    = 4095

	maxXattrName  = 255     // XATTR_NAME_MAX
	maxXattrValue = 1 << 16 // XATTR_SIZE_MAX

	maxXattrs = 1 << 20 // of all entries together

	// maxData bounds a layer's data file, and so the chunks.
	maxData = 1 << 40

	// maxHoles bounds the holes of sparse files in one layer: nothing in the blob
	// pays for them.
	maxHoles = 16 << 30

	// maxChunk bounds one chunk, which is held in memory while it is checked. eStargz
	// writes 4 MiB.
	maxChunk  = 64 << 20
	maxChunks = 1 << 23

	maxExtents = 1 << 22

	// MaxFirst bounds the ranges of Index.First, and so what a stranger's order can ask for.
	MaxFirst = 4096

	// memberGap: points between members cost no window, so they may be this many times
	// closer together than those within one.
	memberGap = 16

	// Of what compresses well little has to be fetched for much to be decoded, and the windows would take a large part of it: two
	// points within a member are blobShare sixteenths of the spacing apart in the blob, too, until they are streamGap times
	// it apart in the stream.
	blobShare = 7
	streamGap = 8

	// pointsPerGap is how many points are made until the spacing doubles, so that the
	// windows' memory grows with the logarithm of the layer: 32 MiB for the first 4 GiB.
	pointsPerGap = 1024

	maxPoints  = 1 << 20
	maxWindows = 256 << 20 // bytes of all windows together

	// maxSize bounds offsets, so that sums of a few never overflow.
	maxSize = math.MaxInt64 / 4
)

// ErrNotIndexable says why a layer can have no index though its blob is what its
// descriptor promises: whoever gets it hands the layer to containerd.
type ErrNotIndexable struct{ Err error }

func (e ErrNotIndexable) Error() string { return "the layer cannot be indexed: " + e.Err.Error() }

// Unwrap returns the reason.
func (e ErrNotIndexable) Unwrap() error { return e.Err }

func notIndexable(format string, args ...any) error {
	return ErrNotIndexable{fmt.Errorf(format, args...)}
}

// ErrChunk says that the blob's bytes did not decode to the chunk that the index
// promises: one of both is not what it should be.
type ErrChunk struct {
	Chunk int
	Err   error
}

func (e ErrChunk) Error() string {
	return fmt.Sprintf("chunk %d of the layer is not what its index says: %v", e.Chunk, e.Err)
}

// Unwrap returns what went wrong.
func (e ErrChunk) Unwrap() error { return e.Err }

// errSum is why a chunk that decodes is wrong.
var errSum = errors.New("its SHA-256 differs")
