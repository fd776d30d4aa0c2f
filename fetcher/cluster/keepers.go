package cluster

import (
	"iter"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Keepers ranks the members that keep a blob's list: rendezvous hashing among all,
// with those that come and go (Ephemeral) after all others. The first lends, the
// second stands by, the third is asked when both are gone at once. Every node
// computes the same from the same members, in any order.
func Keepers(d digest.Digest, members iter.Seq[Member]) []Member {
	best := make([]Member, 0, keepersAsked+1)
	weights := make([]uint64, 0, keepersAsked+1)
	for m := range members {
		w := weight(d, -1, m.ID) >> 1
		if !m.Ephemeral {
			w |= 1 << 63 // before all that come and go
		}
		at := len(best)
		for at > 0 && (w > weights[at-1] || w == weights[at-1] && m.ID > best[at-1].ID) {
			at--
		}
		if at < keepersAsked {
			best, weights = slices.Insert(best, at, m), slices.Insert(weights, at, w)
			best, weights = best[:min(len(best), keepersAsked)], weights[:min(len(weights), keepersAsked)]
		}
	}
	return best
}
