package main

import "math/bits"

// set is a set of pieces, one bit each.
type set []uint64

func newSet(n int) set { return make(set, (n+63)/64) }

func (s set) has(i int) bool { return s[i>>6]&(1<<(i&63)) != 0 }
func (s set) add(i int)      { s[i>>6] |= 1 << (i & 63) }
func (s set) drop(i int)     { s[i>>6] &^= 1 << (i & 63) }

// common returns a piece that is in both sets, the first from the bit at from on; -1 without any.
func common(a, b set, from uint32) int {
	at, turn := int(from>>6)%len(a), int(from&63)
	for range a {
		if both := a[at] & b[at]; both != 0 {
			return at<<6 + (bits.TrailingZeros64(bits.RotateLeft64(both, -turn))+turn)&63
		}
		if at++; at == len(a) {
			at = 0
		}
	}
	return -1
}

// each calls f for every piece of the set.
func (s set) each(f func(i int)) {
	for w, v := range s {
		for ; v != 0; v &= v - 1 {
			f(w<<6 + bits.TrailingZeros64(v))
		}
	}
}
