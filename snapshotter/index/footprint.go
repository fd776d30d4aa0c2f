package index

import (
	"crypto/sha256"
	"unsafe"
)

// Footprint tells how many bytes of memory Decode takes at most for an encoded index, without
// the paths and xattrs of its entries (limits.go bounds these, at 128 MiB of names and 32 MiB of
// attributes): whoever gets an index from anybody can refuse it before. A window or a
// directory of empty files compresses to a thousandth, so the size of the text says little.
func Footprint(text []byte) (int64, error) {
	if len(text) < len(magic)+sha256.Size || string(text[:len(magic)]) != magic {
		return 0, errEncoded
	}
	d := &decoder{b: text[len(magic) : len(text)-sha256.Size]}
	head := d.section(1<<10, nil)
	entries, extents, points, chunks := new(Index).getHead(head)
	total := int64(entries)*int64(unsafe.Sizeof(Entry{})) + int64(extents)*int64(unsafe.Sizeof(Extent{})) +
		int64(points)*int64(unsafe.Sizeof(Point{})) + int64(chunks)*int64(unsafe.Sizeof(Chunk{}))
	for range sections - 1 {
		packed, raw := d.count(maxEncoded), d.count(maxWindows)
		d.bytes(packed)
		total += 2 * int64(raw) // windows and strings are copied out of it
	}
	if d.bad || head.bad || d.left() > 0 {
		return 0, errEncoded
	}
	return total, nil
}

// sections of an encoded index: head, tree, points, windows, lengths of chunks, sums, what is read first.
const sections = 7
