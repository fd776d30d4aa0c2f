package index

import (
	"context"
	"errors"
	"fmt"
	"io"
)

// fillBuffer is decoded at once by Fill: little, so that not much is decoded in vain
// behind the last byte that is needed.
const fillBuffer = 64 << 10

// Fill decodes the chunks from first to last, both included, and hands each to put once,
// in order, after its SHA-256 was checked. open gives the blob from an offset on; it is
// asked once in most cases, and what it gives is read up to inputSize (64 KiB) further than
// decoding needs, never beyond Span's end.
//
// put is also called for chunks before first that come whole on the way from the nearest
// point. The bytes that it gets are valid during the call only; its error ends Fill.
//
// The error is ErrChunk for a chunk that the blob does not decode to; chunks before it
// were good.
func (x *Index) Fill(ctx context.Context, first, last int, open func(off int64) (io.ReadCloser, error), put func(chunk int, p []byte) error) error {
	if first < 0 || last < first || last >= len(x.Chunks) {
		return fmt.Errorf("chunks %d to %d are not all in the layer's %d", first, last, len(x.Chunks))
	}
	f := &filler{x: x, ctx: ctx, open: open, next: first}
	defer f.close()
	end := x.Chunks[last].Off + x.Chunks[last].Len
	if s, e := x.streamOf(x.Chunks[first].Off, end); s < e {
		_, f.limit = x.Span(first, last)
		point := x.pointAt(s)
		if x.Compression != Tar {
			f.next = min(first, x.firstWhole(x.Points[point].Stream))
		}
		if err := f.begin(point, s); err != nil {
			return f.failed(err)
		}
	}
	var buf []byte
	for ; f.next <= last; f.next++ {
		c := &x.Chunks[f.next]
		if int64(cap(buf)) < c.Len {
			buf = make([]byte, c.Len)
		}
		buf = buf[:c.Len]
		clear(buf)
		i, after := x.extentsOf(c.Off, c.Off+c.Len)
		for _, e := range x.Extents[i:after] {
			from, to := max(e.Data, c.Off), min(e.Data+e.Len, c.Off+c.Len)
			if err := f.read(buf[from-c.Off:to-c.Off], e.Stream+from-e.Data); err != nil {
				return f.failed(err)
			}
		}
		if err := x.Check(f.next, buf); err != nil {
			return err
		}
		if err := put(f.next, buf); err != nil {
			return err
		}
	}
	return nil
}

// filler is a Fill under way.
type filler struct {
	x     *Index
	ctx   context.Context
	open  func(off int64) (io.ReadCloser, error)
	limit int64 // in the blob: where Span ends
	next  int   // chunk

	src    *source
	gz     *gunzip
	zs     *unzstd
	point  int    // the one that decoding began at
	buf    []byte // of the decoder
	have   []byte // decoded and not used
	stream int64  // offset of have
}

// openError is an error of open, which is not the chunk's fault.
type openError struct{ err error }

func (e openError) Error() string { return e.err.Error() }

// failed tells errors of the source and of the context from data that is wrong.
func (f *filler) failed(err error) error {
	if f.src != nil && f.src.err != nil {
		return f.src.err
	}
	var opening openError
	if errors.As(err, &opening) {
		return opening.err
	}
	return ErrChunk{f.next, err}
}

func (f *filler) close() {
	if f.src != nil {
		f.src.rc.Close()
	}
	if f.zs != nil {
		f.zs.close()
	}
}

// seek makes the blob's bytes from off on come next. Not much forward is read over, and
// what was read just before is still there.
func (f *filler) seek(off int64) error {
	if f.src != nil {
		if f.src.seek(off) {
			return nil
		}
		f.src.rc.Close()
		f.src = nil
	}
	rc, err := f.open(off)
	if err != nil {
		return openError{err}
	}
	f.src = &source{rc: rc, ctx: f.ctx, off: off, pos: off, end: f.limit}
	return nil
}

// begin starts decoding at a point; for a tar, right at an offset.
func (f *filler) begin(point int, stream int64) error {
	p := &f.x.Points[point]
	f.point, f.have, f.stream = point, nil, p.Stream
	if f.x.Compression == Tar {
		f.stream = stream
		return f.seek(stream)
	}
	if err := f.seek(p.Blob); err != nil {
		return err
	}
	if f.x.Compression == Gzip {
		if f.gz == nil {
			f.gz, f.buf = newGunzip(f.src, 0), make([]byte, history+fillBuffer+slack)
		}
		return f.gz.startAt(f.src, p, f.buf)
	}
	if f.zs == nil {
		var err error
		f.buf = make([]byte, history+fillBuffer)
		if f.zs, err = newUnzstd(f.src, 0, 0, 0); err != nil {
			return err
		}
	}
	f.zs.startAt(f.src, p)
	return nil
}

// read takes p from the stream at an offset, which must not be behind what was read.
func (f *filler) read(p []byte, stream int64) error {
	if f.x.Compression == Tar {
		if stream != f.stream {
			if err := f.begin(0, stream); err != nil {
				return err
			}
		}
		n, err := io.ReadFull(f.src, p)
		f.stream += int64(n)
		return short(err)
	}
	for len(p) > 0 {
		// The members of an index from a table of contents go on behind what is of
		// the stream, with the tar's headers: each has to be begun at its point.
		if f.x.partial() {
			if best := f.x.pointAt(stream); best != f.point {
				if err := f.begin(best, stream); err != nil {
					return err
				}
			}
		}
		if err := f.forward(stream); err != nil {
			return err
		}
		have := f.have
		if next := f.point + 1; f.x.partial() && next < len(f.x.Points) {
			have = have[:min(int64(len(have)), f.x.Points[next].Stream-f.stream)]
		}
		n := copy(p, have)
		p, stream = p[n:], stream+int64(n)
		f.have, f.stream = f.have[n:], f.stream+int64(n)
	}
	return nil
}

// partial tells that only what the points and extents name is known of the stream.
func (x *Index) partial() bool { return x.DiffID == "" }

// forward decodes up to an offset, so that something is in have there.
func (f *filler) forward(stream int64) error {
	for {
		if stream < f.stream {
			return errCorrupt
		}
		n := min(stream-f.stream, int64(len(f.have)))
		f.have, f.stream = f.have[n:], f.stream+n
		if len(f.have) > 0 {
			return nil
		}
		var err error
		if f.gz != nil {
			f.have, err = f.gz.next(f.buf)
		} else {
			f.have, err = f.zs.next(f.buf)
		}
		if len(f.have) == 0 {
			return short(err)
		}
	}
}

// source is the blob from some offset on. It remembers its error, so that a blob
// that cannot be read is told from one that is wrong; and the last bytes, because
// decoders read further than to where the next member begins.
type source struct {
	rc  io.ReadCloser
	ctx context.Context
	buf []byte // what was read last, up to off
	off int64  // of the next byte of rc
	pos int64  // of the next byte to be read from here
	end int64
	err error
}

func (s *source) Read(p []byte) (int, error) {
	for s.pos == s.off {
		if s.err == nil {
			s.err = s.ctx.Err()
		}
		if s.err != nil {
			return 0, s.err
		}
		if s.off >= s.end {
			return 0, io.EOF
		}
		if s.buf == nil {
			s.buf = make([]byte, 0, 2*inputSize)
		}
		if cap(s.buf)-len(s.buf) < inputSize {
			s.buf = s.buf[:copy(s.buf, s.buf[len(s.buf)-inputSize:])]
		}
		n, err := s.rc.Read(s.buf[len(s.buf):min(int64(len(s.buf)+inputSize), int64(len(s.buf))+s.end-s.off)])
		s.buf = s.buf[:len(s.buf)+n]
		s.off += int64(n)
		if err == io.EOF {
			err = nil
			if n == 0 {
				err = fmt.Errorf("the layer's bytes end at %d instead of %d: %w", s.off, s.end, io.ErrUnexpectedEOF)
			}
		}
		s.err = err
	}
	n := copy(p, s.buf[int64(len(s.buf))-(s.off-s.pos):])
	s.pos += int64(n)
	return n, nil
}

// seek goes to an offset that is not far, and is false for one that is.
func (s *source) seek(off int64) bool {
	switch {
	case off < s.off-int64(len(s.buf)) || off > s.off+inputSize || off > s.end:
		return false
	case off <= s.off:
		s.pos = off
		return true
	}
	s.pos = s.off
	_, err := io.CopyN(io.Discard, s, off-s.off)
	return err == nil
}
