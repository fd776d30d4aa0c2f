package index

import "math/bits"

// The decoding tables of one DEFLATE block. A table is indexed with the next bits of
// the stream, the first bit lowest; codes longer than its root go on in a second
// table behind it. Each entry is one of
//
//	literal    flagLiteral | byte<<16                          | bits
//	length     base<<16                        | code bits<<8  | code bits + extra bits
//	distance   base<<16                        | code bits<<8  | code bits + extra bits
//	subtable   flagOdd | flagSub | start<<16   | index bits<<8 | root bits
//	end        flagOdd | flagEnd               |               | bits
//	no code    flagOdd
//
// so that what to take off the stream is in the low bits of every one of them.
const (
	flagLiteral = 1 << 31
	flagOdd     = 1 << 15 // none of the three frequent kinds
	flagSub     = 1 << 14
	flagEnd     = 1 << 13

	// Eleven bits hold nearly every code that is met; one table is then 8 KiB and
	// stays in the first cache together with the window's hot part.
	litRoot  = 11
	distRoot = 8
	preRoot  = 7

	// The longest tables of 288 symbols with 11 root bits and of 32 with 8, at 15 bits
	// a code, have 2342 and 402 entries (zlib's examples/enough.c); powers of two let the
	// compiler see that an index that is masked is inside.
	litSize  = 4096
	distSize = 1024

	maxCode = 15 // bits of the longest code
)

// lengthBase and the others: RFC 1951 §3.2.5.
var (
	lengthBase  = [29]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
	lengthExtra = [29]uint8{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
	distBase    = [30]uint16{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
	distExtra   = [30]uint8{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13}
	preOrder    = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
)

// litEntry is a table entry for a symbol of the literal and length alphabet, without
// its code's length.
func litEntry(sym int) uint32 {
	switch {
	case sym < 256:
		return flagLiteral | uint32(sym)<<16
	case sym == 256:
		return flagOdd | flagEnd
	case sym < 286:
		return uint32(lengthBase[sym-257])<<16 | uint32(lengthExtra[sym-257])
	}
	return flagOdd // 286 and 287 take part in the fixed code but mean nothing
}

func distEntry(sym int) uint32 {
	if sym < 30 {
		return uint32(distBase[sym])<<16 | uint32(distExtra[sym])
	}
	return flagOdd
}

func preEntry(sym int) uint32 { return flagLiteral | uint32(sym)<<16 }

// buildTable makes the table of a canonical code from the code length of each symbol.
// It answers false for lengths that are no prefix code. A code that leaves bit
// patterns unused is refused too, but for two that encoders write: no symbol at
// all, and a single one of one bit.
func buildTable(table []uint32, root uint, lens []uint8, entry func(int) uint32) bool {
	var count [maxCode + 1]int
	for _, l := range lens {
		count[l]++
	}
	count[0] = 0
	longest := 0
	left := 1
	for l := 1; l <= maxCode; l++ {
		left = left<<1 - count[l]
		if left < 0 {
			return false
		}
		if count[l] > 0 {
			longest = l
		}
	}
	if left > 0 {
		if longest > 1 {
			return false
		}
		for i := range table[:1<<root] {
			table[i] = flagOdd
		}
	}
	var next [maxCode + 2]int // where the symbols of each length begin in sorted
	for l := 1; l <= maxCode; l++ {
		next[l+1] = next[l] + count[l]
	}
	var sorted [288]uint16
	for sym, l := range lens {
		if l > 0 {
			sorted[next[l]] = uint16(sym)
			next[l]++
		}
	}
	code, n := uint(0), 0
	end := 1 << root // of the tables so far
	prefix, sub, subBits := -1, 0, uint(0)
	for l := 1; l <= longest; l++ {
		for range count[l] {
			sym := int(sorted[n])
			n++
			reversed := int(bits.Reverse16(uint16(code)) >> (16 - l))
			e := entry(sym)
			switch {
			case e&flagOdd != 0 && e&flagEnd == 0: // stays as it is
			case e&(flagLiteral|flagOdd) != 0:
				e |= uint32(l)
			default:
				e += uint32(l) // to the extra bits
				e |= uint32(l) << 8
			}
			if uint(l) <= root {
				for i := reversed; i < 1<<root; i += 1 << l {
					table[i] = e
				}
			} else {
				if p := reversed & (1<<root - 1); p != prefix {
					prefix, sub = p, end
					subBits = uint(l) - root
					// A subtable is as deep as the codes that share its prefix
					// need to fill it.
					for room := 1 << subBits; ; {
						room -= count[int(subBits+root)]
						if subBits+root == uint(l) {
							room += n - 1 - sortedStart(&count, l)
						}
						if room <= 0 || int(subBits+root) >= longest {
							break
						}
						subBits++
						room <<= 1
					}
					end += 1 << subBits
					if end > len(table) {
						return false
					}
					table[p] = flagOdd | flagSub | uint32(sub)<<16 | uint32(subBits)<<8 | uint32(root)
				}
				if e != flagOdd { // what the root took is taken off already
					e -= uint32(root)
					if e&(flagLiteral|flagOdd) == 0 {
						e -= uint32(root) << 8
					}
				}
				for i := reversed >> root; i < 1<<subBits; i += 1 << (uint(l) - root) {
					table[sub+i] = e
				}
			}
			code++
		}
		code <<= 1
	}
	return true
}

// sortedStart is how many symbols have codes shorter than l.
func sortedStart(count *[maxCode + 1]int, l int) int {
	n := 0
	for i := 1; i < l; i++ {
		n += count[i]
	}
	return n
}
