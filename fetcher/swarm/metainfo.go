package swarm

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
)

// layoutVersion is the version of everything below and of what the wire means by a piece. Nodes of different versions
// have different infohashes for the same blob, and so never meet in a swarm.
const layoutVersion = 1

// Infohash is the infohash (SHA-1) of the blob's synthetic info dictionary, the same on every node. Size and pieceSize
// are in bytes, above 0.
func Infohash(d digest.Digest, size, pieceSize int64) metainfo.Hash {
	return metainfo.HashBytes(infoBytes(d, size, pieceSize))
}

// infoBytes is the info dictionary, bencoded (BEP 3). It is private (BEP 27): no DHT, no peer exchange, no local
// discovery, also in a client that has those.
func infoBytes(d digest.Digest, size, pieceSize int64) []byte {
	n := numPieces(size, pieceSize)
	seed := pieceSeed(d, size, pieceSize)
	hashes := make([]byte, 0, n*sha1.Size)
	for i := range n {
		h := pieceHash(seed, i)
		hashes = append(hashes, h[:]...)
	}
	private := true
	return bencode.MustMarshal(metainfo.Info{
		Name:        fmt.Sprintf("quay-%d-%s", layoutVersion, strings.ReplaceAll(d.String(), ":", "-")),
		Length:      size,
		PieceLength: pieceSize,
		Pieces:      hashes,
		Private:     &private,
	})
}

func numPieces(size, pieceSize int64) int {
	return int((size + pieceSize - 1) / pieceSize)
}

// pieceSeed is what all piece hashes of a blob are derived from.
func pieceSeed(d digest.Digest, size, pieceSize int64) [sha256.Size]byte {
	return sha256.Sum256(fmt.Appendf(nil, "docker-quay synthetic piece %d\n%s\n%d\n%d\n", layoutVersion, d, size, pieceSize))
}

// pieceHash is the hash of piece i in the dictionary: not of the piece's content, which nobody knows yet.
func pieceHash(seed [sha256.Size]byte, i int) metainfo.Hash {
	return sha1.Sum(binary.BigEndian.AppendUint64(seed[:], uint64(i)))
}
