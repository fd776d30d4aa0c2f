package index

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

var errGzipHeader = errors.New("the gzip member's header is not valid")

// gunzip is the stream of a gzip blob: members of DEFLATE blocks. It can collect
// points as it goes, and can begin at one.
type gunzip struct {
	*inflater
	state  int
	left   int // of a stored block, bytes
	stream int64
	member int64 // stream offset of the member's begin

	check   bool   // the members' CRCs are compared; not for one that began at a point
	crc     uint32 // of the member until crcPos
	crcPos  int    // in out
	gap     int64  // see Options.Spacing; 0 makes no points
	made    int    // points since gap last grew
	points  []Point
	pending seen // of the last point, when inflater.seen is set

	// Instead of gap: where points are made, in order, or who is told where they could be.
	only   []int64
	blocks func(stream int64)
}

const (
	stateMember = iota
	stateBlock
	stateStored
	stateHuffman
	stateTrailer
	stateEnd
)

// newGunzip reads the blob's stream from its begin. When gap is more than 0 it collects
// a point about every gap bytes.
func newGunzip(src io.Reader, gap int64) *gunzip {
	return &gunzip{inflater: newInflater(src, 0), check: true, gap: gap}
}

// startAt goes on at a point in buf; src begins with the point's byte.
func (g *gunzip) startAt(src io.Reader, p *Point, buf []byte) error {
	g.reset(src, p.Blob)
	g.stream, g.check, g.gap, g.state, g.out = p.Stream, false, 0, stateMember, nil
	g.swap(buf)
	if !p.Raw {
		return nil
	}
	g.state = stateBlock
	copy(buf[history-len(p.Window):history], p.Window)
	g.hist = len(p.Window)
	g.member = p.Stream - int64(len(p.Window))
	if err := g.need(1); err != nil {
		return err
	}
	g.bits(uint(p.Bit))
	return nil
}

// next fills buf behind its first history bytes and returns what it put there, which
// is never empty unless there is an error. The error is io.EOF at the blob's end.
func (g *gunzip) next(buf []byte) ([]byte, error) {
	g.swap(buf)
	g.crcPos = g.op
	err := g.run()
	g.sum()
	g.stream += int64(g.op - history)
	if g.op > history {
		if err == io.EOF {
			err = nil // comes again
		}
		return g.out[history:g.op], err
	}
	return nil, err
}

// at is the stream offset of what comes next, within run.
func (g *gunzip) at() int64 { return g.stream + int64(g.op-history) }

func (g *gunzip) sum() {
	if g.check {
		g.crc = crc32.Update(g.crc, crc32.IEEETable, g.out[g.crcPos:g.op])
		g.crcPos = g.op
	}
}

// run decodes until the buffer is full (nil) or there is nothing more.
func (g *gunzip) run() error {
	for {
		switch g.state {
		case stateMember:
			if err := g.header(); err != nil {
				return err
			}
			g.base, g.hist, g.member = g.op, 0, g.at()
			g.crc, g.crcPos = 0, g.op
			g.state = stateBlock
		case stateBlock:
			g.point(true)
			kind, left, err := g.block()
			if err != nil {
				return err
			}
			g.left, g.state = left, stateHuffman
			if kind == blockStored {
				g.state = stateStored
			}
		case stateStored:
			for g.left > 0 {
				if g.op >= g.full {
					return nil
				}
				n, err := g.stored(g.left)
				if err != nil {
					return err
				}
				g.left -= n
			}
			g.endBlock()
		case stateHuffman:
			if err := g.need(headerRoom); err != nil {
				return err
			}
			done, err := g.huffman()
			if err != nil {
				return err
			}
			if done {
				g.endBlock()
			} else if g.op >= g.full {
				return nil
			}
		case stateTrailer:
			if err := g.trailer(); err != nil {
				return err
			}
			g.state = stateMember
		case stateEnd:
			return io.EOF
		}
	}
}

func (g *gunzip) endBlock() {
	g.state = stateBlock
	if g.last {
		g.state = stateTrailer
	}
}

// header reads a member's header: RFC 1952 §2.3.
func (g *gunzip) header() error {
	if err := g.need(headerRoom); err != nil {
		return err
	}
	if g.end >= 0 && g.ip >= g.end {
		g.closePoint()
		if g.inOff+int64(g.ip) == 0 {
			return io.ErrUnexpectedEOF
		}
		g.state = stateEnd
		return io.EOF
	}
	g.point(false)
	h := g.in[g.ip:]
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return g.headerErr()
	}
	flags := h[3]
	sum := crc32.NewIEEE()
	take := func(n int) ([]byte, error) { // at most 8
		if err := g.need(n); err != nil {
			return nil, err
		}
		b := g.in[g.ip : g.ip+n]
		g.ip += n
		sum.Write(b)
		return b, g.overrun()
	}
	if _, err := take(10); err != nil {
		return err
	}
	if flags&4 != 0 { // FEXTRA
		b, err := take(2)
		if err != nil {
			return err
		}
		for n := int(binary.LittleEndian.Uint16(b)); n > 0; n -= min(n, 8) {
			if _, err := take(min(n, 8)); err != nil {
				return err
			}
		}
	}
	for _, f := range []byte{8, 16} { // FNAME, FCOMMENT: up to a zero
		for n := 0; flags&f != 0; n++ {
			b, err := take(1)
			if err != nil {
				return err
			}
			if b[0] == 0 {
				break
			}
			if n == 511 {
				return errGzipHeader // as long as compress/gzip reads, too
			}
		}
	}
	if flags&2 != 0 { // FHCRC
		want := uint16(sum.Sum32())
		b, err := take(2)
		if err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(b) != want {
			return g.headerErr()
		}
	}
	return nil
}

func (g *gunzip) headerErr() error {
	if g.end >= 0 && g.end-g.ip < 10 {
		return io.ErrUnexpectedEOF
	}
	return errGzipHeader
}

// trailer reads a member's CRC and length: RFC 1952 §2.3.1.
func (g *gunzip) trailer() error {
	g.closePoint()
	g.align()
	if err := g.need(8); err != nil {
		return err
	}
	if g.end >= 0 && g.ip+8 > g.end {
		return io.ErrUnexpectedEOF
	}
	g.sum()
	crc, size := binary.LittleEndian.Uint32(g.in[g.ip:]), binary.LittleEndian.Uint32(g.in[g.ip+4:])
	g.ip += 8
	if g.check && (crc != g.crc || size != uint32(g.at()-g.member)) {
		return fmt.Errorf("a gzip member does not have the CRC-32 and size of its trailer: %w", errCorrupt)
	}
	return nil
}

// point makes a point here, when one is wanted.
func (g *gunzip) point(raw bool) {
	if g.seen != nil && g.op-g.base >= history {
		g.closePoint()
	}
	if !g.wanted(raw) {
		return
	}
	at, off := g.at(), g.bitOff()
	g.closePoint()
	p := Point{Blob: off / 8, Bit: uint8(off % 8), Stream: at, Raw: raw}
	if !raw {
		// A member's end left whole bytes only.
		p.Bit = 0
	}
	g.points = append(g.points, p)
	if g.made++; g.made == pointsPerGap {
		g.gap, g.made = g.gap*2, 0
	}
	if !raw {
		return
	}
	before := int(min(at-g.member, history))
	g.base, g.hist = g.op, before
	g.pending = seen{}
	copy(g.pending.window[history-before:], g.out[g.op-before:g.op])
	g.seen = &g.pending
}

// wanted tells whether there is to be a point: where the last one is far enough away, or where it was asked for.
func (g *gunzip) wanted(raw bool) bool {
	at := g.at()
	if g.blocks != nil {
		if raw {
			g.blocks(at)
		}
		return false
	}
	if len(g.only) > 0 {
		if !raw || at < g.only[0] {
			return false
		}
		here := at == g.only[0]
		g.only = g.only[1:]
		return here
	}
	if g.gap == 0 {
		return false
	}
	if len(g.points) == 0 {
		return !raw // the first is the first member's begin
	}
	last := &g.points[len(g.points)-1]
	since := at - last.Stream
	if raw {
		return since >= g.gap && (g.bitOff()/8-last.Blob >= g.gap*blobShare/16 || since >= g.gap*streamGap)
	}
	return since > 0 && since >= g.gap/memberGap
}

// closePoint keeps of the last point's window what was referred to.
func (g *gunzip) closePoint() {
	if g.seen == nil {
		return
	}
	g.points[len(g.points)-1].Window = g.seen.cut()
	g.seen = nil
}

// seen is the window of a point, and what of it was referred to.
type seen struct {
	window [history]byte
	used   [history]bool
}

func (s *seen) mark(from, n int) {
	used := s.used[from : from+n]
	for i := range used {
		used[i] = true
	}
}

// cut returns the window with zeros in place of what nobody needs, and without
// such bytes at its front. It is not nil.
func (s *seen) cut() []byte {
	first := history
	for i := history - 1; i >= 0; i-- {
		if s.used[i] {
			first = i
		} else {
			s.window[i] = 0
		}
	}
	w := make([]byte, history-first)
	copy(w, s.window[first:])
	return w
}
