package index

import (
	"io"
)

// The kinds of a block.
const (
	blockStored = iota
	blockHuffman
)

// block reads a block's header. left is a stored block's length.
func (z *inflater) block() (kind int, left int, err error) {
	if err := z.need(headerRoom); err != nil {
		return 0, 0, err
	}
	z.last = z.bits(1) == 1
	switch z.bits(2) {
	case 0:
		z.align()
		n, c := z.bits(16), z.bits(16)
		if err := z.overrun(); err != nil {
			return 0, 0, err
		}
		if n != ^c&0xffff {
			return 0, 0, z.corrupt()
		}
		z.align()
		return blockStored, int(n), nil
	case 1:
		for i := range z.lens[:288] {
			switch {
			case i < 144:
				z.lens[i] = 8
			case i < 256:
				z.lens[i] = 9
			case i < 280:
				z.lens[i] = 7
			default:
				z.lens[i] = 8
			}
		}
		buildTable(z.lit[:], litRoot, z.lens[:288], litEntry)
		for i := range z.lens[:32] {
			z.lens[i] = 5
		}
		buildTable(z.dist[:], distRoot, z.lens[:32], distEntry)
		return blockHuffman, 0, z.overrun()
	case 2:
		return blockHuffman, 0, z.dynamic()
	}
	return 0, 0, z.corrupt()
}

// dynamic reads the codes of a block that has its own.
func (z *inflater) dynamic() error {
	nlit, ndist, npre := int(z.bits(5))+257, int(z.bits(5))+1, int(z.bits(4))+4
	if nlit > 286 || ndist > 30 {
		return z.corrupt()
	}
	pre := z.lens[:19]
	clear(pre)
	for _, i := range preOrder[:npre] {
		pre[i] = uint8(z.bits(3))
	}
	if !buildTable(z.pre[:], preRoot, pre, preEntry) {
		return z.corrupt()
	}
	lens := z.lens[:nlit+ndist]
	for i := 0; i < len(lens); {
		if z.have < preRoot {
			for z.have <= 56 && z.ip < len(z.in) {
				z.acc &= 1<<z.have - 1
				z.acc |= uint64(z.in[z.ip]) << z.have
				z.ip++
				z.have += 8
			}
		}
		e := z.pre[z.acc&(1<<preRoot-1)]
		if e&flagLiteral == 0 || uint(e&0xff) > z.have {
			return z.corrupt()
		}
		z.bits(uint(e & 0xff))
		sym := uint8(e >> 16)
		if sym < 16 {
			lens[i] = sym
			i++
			continue
		}
		var n int
		var v uint8
		switch sym {
		case 16:
			if i == 0 {
				return z.corrupt()
			}
			n, v = 3+int(z.bits(2)), lens[i-1]
		case 17:
			n = 3 + int(z.bits(3))
		default:
			n = 11 + int(z.bits(7))
		}
		if n > len(lens)-i {
			return z.corrupt()
		}
		for ; n > 0; n-- {
			lens[i] = v
			i++
		}
	}
	if err := z.overrun(); err != nil {
		return err
	}
	if !buildTable(z.lit[:], litRoot, lens[:nlit], litEntry) || !buildTable(z.dist[:], distRoot, lens[nlit:], distEntry) {
		return z.corrupt()
	}
	return nil
}

// corrupt tells data that ends too early from data that is wrong.
func (z *inflater) corrupt() error {
	const turn = 48 // bits that one symbol pair may have
	if z.end >= 0 && z.bitOff()+turn > (z.inOff+int64(z.end))*8 {
		return io.ErrUnexpectedEOF
	}
	return errCorrupt
}
