package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// maxEncoded bounds an encoded index, in bytes: one of 1 % for a layer of 25 GiB.
const maxEncoded = 256 << 20

var errEncoded = errors.New("it is cut off or damaged")

// Decode reads what Encode wrote and validates it. What it takes of memory is bounded by
// limits.go alone; Footprint tells it before.
func Decode(r io.Reader) (*Index, error) {
	x, err := decode(r)
	if err != nil {
		return nil, fmt.Errorf("the layer's index could not be read: %w", err)
	}
	return x, x.Validate()
}

// Sound tells that an encoded index is of this version, and whole and unaltered since Encode wrote it.
func Sound(text []byte) bool {
	n := len(text) - sha256.Size
	if n < len(magic) || string(text[:len(magic)]) != magic {
		return false
	}
	sum := sha256.Sum256(text[:n])
	return bytes.Equal(sum[:], text[n:])
}

func decode(r io.Reader) (*Index, error) {
	all, err := io.ReadAll(io.LimitReader(r, maxEncoded+1))
	if err != nil {
		return nil, err
	}
	if len(all) > maxEncoded {
		return nil, fmt.Errorf("it has more than %d MiB", maxEncoded>>20)
	}
	if len(all) < len(magic)+sha256.Size || string(all[:len(magic)]) != magic {
		return nil, errors.New("it is no index, or one of another version")
	}
	if !Sound(all) {
		return nil, errEncoded
	}
	body := all[:len(all)-sha256.Size]
	d := &decoder{b: body[len(magic):]}
	zd, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(maxWindows), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, err
	}
	defer zd.Close()

	x := &Index{text: all}
	head := d.section(1<<10, nil)
	entries, extents, points, chunks := x.getHead(head)
	// An entry has 4 bytes at the least, an extent 3: the length of the section bounds
	// both, and this the section.
	tree := d.section(maxNameBytes, zd)
	if entries > tree.left()/4+2 || extents > tree.left()/3 {
		tree.fail()
	}
	if d.bad || head.bad || tree.bad {
		return nil, errEncoded
	}
	cols := tree.columns()
	x.getEntries(cols, entries)
	x.getExtents(cols, extents)
	table := d.section(maxPoints*24, zd)
	windows := d.section(min(maxWindows, points*history), zd)
	x.getPoints(table, windows, points)
	lens := d.section(maxChunks*10, zd)
	sums := d.section(maxChunks*32, nil)
	x.getChunks(lens, sums, chunks)
	order := d.section(MaxFirst*20, zd)
	x.getFirst(order)
	for _, d := range append(cols, d, table, windows, lens, sums, order) {
		if d.bad || d.left() > 0 {
			return nil, errEncoded
		}
	}
	return x, nil
}

// decoder takes numbers and strings off bytes. After the first one that is not there it
// is bad and gives zeros.
type decoder struct {
	b   []byte
	bad bool
}

func (d *decoder) fail()     { d.b, d.bad = nil, true }
func (d *decoder) left() int { return len(d.b) }

func (d *decoder) uint(limit uint64) uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 || v > limit {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) size() int64 { return int64(d.uint(maxSize)) }

func (d *decoder) count(limit int) int { return int(d.uint(uint64(limit))) }

func (d *decoder) int() int64 {
	v, n := binary.Varint(d.b)
	if n <= 0 || v > maxSize || v < -maxSize {
		d.fail()
		return 0
	}
	d.b = d.b[n:]
	return v
}

func (d *decoder) bytes(n int) []byte {
	if n > len(d.b) {
		d.fail()
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) string(limit int) string { return string(d.bytes(d.count(limit))) }

// section takes a section of at most limit bytes, which zd decompresses.
func (d *decoder) section(limit int, zd *zstd.Decoder) *decoder {
	packed, raw := d.count(maxEncoded), d.count(limit)
	p := d.bytes(packed)
	if d.bad {
		return &decoder{bad: true}
	}
	if zd != nil {
		// Not more than zstd can make of so little is reserved, 128 KiB of each 4 bytes, and
		// decoding ends there.
		out := make([]byte, 0, min(raw, 32<<10*packed))
		var err error
		if p, err = zd.DecodeAll(p, out); err != nil {
			return &decoder{bad: true}
		}
	}
	if len(p) != raw {
		return &decoder{bad: true}
	}
	return &decoder{b: p}
}

func (d *decoder) columns() []*decoder {
	cols := make([]*decoder, columns)
	for i := range cols {
		p := d.bytes(d.count(len(d.b)))
		cols[i] = &decoder{b: p, bad: d.bad}
	}
	if d.left() > 0 {
		cols[0].fail()
	}
	return cols
}

func (x *Index) getHead(d *decoder) (entries, extents, points, chunks int) {
	x.Blob = digest.Digest(d.string(100))
	x.DiffID = digest.Digest(d.string(100))
	x.Compression = Compression(d.string(10))
	x.BlobSize, x.DataSize = d.size(), d.size()
	entries, extents = d.count(maxEntries), d.count(maxExtents)
	points, chunks = d.count(maxPoints), d.count(maxChunks)
	if d.left() > 0 {
		d.fail()
	}
	return entries, extents, points, chunks
}

func (x *Index) getEntries(cols []*decoder, n int) {
	x.Entries = make([]Entry, n)
	var classes []class
	var times []stamp
	var end int64
	var dirs []string // the path of the last directory at each depth
	total, xattrs := 0, 0
	for i := range x.Entries {
		e := &x.Entries[i]
		e.HardLink = -1
		if i > 0 {
			depth := cols[columnDepth].count(maxPath)
			name := cols[columnName]
			length := max(0, bytes.IndexByte(name.b, 0))
			e.Path = string(name.bytes(length))
			name.bytes(1)
			if depth > len(dirs) {
				name.fail()
			} else if depth > 0 {
				e.Path = dirs[depth-1] + "/" + e.Path
			}
			if total += len(e.Path); name.bad || len(e.Path) > maxPath || total > maxNameBytes {
				name.fail()
				return
			}
			dirs = append(dirs[:depth], e.Path)
		}
		flags := cols[columnFlags].uint(entryLink | entryXattrs | entryImplicit)
		if flags&entryLink != 0 {
			e.HardLink = cols[columnOther].count(n)
			continue
		}
		e.Implicit = flags&entryImplicit != 0
		c := cols[columnClass].count(len(classes))
		if c == len(classes) {
			fresh := cols[columnNew]
			classes = append(classes, class{uint32(fresh.uint(1<<32 - 1)), uint32(fresh.uint(1<<32 - 1)), uint32(fresh.uint(1<<32 - 1))})
		}
		e.Mode, e.UID, e.GID = classes[c].mode, classes[c].uid, classes[c].gid
		t := cols[columnTime].count(len(times))
		if t == 0 {
			s := stamp{sec: cols[columnTimes].int(), nsec: uint32(cols[columnTimes].uint(1 << 30))}
			if len(times) > 0 {
				s.sec += times[len(times)-1].sec
			}
			times = append(times, s)
			t = len(times)
		}
		e.Sec, e.Nsec = times[t-1].sec, times[t-1].nsec
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			if e.Size = cols[columnSize].size(); e.Size > 0 {
				delta := cols[columnData].int()
				if delta > maxSize/Align || delta < -maxSize/Align {
					cols[columnData].fail()
					return
				}
				e.Data = end + delta*Align
				if end = aligned(e.Data + e.Size); end < 0 || end > maxSize {
					cols[columnData].fail()
					return
				}
			}
		case unix.S_IFLNK:
			e.Link = cols[columnText].string(maxLink)
		case unix.S_IFCHR, unix.S_IFBLK:
			e.Major, e.Minor = uint32(cols[columnOther].uint(1<<32-1)), uint32(cols[columnOther].uint(1<<32-1))
		}
		if flags&entryXattrs != 0 {
			text := cols[columnText]
			count := text.count(text.left() / 2)
			if xattrs += count; xattrs > maxXattrs {
				text.fail()
				return
			}
			e.Xattrs = make([]Xattr, count)
			for i := range e.Xattrs {
				e.Xattrs[i] = Xattr{text.string(maxXattrName), text.string(maxXattrValue)}
			}
		}
	}
}

func (x *Index) getExtents(cols []*decoder, n int) {
	sizes := x.sizes()
	x.Extents = make([]Extent, n)
	var last Extent
	for i := range x.Extents {
		data, stream := last.guess()
		e := Extent{Data: data + cols[columnExtents].int(), Stream: stream + cols[columnStreams].int()}
		e.Len = sizes[e.Data] + cols[columnLengths].int()
		if e.Data < 0 || e.Data > maxSize || e.Stream < 0 || e.Stream > maxSize || e.Len < 0 || e.Len > maxData {
			cols[columnExtents].fail()
			return
		}
		x.Extents[i], last = e, e
	}
}

func (x *Index) getPoints(table, windows *decoder, n int) {
	if n > table.left()/3 {
		table.fail()
		return
	}
	x.Points = make([]Point, n)
	var last Point
	for i := range x.Points {
		p := Point{Blob: last.Blob + table.size(), Stream: last.Stream + table.size()}
		if p.Blob > maxSize || p.Stream > maxSize {
			table.fail()
			return
		}
		if kind := table.bytes(1); kind != nil {
			p.Bit, p.Raw = kind[0]&7, kind[0]&8 != 0
		}
		if p.Raw {
			// A copy: the others must not live as long as this one.
			p.Window = append([]byte{}, windows.bytes(table.count(history))...)
		}
		x.Points[i], last = p, p
	}
}

func (x *Index) getChunks(lens, sums *decoder, n int) {
	if n != sums.left()/32 || n == 0 {
		if n != 0 {
			sums.fail()
		}
		return
	}
	x.Chunks = make([]Chunk, n)
	even := lens.size()
	at := int64(0)
	for i := range x.Chunks {
		c := &x.Chunks[i]
		if c.Off, c.Len = at, min(even, x.DataSize-at); even == 0 {
			c.Len, c.Pad = lens.size(), lens.size()
		}
		if at += c.Len; at > maxSize {
			lens.fail()
			return
		}
		copy(c.Sum[:], sums.bytes(32))
	}
}

func (x *Index) getFirst(d *decoder) {
	var end int64
	for d.left() > 0 && !d.bad {
		r := Range{Off: end + d.int(), Len: d.size()}
		if len(x.First) == MaxFirst || r.Off < 0 || r.Off > maxSize {
			d.fail()
			return
		}
		x.First = append(x.First, r)
		end = r.Off + r.Len
	}
}
