package index

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// maxZstdWindow is what a frame may ask for to be decoded, in bytes: zstd's levels up to
// 20, and more than any image builder writes, stay below.
const maxZstdWindow = 32 << 20

var errZstdFrame = errors.New("the zstd frame is not valid")

const (
	zstdMagic     = 0xfd2fb528
	zstdSkippable = 0x184d2a50 // its last four bits are free
)

// unzstd is the stream of a zstd blob: its frames' contents. It collects points at
// frames' begins, where a decoder needs to know nothing of what was before.
type unzstd struct {
	src    *frameReader
	dec    *zstd.Decoder
	inside bool // a frame
	stream int64
	gap    int64
	points []Point
}

// newUnzstd begins with the frame that src begins with, at off in the blob.
func newUnzstd(src io.Reader, off, stream, gap int64) (*unzstd, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(maxZstdWindow), zstd.WithDecoderMaxMemory(maxSize))
	if err != nil {
		return nil, err
	}
	return &unzstd{src: &frameReader{r: bufio.NewReaderSize(src, inputSize), off: off}, dec: dec, stream: stream, gap: gap}, nil
}

// startAt goes on at a point; src begins with the point's byte.
func (u *unzstd) startAt(src io.Reader, p *Point) {
	u.src.r.Reset(src)
	u.src.off, u.stream, u.inside = p.Blob, p.Stream, false
}

func (u *unzstd) close() { u.dec.Close() }

// next is like gunzip.next, and keeps away from the first history bytes of buf, too.
func (u *unzstd) next(buf []byte) ([]byte, error) {
	n := history
	for n < len(buf) {
		if !u.inside {
			at := u.src.off
			more, err := u.src.frame()
			if err != nil {
				if n > history && err == io.EOF {
					break
				}
				return buf[history:n], err
			}
			if !more {
				continue
			}
			u.point(at, u.stream+int64(n-history))
			if err := u.dec.Reset(u.src); err != nil {
				return nil, err
			}
			u.inside = true
		}
		m, err := u.dec.Read(buf[n:])
		n += m
		if err == io.EOF {
			if err = u.src.finish(); err != nil {
				return nil, err
			}
			u.inside = false
		} else if err != nil {
			return nil, err
		}
	}
	u.stream += int64(n - history)
	return buf[history:n], nil
}

func (u *unzstd) point(blob, stream int64) {
	if u.gap == 0 {
		return
	}
	if n := len(u.points); n > 0 {
		if stream-u.points[n-1].Stream < max(1, u.gap/memberGap) {
			return
		}
		if n%(pointsPerGap*memberGap) == 0 {
			u.gap *= 2
		}
	}
	u.points = append(u.points, Point{Blob: blob, Stream: stream})
}

// frameReader reads a zstd blob one frame at a time: a frame's end is the end of its
// reads. RFC 8878 §3.1.
type frameReader struct {
	r    *bufio.Reader
	off  int64  // in the blob
	head []byte // to be read next: a frame's or block's header
	body int64  // of a block, after head
	last bool   // this is the frame's last block
	sum  int64  // length of the checksum behind it
	done bool   // all of the frame was read
	buf  [18]byte
}

// frame reads up to the next frame's header. It is false for a frame of no content,
// which is skipped. The error is io.EOF at the blob's end.
func (f *frameReader) frame() (bool, error) {
	h := f.buf[:]
	if _, err := io.ReadFull(f.r, h[:4]); err != nil {
		return false, err
	}
	switch magic := binary.LittleEndian.Uint32(h); {
	case magic&^15 == zstdSkippable:
		if _, err := io.ReadFull(f.r, h[4:8]); err != nil {
			return false, short(err)
		}
		n := int64(binary.LittleEndian.Uint32(h[4:]))
		if m, err := io.CopyN(io.Discard, f.r, n); m < n {
			return false, short(err)
		}
		f.off += 8 + n
		return false, nil
	case magic != zstdMagic:
		return false, errZstdFrame
	}
	if _, err := io.ReadFull(f.r, h[4:5]); err != nil {
		return false, short(err)
	}
	flags := h[4]
	single := flags >> 5 & 1
	n := 5 + int([4]uint8{0, 1, 2, 4}[flags&3]) + int([4]uint8{single, 2, 4, 8}[flags>>6]) + 1 - int(single)
	if _, err := io.ReadFull(f.r, h[5:n]); err != nil {
		return false, short(err)
	}
	f.head, f.body, f.last, f.done = h[:n], 0, false, false
	f.sum = int64(flags>>2&1) * 4
	f.off += int64(n)
	return true, nil
}

func short(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Read implements io.Reader on what is left of the frame.
func (f *frameReader) Read(p []byte) (int, error) {
	if len(f.head) > 0 {
		n := copy(p, f.head)
		f.head = f.head[n:]
		return n, nil
	}
	if f.body == 0 {
		if f.done {
			return 0, io.EOF
		}
		if f.last {
			f.done = true
			f.body = f.sum
			return f.Read(p)
		}
		h := f.buf[:3]
		if _, err := io.ReadFull(f.r, h); err != nil {
			return 0, short(err)
		}
		f.off += 3
		v := int64(h[0]) | int64(h[1])<<8 | int64(h[2])<<16
		f.head, f.body, f.last = h, v>>3, v&1 != 0
		if v>>1&3 == 1 {
			f.body = 1 // one byte, repeated
		}
		return f.Read(p)
	}
	n, err := f.r.Read(p[:min(int64(len(p)), f.body)])
	f.body -= int64(n)
	f.off += int64(n)
	return n, short(err)
}

// finish is for a decoder that is done with the frame: it must have read all of it.
func (f *frameReader) finish() error {
	n, err := io.Copy(io.Discard, f)
	if err == nil && n > f.sum {
		err = fmt.Errorf("%d bytes are left in it: %w", n, errZstdFrame)
	}
	return err
}
