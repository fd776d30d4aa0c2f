package index

import (
	"context"
	"io"
	"slices"
)

const (
	// refineFrom is how much has to be decoded in vain before a range for a further point to be worth it.
	refineFrom = 128 << 10
	// refineShare bounds what the windows of further points may have that is not zeros: this part of the blob. They
	// compress to a third, about.
	refineShare = 32
)

// Refine makes an index that knows what is read first, with further points before these ranges, so that nothing is fetched
// and decoded in vain on the way there: as many as an order of MaxFirst ranges can have and a part of the blob's
// size allows. open gives the blob from an offset on. The index of a tar or of zstd frames, or one made from a table of
// contents, gets no points.
func (x *Index) Refine(ctx context.Context, first []Range, open func(off int64) (io.ReadCloser, error)) (*Index, error) {
	y := *x
	y.text, y.First = nil, first
	if x.Compression != Gzip || x.partial() {
		return &y, y.Validate()
	}
	if err := y.checkFirst(); err != nil {
		return nil, err
	}
	budget := x.BlobSize / refineShare
	var more []Point
	for _, t := range x.targets(first) {
		if len(x.Points)+len(more) >= maxPoints/2 || budget <= 0 {
			break
		}
		made, err := x.pointsBefore(ctx, t.point, t.streams, open)
		if err != nil {
			return nil, err
		}
		for _, p := range made {
			budget -= nonZero(p.Window)
			more = append(more, p)
		}
	}
	y.Points = slices.Concat(x.Points, more)
	slices.SortFunc(y.Points, func(a, b Point) int { return int(min(max(a.Stream-b.Stream, -1), 1)) })
	return &y, y.Validate()
}

// targetsOf are offsets in the stream that decoding from one point leads to.
type targetsOf struct {
	point   int
	streams []int64 // in order
}

// targets finds which points the begins of ranges are decoded from; in the order of the ranges that are first for each.
func (x *Index) targets(ranges []Range) []targetsOf {
	var all []targetsOf
	place := make(map[int]int)
	for _, r := range ranges {
		i, _ := x.extentsOf(r.Off, x.DataSize)
		if i == len(x.Extents) {
			continue
		}
		e := x.Extents[i]
		stream := e.Stream + max(0, r.Off-e.Data)
		point := x.pointAt(stream)
		if stream-x.Points[point].Stream < refineFrom {
			continue
		}
		n, ok := place[point]
		if !ok {
			n = len(all)
			place[point] = n
			all = append(all, targetsOf{point: point})
		}
		all[n].streams = append(all[n].streams, stream)
	}
	for i := range all {
		slices.Sort(all[i].streams)
	}
	return all
}

// pointsBefore decodes from a point twice: to find which block each of the targets is in, and to make points at these.
func (x *Index) pointsBefore(ctx context.Context, point int, targets []int64, open func(off int64) (io.ReadCloser, error)) ([]Point, error) {
	begin := x.Points[point].Stream
	last := targets[len(targets)-1]
	var at []int64
	before := begin // where the last block that was seen begins
	next := 0       // the first target that lies behind it, as far as is known
	block := func(stream int64) {
		for next < len(targets) && targets[next] < stream {
			if before >= begin+minSpacing && (len(at) == 0 || before >= at[len(at)-1]+minSpacing) {
				at = append(at, before)
			}
			next++
		}
		before = stream
	}
	if _, err := x.decodeFrom(ctx, point, last+1, open, func(g *gunzip) { g.blocks = block }); err != nil {
		return nil, err
	}
	block(maxSize)
	if len(at) == 0 {
		return nil, nil
	}
	g, err := x.decodeFrom(ctx, point, at[len(at)-1]+history, open, func(g *gunzip) { g.only = at })
	if err != nil {
		return nil, err
	}
	g.closePoint()
	return g.points, nil
}

// decodeFrom decodes from a point until the stream has come to end, or has ended.
func (x *Index) decodeFrom(ctx context.Context, point int, end int64, open func(off int64) (io.ReadCloser, error), set func(*gunzip)) (*gunzip, error) {
	p := &x.Points[point]
	rc, err := open(p.Blob)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	src := &source{rc: rc, ctx: ctx, off: p.Blob, pos: p.Blob, end: x.BlobSize}
	g, buf := newGunzip(src, 0), make([]byte, history+fillBuffer+slack)
	if err := g.startAt(src, p, buf); err != nil {
		return nil, err
	}
	set(g)
	for g.stream < end {
		if _, err := g.next(buf); err == io.EOF {
			break
		} else if err != nil {
			if src.err != nil {
				err = src.err
			}
			return nil, err
		}
	}
	return g, nil
}

func nonZero(b []byte) (n int64) {
	for _, c := range b {
		if c != 0 {
			n++
		}
	}
	return n
}
