package layerstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"sync/atomic"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// maxChunks bounds the chunks of a layer, so that a damaged file cannot ask for any
// amount of memory: 1 TiB in chunks of 64 KiB.
const maxChunks = 1 << 24

// chunkTable says which chunk an offset is in. It is immutable.
type chunkTable struct {
	ends []int64 // of each chunk
	even int64   // the length of all chunks but the last, when they are all as long; else 0
}

func tableOf(x *index.Index) (chunkTable, error) {
	lens := make([]int64, len(x.Chunks))
	var at int64
	for i, c := range x.Chunks {
		if c.Off != at {
			return chunkTable{}, fmt.Errorf("chunk %d begins at %d, not at %d", i, c.Off, at)
		}
		at += c.Len
		lens[i] = c.Len
	}
	return newTable(lens, x.DataSize)
}

func newTable(lens []int64, size int64) (chunkTable, error) {
	if len(lens) > maxChunks {
		return chunkTable{}, fmt.Errorf("%d chunks are more than %d", len(lens), maxChunks)
	}
	t := chunkTable{ends: make([]int64, len(lens))}
	if len(lens) > 0 {
		t.even = lens[0]
	}
	var at int64
	for i, n := range lens {
		if n <= 0 || n > size-at {
			return chunkTable{}, fmt.Errorf("chunk %d has %d bytes and %d are left of the data", i, n, size-at)
		}
		if n > t.even || n != t.even && i != len(lens)-1 {
			t.even = 0
		}
		at += n
		t.ends[i] = at
	}
	if at != size {
		return chunkTable{}, fmt.Errorf("the chunks end at %d of %d bytes", at, size)
	}
	return t, nil
}

// pack is the table as it is stored: the length of each chunk as a uvarint.
func (t chunkTable) pack() []byte {
	var b []byte
	for i := range t.ends {
		b = binary.AppendUvarint(b, uint64(t.size(i)))
	}
	return b
}

func unpackTable(b []byte, size int64) (chunkTable, error) {
	var lens []int64
	for len(b) > 0 {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > math.MaxInt64 {
			return chunkTable{}, errors.New("the table of chunks is damaged")
		}
		lens = append(lens, int64(v))
		b = b[n:]
	}
	return newTable(lens, size)
}

func (t chunkTable) len() int { return len(t.ends) }

func (t chunkTable) start(c int) int64 {
	if c == 0 {
		return 0
	}
	return t.ends[c-1]
}

func (t chunkTable) size(c int) int64 { return t.ends[c] - t.start(c) }

// at is the chunk that has the byte at off, the last one when off is beyond.
func (t chunkTable) at(off int64) int {
	if t.even > 0 {
		return int(min(off/t.even, int64(len(t.ends)-1)))
	}
	lo, hi := 0, len(t.ends)-1
	for lo < hi {
		mid := int(uint(lo+hi) >> 1)
		if t.ends[mid] <= off {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	return lo
}

// bitset is a set of chunks that is read without locks.
type bitset struct{ words []atomic.Uint64 }

func newBitset(n int) bitset { return bitset{make([]atomic.Uint64, (n+63)/64)} }

func (b bitset) has(c int) bool { return b.words[c>>6].Load()&(1<<(c&63)) != 0 }

// set reports whether c was not in the set before.
func (b bitset) set(c int) bool { return b.words[c>>6].Or(1<<(c&63))&(1<<(c&63)) == 0 }

// clear reports whether c was in the set before.
func (b bitset) clear(c int) bool { return b.words[c>>6].And(^uint64(1<<(c&63)))&(1<<(c&63)) != 0 }

func (b bitset) all(first, last int) bool {
	for c := first; c <= last; c++ {
		if !b.has(c) {
			return false
		}
	}
	return true
}

func (b bitset) any(first, last int) bool {
	for c := first; c <= last; c++ {
		if b.has(c) {
			return true
		}
	}
	return false
}

// missing is the first chunk from first to last that is not in the set, or -1.
func (b bitset) missing(first, last int) int {
	for c := first; c <= last; {
		w := ^b.words[c>>6].Load() >> (c & 63)
		if w == 0 {
			c = (c | 63) + 1
			continue
		}
		if c += bits.TrailingZeros64(w); c <= last {
			return c
		}
		return -1
	}
	return -1
}

func (b bitset) count() (n int) {
	for i := range b.words {
		n += bits.OnesCount64(b.words[i].Load())
	}
	return n
}
