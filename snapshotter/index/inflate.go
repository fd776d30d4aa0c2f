package index

import (
	"encoding/binary"
	"errors"
	"io"
)

const (
	// history is how far back DEFLATE may refer, in bytes.
	history = 32 << 10

	// slack is what one turn of the decoding loop may write beyond the mark where it
	// stops: two literals, the longest match (258) and the rest of an 8 byte word.
	slack = 320

	// inputSize is read from the blob at once. It is also how far decoding may read
	// ahead of what it needs.
	inputSize = 64 << 10

	// headerRoom is more than any block header has: 14 bits, 19 lengths of 3 bits and
	// 316 lengths of 14 bits make 570 bytes.
	headerRoom = 1 << 10

	inputPad = 64 // zeros behind the end of the input: see need
)

var errCorrupt = errors.New("the compressed data is corrupt")

// inflater decodes DEFLATE into buffers that its caller gives it.
//
// It stops only between symbols, where all of its state is in the fields here: at a
// buffer's end, at a block's, or when the input must be refilled. Bits are taken off
// the low end of acc.
type inflater struct {
	src   io.Reader
	in    []byte // cap is inputSize+inputPad
	ip    int    // next byte of in
	inOff int64  // offset in the blob of in[0]
	end   int    // at the end of the input: len of what is real in in; else -1
	err   error  // of src

	acc  uint64 // bits that are read and not used
	have uint   // how many; acc may hold true bits of in[ip:] above them

	out  []byte // begins with history bytes of what came before
	op   int    // next byte of out
	full int    // op at which out is full
	base int    // where the member or the last point began in out; may be negative
	hist int    // bytes before base that may be referred to
	seen *seen  // the window's bytes that were referred to, when a point is open

	last bool // this is the member's last block
	lit  [litSize]uint32
	dist [distSize]uint32
	pre  [1 << preRoot]uint32
	lens [288 + 32]uint8
}

func newInflater(src io.Reader, off int64) *inflater {
	z := &inflater{src: src, in: make([]byte, 0, inputSize+inputPad)}
	z.reset(src, off)
	return z
}

// reset begins anew with src, whose first byte is at off in the blob.
func (z *inflater) reset(src io.Reader, off int64) {
	z.src, z.in, z.ip, z.inOff, z.end, z.err = src, z.in[:0], 0, off, -1, nil
	z.acc, z.have, z.last = 0, 0, false
}

// swap goes on in buf, which must have room for history, slack and more. It may be
// the buffer in use.
func (z *inflater) swap(buf []byte) {
	if z.out == nil {
		z.op, z.base, z.hist = history, history, 0
	} else {
		copy(buf[:history], z.out[z.op-history:z.op])
		z.base -= z.op - history
		// Far behind it does not matter where it was; this bounds it.
		z.base = max(z.base, -2*history)
		z.op = history
	}
	z.out, z.full = buf, len(buf)-slack
}

// need makes at least n bytes be in z.in behind ip, n at most headerRoom. At the
// input's end zeros stand in for what is missing, which overrun notices.
func (z *inflater) need(n int) error {
	if len(z.in)-z.ip >= n || z.end >= 0 {
		return z.overrun()
	}
	z.ip -= int(z.have / 8) // align can give back only what is still here
	z.have %= 8
	z.acc &= 1<<z.have - 1
	rest := copy(z.in[:cap(z.in)], z.in[z.ip:])
	z.inOff += int64(z.ip)
	z.in, z.ip = z.in[:rest], 0
	for len(z.in) < n {
		m, err := z.src.Read(z.in[len(z.in):inputSize])
		z.in = z.in[:len(z.in)+m]
		if err == io.EOF {
			z.end = len(z.in)
			z.in = z.in[:len(z.in)+inputPad]
			clear(z.in[z.end:])
			return z.overrun()
		}
		if err != nil {
			z.err = err
			return err
		}
	}
	return nil
}

// bitOff is the offset in the blob, in bits, of the next one that is not used.
func (z *inflater) bitOff() int64 { return (z.inOff+int64(z.ip))*8 - int64(z.have) }

// overrun fails when bits were used that are not there.
func (z *inflater) overrun() error {
	if z.end >= 0 && z.bitOff() > (z.inOff+int64(z.end))*8 {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// bits takes n bits, at most 32. The caller has seen to it by need that they are there.
func (z *inflater) bits(n uint) uint32 {
	if z.have < n {
		for z.have <= 56 {
			if z.ip >= len(z.in) {
				break // zeros; overrun tells
			}
			z.acc &= 1<<z.have - 1
			z.acc |= uint64(z.in[z.ip]) << z.have
			z.ip++
			z.have += 8
		}
		if z.have < n {
			// Behind the padding: count the bits as used, so that overrun tells.
			z.ip++
			z.have += 8
			return z.bits(n)
		}
	}
	v := uint32(z.acc & (1<<n - 1))
	z.acc >>= n
	z.have -= n
	return v
}

// align drops the bits up to the next byte, and gives back the bytes that were only
// looked at.
func (z *inflater) align() {
	z.ip -= int(z.have / 8)
	z.acc, z.have = 0, 0
}

// stored copies up to n bytes of a stored block, and tells how many.
func (z *inflater) stored(n int) (int, error) {
	if err := z.need(1); err != nil {
		return 0, err
	}
	avail := z.in[z.ip:]
	if z.end >= 0 {
		avail = z.in[min(z.ip, z.end):z.end]
	}
	if len(avail) == 0 && n > 0 {
		return 0, io.ErrUnexpectedEOF
	}
	m := copy(z.out[z.op:z.full], avail[:min(n, len(avail))])
	z.op += m
	z.ip += m
	return m, nil
}

// back is asked about matches that reach before base.
func (z *inflater) back(op, dist, length int) bool {
	over := dist - (op - z.base)
	if over > z.hist {
		return false
	}
	if z.seen != nil {
		z.seen.mark(history-over, min(length, over))
	}
	return true
}

// huffman decodes until the block's end (true), or until the buffer is full or the
// input used up (false).
func (z *inflater) huffman() (bool, error) {
	in, ip, acc, have := z.in, z.ip, z.acc, z.have
	out, op, full, base := z.out, z.op, z.full, z.base
	lit, dist := &z.lit, &z.dist
	safe := len(in) - 24 // a turn loads three times at most, and each load goes on by 7
	done, bad := false, false
loop:
	for ip <= safe && op < full {
		acc |= binary.LittleEndian.Uint64(in[ip:]) << (have & 63)
		ip += int(63-have) >> 3
		have |= 56
		e := lit[acc&(1<<litRoot-1)]
		if e&flagLiteral != 0 {
			// 56 bits have room for three literals of the root table and a whole
			// length (20), so that only the distance needs another load.
			acc >>= e & 63
			have -= uint(e & 63)
			out[op] = byte(e >> 16)
			op++
			e = lit[acc&(1<<litRoot-1)]
			if e&flagLiteral != 0 {
				acc >>= e & 63
				have -= uint(e & 63)
				out[op] = byte(e >> 16)
				op++
				e = lit[acc&(1<<litRoot-1)]
				if e&flagLiteral != 0 {
					acc >>= e & 63
					have -= uint(e & 63)
					out[op] = byte(e >> 16)
					op++
					continue
				}
			}
		}
		if e&flagOdd != 0 {
			if e&flagSub != 0 {
				acc >>= litRoot
				have -= litRoot
				e = lit[(uint32(acc)&(1<<(e>>8&15)-1)+(e>>16&0x7fff))&(litSize-1)]
				if e&flagLiteral != 0 {
					acc >>= e & 63
					have -= uint(e & 63)
					out[op] = byte(e >> 16)
					op++
					continue
				}
			}
			if e&flagOdd != 0 {
				if e&flagEnd != 0 {
					acc >>= e & 63
					have -= uint(e & 63)
					done = true
				} else {
					bad = true
				}
				break loop
			}
		}
		length := int(e>>16) + int((acc&(1<<(e&63)-1))>>(e>>8&15))
		acc >>= e & 63
		have -= uint(e & 63)

		acc |= binary.LittleEndian.Uint64(in[ip:]) << (have & 63)
		ip += int(63-have) >> 3
		have |= 56
		e = dist[acc&(1<<distRoot-1)]
		if e&flagOdd != 0 {
			if e&flagSub == 0 {
				bad = true
				break loop
			}
			acc >>= distRoot
			have -= distRoot
			e = dist[(uint32(acc)&(1<<(e>>8&15)-1)+(e>>16&0x7fff))&(distSize-1)]
			if e&flagOdd != 0 {
				bad = true
				break loop
			}
		}
		d := int(e>>16) + int((acc&(1<<(e&63)-1))>>(e>>8&15))
		acc >>= e & 63
		have -= uint(e & 63)
		if d > op-base && !z.back(op, d, length) {
			bad = true
			break loop
		}
		from := op - d
		switch {
		case d >= 8 && length <= 32:
			// Words may go beyond the match; slack leaves room.
			dst, src := out[op:op+40], out[from:from+40]
			binary.LittleEndian.PutUint64(dst, binary.LittleEndian.Uint64(src))
			if length > 8 {
				binary.LittleEndian.PutUint64(dst[8:], binary.LittleEndian.Uint64(src[8:]))
				if length > 16 {
					binary.LittleEndian.PutUint64(dst[16:], binary.LittleEndian.Uint64(src[16:]))
					binary.LittleEndian.PutUint64(dst[24:], binary.LittleEndian.Uint64(src[24:]))
				}
			}
		case d >= length:
			copy(out[op:op+length], out[from:from+length])
		case d == 1:
			b := out[from]
			dst := out[op : op+length]
			for i := range dst {
				dst[i] = b
			}
		default:
			// The match repeats itself: each copy doubles what there is to copy.
			dst := out[from : op+length]
			for n := d; n < len(dst); n *= 2 {
				copy(dst[n:], dst[:n])
			}
		}
		op += length
	}
	z.ip, z.acc, z.have, z.op = ip, acc, have, op
	z.acc &= 1<<(z.have&63) - 1
	if bad {
		return false, z.corrupt()
	}
	if done {
		return true, z.overrun()
	}
	return false, nil
}
