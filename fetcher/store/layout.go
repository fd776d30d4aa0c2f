package store

import (
	_ "crypto/sha256" // digest.SHA256
	_ "crypto/sha512" // digest.SHA512
	"fmt"
	"path/filepath"

	digest "github.com/opencontainers/go-digest"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	// maxSize bounds a blob: 16 TiB, the largest file of ext4. With it a hostile descriptor costs at most 16 Mi pieces.
	maxSize = 16 << 40
)

// PieceSize is the size in bytes of the pieces of a blob of the given size, layout version 1: 256 KiB up to 256 MiB, 512 KiB up to
// 1 GiB, 1 MiB above. Always a power of two; the last piece of a blob may be shorter. All nodes must agree on it, so it never changes
// without a new version.
func PieceSize(size int64) int64 {
	switch {
	case size <= 256*mib:
		return 256 * kib
	case size <= gib:
		return 512 * kib
	default:
		return mib
	}
}

// pieceCount is the number of pieces of a blob; size is within [0, maxSize].
func pieceCount(size int64) int {
	ps := PieceSize(size)
	return int((size + ps - 1) / ps)
}

// pieceRange is where piece i lies in a blob of the given size.
func pieceRange(size int64, i int) (off, n int64) {
	ps := PieceSize(size)
	off = int64(i) * ps
	return off, min(ps, size-off)
}

func checkSize(d digest.Digest, size int64) error {
	if size < 0 || size > maxSize {
		return fmt.Errorf("blob %s: %w: a descriptor of %d bytes cannot be right (0 to 16 TiB are)", d, ErrSize, size)
	}
	return nil
}

// checkDigest guards every path that is made from a digest.
func checkDigest(d digest.Digest) error {
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%w: %q: %w", ErrDigest, string(d), err)
	}
	switch d.Algorithm() {
	case digest.SHA256, digest.SHA512:
		return nil
	}
	return fmt.Errorf("%w: %s: only sha256 and sha512 are stored", ErrDigest, d)
}

// The names inside the store's folder; the package comment tells what they are for.
const (
	dirBlobs   = "blobs"
	dirPins    = "pins"
	dirContent = "content"
	dirRefs    = "refs"
	dirTrash   = "trash"
	fileLock   = "lock"

	fileData   = "data"
	filePieces = "pieces"
	fileUsed   = "used"
	fileWriter = "writer"

	modeDir  = 0o700
	modeFile = 0o600
)

var algorithms = []digest.Algorithm{digest.SHA256, digest.SHA512}

// blobDir is the folder of a blob; d was checked.
func (s *Store) blobDir(d digest.Digest) string {
	return filepath.Join(s.dir, dirBlobs, d.Algorithm().String(), d.Encoded())
}

func (s *Store) contentPath(d digest.Digest) string {
	return filepath.Join(s.dir, dirContent, d.Algorithm().String(), d.Encoded())
}
