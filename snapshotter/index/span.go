package index

import (
	"crypto/sha256"
	"fmt"
	"sort"
)

// extentsOf are the extents that have bytes of the data file from off to end, as a
// range of places in Extents.
func (x *Index) extentsOf(off, end int64) (first, after int) {
	first = sort.Search(len(x.Extents), func(i int) bool { return x.Extents[i].Data+x.Extents[i].Len > off })
	after = first + sort.Search(len(x.Extents)-first, func(i int) bool { return x.Extents[first+i].Data >= end })
	return first, after
}

// streamOf is the range of the stream that has the data from off to end; it is empty
// when all of that is zeros.
func (x *Index) streamOf(off, end int64) (from, to int64) {
	first, after := x.extentsOf(off, end)
	if first == after {
		return 0, 0
	}
	a, b := x.Extents[first], x.Extents[after-1]
	return a.Stream + max(0, off-a.Data), b.Stream + min(b.Len, end-b.Data)
}

// pointAt is the number of the last point at or before an offset in the stream.
func (x *Index) pointAt(stream int64) int {
	return sort.Search(len(x.Points), func(i int) bool { return x.Points[i].Stream > stream }) - 1
}

// Span is the range of the blob that decoding the chunks from first to last, both
// included, may need. It begins at a point and ends at one or at the blob's end, so
// it may be much more than what Fill comes to read. It is empty when the chunks are
// zeros only.
func (x *Index) Span(first, last int) (from, to int64) {
	off, end := x.Chunks[first].Off, x.Chunks[last].Off+x.Chunks[last].Len
	s, e := x.streamOf(off, end)
	if s == e {
		return 0, 0
	}
	if x.Compression == Tar {
		return s, e
	}
	from = x.Points[x.pointAt(s)].Blob
	to = x.BlobSize
	if i := sort.Search(len(x.Points), func(i int) bool { return x.Points[i].Stream >= e }); i < len(x.Points) {
		to = x.Points[i].Blob
		if x.Points[i].Bit > 0 {
			to++
		}
	}
	return from, to
}

// PointChunks are the chunks, first to last, that decoding from point i up to the next one
// gives whole: they come for free when one of them is filled. There are none when
// last < first.
func (x *Index) PointChunks(i int) (first, last int) {
	from, to := x.Points[i].Stream, int64(maxSize)
	if i+1 < len(x.Points) {
		to = x.Points[i+1].Stream
	}
	first = x.firstWhole(from)
	last = sort.Search(len(x.Chunks), func(n int) bool {
		c := &x.Chunks[n]
		_, e := x.streamOf(0, c.Off+c.Len)
		return e > to
	}) - 1
	return first, last
}

// ChunkPoint is the point that Fill begins at for a chunk; -1 for one of zeros only.
func (x *Index) ChunkPoint(chunk int) int {
	c := &x.Chunks[chunk]
	s, e := x.streamOf(c.Off, c.Off+c.Len)
	if s == e {
		return -1
	}
	return x.pointAt(s)
}

// firstWhole is the first chunk that has all its data at or after an offset in the
// stream, and none before.
func (x *Index) firstWhole(stream int64) int {
	i := sort.Search(len(x.Extents), func(i int) bool { return x.Extents[i].Stream+x.Extents[i].Len > stream })
	if i == len(x.Extents) {
		return len(x.Chunks)
	}
	data := x.Extents[i].Data
	if s := x.Extents[i].Stream; s < stream {
		data += stream - s
	}
	// A chunk that data begins in the middle of may yet have only zeros before it.
	after := int64(0)
	if i > 0 && x.Extents[i].Stream >= stream {
		after = x.Extents[i-1].Data + x.Extents[i-1].Len
	} else if i > 0 || x.Extents[i].Stream < stream {
		after = data
	}
	return sort.Search(len(x.Chunks), func(n int) bool {
		return x.Chunks[n].Off >= after || x.Chunks[n].Off >= data
	})
}

// ChunkAt is the number of the chunk that has the byte at off of the data file, which
// must be inside it.
func (x *Index) ChunkAt(off int64) int {
	return sort.Search(len(x.Chunks), func(i int) bool { return x.Chunks[i].Off > off }) - 1
}

// Check tells whether p is what a chunk must be, padding included. The error is
// ErrChunk.
func (x *Index) Check(chunk int, p []byte) error {
	c := &x.Chunks[chunk]
	if int64(len(p)) != c.Len {
		return ErrChunk{chunk, fmt.Errorf("it has %d bytes instead of %d", len(p), c.Len)}
	}
	for _, b := range p[c.Len-c.Pad:] {
		if b != 0 {
			return ErrChunk{chunk, fmt.Errorf("its padding is not zeros")}
		}
	}
	if sha256.Sum256(p[:c.Len-c.Pad]) != c.Sum {
		return ErrChunk{chunk, errSum}
	}
	return nil
}
