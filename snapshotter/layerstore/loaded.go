package layerstore

import (
	"bytes"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"sort"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// loaded is a layer's index in memory, with what is derived from it.
type loaded struct {
	x *index.Index
	// from[c] is the first of the chunks whose decoding begins at the same place as
	// that of c: a decoder on its way from there passes them all.
	from []int32
	// need[c] is about where in the blob the decoding of c ends. The index knows it
	// for tars alone; elsewhere chunks are taken to be compressed as well as those
	// around them, and a little is added, as to ask for more afterwards takes a round trip.
	need []int64
	// files are where those that are not empty begin in the data file, in index.Align, in order: 4 bytes for each
	// do for layers of up to 16 TiB, and of a longer one the files beyond that are taken for one.
	files []uint32
	last  time.Time // a run used it
}

// needMore is what is added to an estimate, in 1/16 of the distance from where decoding
// begins.
const needMore = 1

func newLoaded(x *index.Index) *loaded {
	ld := &loaded{x: x.WithoutTree(), files: filesOf(x), from: make([]int32, len(x.Chunks)), need: make([]int64, len(x.Chunks)), last: time.Now()}
	var begun int64 // where the decoding of the chunk before begins
	first := 0      // the chunk whose is the first to begin there
	for c := range x.Chunks {
		from, to := x.Span(c, c)
		switch {
		case from == to: // zeros only: it comes with its neighbour
			if ld.from[c] = int32(c); c > 0 {
				ld.from[c], ld.need[c] = ld.from[c-1], ld.need[c-1]
			}
			continue
		case c == 0 || from != begun:
			if x.Compression != index.Tar {
				ld.estimate(first, c, begun, from)
			}
			first, begun = c, from
		}
		ld.from[c] = int32(first)
		ld.need[c] = to
	}
	if x.Compression != index.Tar {
		ld.estimate(first, len(x.Chunks), begun, x.BlobSize)
	}
	return ld
}

// filesOf lists where files begin.
func filesOf(x *index.Index) []uint32 {
	var files []uint32
	for i := range x.Entries {
		if e := &x.Entries[i]; e.Size > 0 && e.HardLink < 0 && e.Data/index.Align <= math.MaxUint32 {
			files = append(files, uint32(e.Data/index.Align))
		}
	}
	slices.Sort(files)
	return slices.Compact(files)
}

// file is where the file with the byte at off begins and ends in the data file, the padding behind it included.
func (ld *loaded) file(off int64) (begin, end int64) {
	begin, end = 0, ld.x.DataSize
	// The first that begins beyond off.
	i := sort.Search(len(ld.files), func(i int) bool { return int64(ld.files[i])*index.Align > off })
	if i > 0 {
		begin = int64(ld.files[i-1]) * index.Align
	}
	if i < len(ld.files) {
		end = int64(ld.files[i]) * index.Align
	}
	return begin, end
}

// estimate fills in need for the chunks from first to before after, which are decoded
// from the blob between from and to.
func (ld *loaded) estimate(first, after int, from, to int64) {
	if first >= after {
		return
	}
	begin := ld.x.Chunks[first].Off
	last := ld.x.Chunks[after-1]
	share := float64(to-from) / float64(last.Off+last.Len-begin)
	for c := first; c < after; c++ {
		way := int64(float64(ld.x.Chunks[c].Off+ld.x.Chunks[c].Len-begin) * share)
		ld.need[c] = min(from+way+way*needMore/16, to)
	}
}

// indexLocked is the layer's index, from memory or disk.
func (l *layer) indexLocked() (*loaded, error) {
	if l.idx != nil {
		return l.idx, nil
	}
	x, err := l.readIndex(l.dir)
	if err != nil {
		return nil, err
	}
	if len(x.Chunks) != l.chunks.len() || x.DataSize != l.info.DataSize || x.Blob != l.info.Blob {
		return nil, fmt.Errorf("the index of layer %s on disk is not of this layer", l.info.Blob)
	}
	// The tree is in the metadata image, and most of the index.
	l.idx = newLoaded(x)
	return l.idx, nil
}

// Index reads the layer's whole index from disk, to hand it to another node.
func (h *Layer) Index() (*index.Index, error) {
	h.l.mu.Lock()
	dir := h.l.dir
	h.l.mu.Unlock()
	return h.l.readIndex(dir)
}

func (l *layer) readIndex(dir string) (*index.Index, error) {
	b, err := l.readIndexText(dir)
	if err != nil {
		return nil, err
	}
	x, err := index.Decode(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("the index of layer %s: %w", l.info.Blob, err)
	}
	return x, nil
}

func (l *layer) readIndexText(dir string) ([]byte, error) {
	b, err := readBounded(filepath.Join(dir, fileIndex), l.info.IndexSize)
	if err != nil {
		return nil, fmt.Errorf("the index of layer %s: %w", l.info.Blob, err)
	}
	if got := digest.FromBytes(b); got != l.info.IndexSum {
		return nil, fmt.Errorf("the index of layer %s on disk was altered: it has the digest %s, not %s", l.info.Blob, got, l.info.IndexSum)
	}
	return b, nil
}
