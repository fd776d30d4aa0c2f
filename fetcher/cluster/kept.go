package cluster

import "github.com/opencontainers/go-digest"

// Kept is what a keeper knows of one blob, in numbers.
type Kept struct {
	// Nodes counts those that fetch or hold the blob, Complete those of them that
	// hold all of it, Out the segments that are lent now, Lent all that were.
	Nodes, Complete, Out, Lent int
}

// Kept returns what this node knows of a blob whose list it keeps.
func (c *Cluster) Kept(d digest.Digest) (k Kept, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.book.pages[d]
	if p == nil {
		return Kept{}, false
	}
	return Kept{Nodes: len(p.order), Complete: p.complete, Out: p.out, Lent: p.lent}, true
}
