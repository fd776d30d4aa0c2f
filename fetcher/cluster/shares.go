package cluster

import (
	"encoding/binary"

	"github.com/cespare/xxhash/v2"
	"github.com/opencontainers/go-digest"
)

// Rank returns the place of node among nodes for one segment of a blob: 0 is
// the owner, 1 takes over from it, and so on. Every node computes the same
// ranks from the same set of nodes, in any order. It returns len(nodes) when
// node is not among them.
func Rank(d digest.Digest, segment int, node string, nodes []string) int {
	mine := weight(d, segment, node)
	rank, found := 0, false
	for _, n := range nodes {
		if n == node {
			found = true
			continue
		}
		if w := weight(d, segment, n); w > mine || w == mine && n > node {
			rank++
		}
	}
	if !found {
		return len(nodes)
	}
	return rank
}

// Owner returns the node with rank 0 for a segment; "" when nodes is empty.
func Owner(d digest.Digest, segment int, nodes []string) string {
	var best string
	var bestWeight uint64
	for _, n := range nodes {
		if w := weight(d, segment, n); best == "" || w > bestWeight || w == bestWeight && n > best {
			best, bestWeight = n, w
		}
	}
	return best
}

// weight is the rendezvous weight: a hash of blob, segment and node. It is no
// secret and needs no cryptographic strength: a member that bends it takes on
// more work or loses its share, and shares are handed on at a deadline.
func weight(d digest.Digest, segment int, node string) uint64 {
	var h xxhash.Digest
	h.Reset()
	_, _ = h.WriteString(string(d))
	var n [8]byte
	binary.LittleEndian.PutUint64(n[:], uint64(segment))
	_, _ = h.Write(n[:])
	_, _ = h.WriteString(node)
	return h.Sum64()
}
