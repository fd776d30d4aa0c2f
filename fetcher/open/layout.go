package open

import (
	"errors"
	"fmt"

	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// maxPieceLength is the longest piece of a metainfo that is taken, in bytes. A piece is in memory until it is checked, so this bounds
// what one costs; it is what package published reads. Makers of torrents seldom go above 16 MiB, our own pieces have at most 1 MiB.
const maxPieceLength = 64 << 20

// layout relates the pieces of the store to those of a metainfo. Both cover the same bytes.
type layout struct {
	size int64 // of the blob, above 0
	sp   int64 // length of the store's pieces but the last
	mp   int64 // length of the metainfo's pieces but the last
}

// span is an inclusive range of pieces.
type span struct{ first, last int }

// newLayout checks what the metainfo says of lengths.
func newLayout(t *published.Torrent) (layout, error) {
	l := layout{size: t.Info.TotalLength(), mp: t.Info.PieceLength}
	switch {
	case len(t.Info.Files) > 0 || !t.Info.HasV1():
		return l, errors.New("the torrent is not of one file with SHA-1 pieces, which a layer's is")
	case l.size <= 0:
		return l, errors.New("the torrent is of an empty file")
	case t.Layer.Digest != "" && t.Layer.Size != l.size:
		return l, fmt.Errorf("the torrent is of %d bytes and the layer has %d: it is another layer's", l.size, t.Layer.Size)
	case l.mp <= 0 || l.mp > maxPieceLength:
		return l, fmt.Errorf("the torrent has pieces of %d bytes; up to %d are supported", l.mp, maxPieceLength)
	}
	l.sp = store.PieceSize(l.size)
	if n := l.metaPieces(); t.Info.NumPieces() != n {
		return l, fmt.Errorf("the torrent has hashes for %d pieces of its %d", t.Info.NumPieces(), n)
	}
	return l, nil
}

func (l layout) storePieces() int { return int((l.size + l.sp - 1) / l.sp) }
func (l layout) metaPieces() int  { return int((l.size + l.mp - 1) / l.mp) }

// storeRange and metaRange are where a piece lies: offset and length in bytes.
func (l layout) storeRange(i int) (off, n int64) { return pieceRange(l.size, l.sp, i) }
func (l layout) metaRange(j int) (off, n int64)  { return pieceRange(l.size, l.mp, j) }

func pieceRange(size, piece int64, i int) (off, n int64) {
	off = int64(i) * piece
	return off, min(piece, size-off)
}

// metaOf is the metainfo pieces that store piece i lies in.
func (l layout) metaOf(i int) span {
	off, n := l.storeRange(i)
	return span{int(off / l.mp), int((off + n - 1) / l.mp)}
}

// storeOf is the store pieces that metainfo piece j lies in.
func (l layout) storeOf(j int) span {
	off, n := l.metaRange(j)
	return span{int(off / l.sp), int((off + n - 1) / l.sp)}
}

// overlap is the bytes that store piece i and metainfo piece j share: offset in the blob and length, 0 when none.
func (l layout) overlap(i, j int) (off, n int64) {
	so, sn := l.storeRange(i)
	mo, mn := l.metaRange(j)
	off = max(so, mo)
	return off, max(0, min(so+sn, mo+mn)-off)
}
