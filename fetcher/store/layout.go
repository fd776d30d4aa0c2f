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

const (
	// minPiece is small because a read of a lazy layer fetches whole pieces: of a few KiB here and there it is half of a
	// piece at each end that nobody asked for. 64 KiB take 3 ms at 200 Mbit/s, less than the round trip to ask for them.
	minPiece = 64 * kib
	maxPiece = mib
	// mostPieces is how many pieces a blob has until maxPiece is reached: each one is announced and noted.
	mostPieces = 1024
)

// PieceSize is the size in bytes of the pieces of a blob of the given size: 64 KiB up to 64 MiB, 128 KiB up to 128 MiB, and so
// on up to 1 MiB above 512 MiB. Always a power of two; the last piece of a blob may be shorter. Nodes that do not
// agree on it never meet in a swarm, for it is part of the infohash, and take each other's files for damaged.
func PieceSize(size int64) int64 {
	ps := int64(minPiece)
	for ps < maxPiece && size > mostPieces*ps {
		ps *= 2
	}
	return ps
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
