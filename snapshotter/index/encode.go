package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

// magic begins an encoded index. Its last byte is the version: a reader refuses all but
// its own, and the index is made again, which costs one reading of the layer.
const magic = "quayidx\x02"

// An encoded index is magic, seven sections, and the SHA-256 of all before it. A section
// is the lengths that it has and had before compression, and bytes. Numbers are
// varints, signed ones in zigzag; each kind of number has a column of its own, because like
// compresses best beside like, and holds the difference from what it could be
// expected to be, which is nothing in most cases.
const (
	columnDepth   = iota // of each entry but the root: elements before the last
	columnName           // last element, zero byte
	columnFlags          // entry*
	columnClass          // number of mode, uid and gid among those met; the next new one follows in columnNew
	columnNew            //
	columnTime           // number of the time among those met, plus 1; 0: a new one follows in columnTimes
	columnTimes          //
	columnSize           // of files
	columnData           // of files of Size > 0, less the end of the one before, in Align
	columnText           // targets and attributes, with their lengths
	columnOther          // hard links, device numbers
	columnExtents        // data, stream and length, in three columns one after another
	columnStreams
	columnLengths
	columns
)

const (
	entryLink = 1 << iota
	entryXattrs
	entryImplicit
)

// class is what many entries have in common.
type class struct{ mode, uid, gid uint32 }

type stamp struct {
	sec  int64
	nsec uint32
}

// Encode writes x in a compact form that Decode reads. Of an index that was decoded it writes what that was decoded
// from: compressing is most of the work, and a layer that waits to be mounted should not wait for it.
func Encode(w io.Writer, x *Index) error {
	if x.text != nil {
		if _, err := w.Write(x.text); err != nil {
			return fmt.Errorf("the layer's index could not be written: %w", err)
		}
		return nil
	}
	if err := x.Validate(); err != nil {
		return err
	}
	enc, done, err := encoder()
	if err != nil {
		return err
	}
	defer done()
	var cols [columns][]byte
	x.putEntries(&cols)
	x.putExtents(&cols)
	var tree []byte
	for _, c := range cols {
		tree = binary.AppendUvarint(tree, uint64(len(c)))
		tree = append(tree, c...)
	}
	points, windows := x.putPoints()
	lens, sums := x.putChunks()

	var out bytes.Buffer
	out.WriteString(magic)
	section(&out, x.putHead(), nil)
	section(&out, tree, enc)
	section(&out, points, enc)
	section(&out, windows, enc)
	section(&out, lens, enc)
	section(&out, sums, nil)
	section(&out, x.putFirst(), enc)
	sum := sha256.Sum256(out.Bytes())
	out.Write(sum[:])
	if out.Len() > maxEncoded {
		return fmt.Errorf("the layer's index has %d MiB, more than the %d MiB allowed", out.Len()>>20, maxEncoded>>20)
	}
	if _, err := out.WriteTo(w); err != nil {
		return fmt.Errorf("the layer's index could not be written: %w", err)
	}
	return nil
}

// encodersMost is how many encoders there are at once: each has up to 50 MB, and an image may have a hundred layers that
// come side by side.
const encodersMost = 2

// encoders are those that nobody uses, and the places of those in use. To make one takes longer than to compress what most
// layers have; the garbage collector takes those that were not used for a while.
var encoders = struct {
	idle  sync.Pool // of *zstd.Encoder
	inUse chan struct{}
}{inUse: make(chan struct{}, encodersMost)}

// encoder waits for one, which has to be given back by done.
func encoder() (enc *zstd.Encoder, done func(), err error) {
	encoders.inUse <- struct{}{}
	enc, _ = encoders.idle.Get().(*zstd.Encoder)
	if enc == nil {
		enc, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	}
	if err != nil {
		<-encoders.inUse
		return nil, nil, err
	}
	return enc, func() { encoders.idle.Put(enc); <-encoders.inUse }, nil
}

// section writes one section, compressed by enc unless that is nil.
func section(out *bytes.Buffer, p []byte, enc *zstd.Encoder) {
	packed := p
	if enc != nil {
		packed = enc.EncodeAll(p, nil)
	}
	head := binary.AppendUvarint(nil, uint64(len(packed)))
	out.Write(binary.AppendUvarint(head, uint64(len(p))))
	out.Write(packed)
}

func putString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

func (x *Index) putHead() []byte {
	b := putString(nil, string(x.Blob))
	b = putString(b, string(x.DiffID))
	b = putString(b, string(x.Compression))
	b = binary.AppendUvarint(b, uint64(x.BlobSize))
	b = binary.AppendUvarint(b, uint64(x.DataSize))
	for _, n := range []int{len(x.Entries), len(x.Extents), len(x.Points), len(x.Chunks)} {
		b = binary.AppendUvarint(b, uint64(n))
	}
	return b
}

func (x *Index) putEntries(cols *[columns][]byte) {
	put := func(col int, v uint64) { cols[col] = binary.AppendUvarint(cols[col], v) }
	classes, times := make(map[class]int), make(map[stamp]int)
	var lastTime, end int64
	for i := range x.Entries {
		e := &x.Entries[i]
		if i > 0 {
			put(columnDepth, uint64(strings.Count(e.Path, "/")))
			cols[columnName] = append(append(cols[columnName], e.Path[strings.LastIndexByte(e.Path, '/')+1:]...), 0)
		}
		if e.HardLink != -1 {
			put(columnFlags, entryLink)
			put(columnOther, uint64(e.HardLink))
			continue
		}
		flags := uint64(0)
		if len(e.Xattrs) > 0 {
			flags |= entryXattrs
		}
		if e.Implicit {
			flags |= entryImplicit
		}
		put(columnFlags, flags)
		c := class{e.Mode, e.UID, e.GID}
		n, ok := classes[c]
		if !ok {
			n = len(classes)
			classes[c] = n
			put(columnNew, uint64(c.mode))
			put(columnNew, uint64(c.uid))
			put(columnNew, uint64(c.gid))
		}
		put(columnClass, uint64(n))
		t := stamp{e.Sec, e.Nsec}
		if n, ok := times[t]; ok {
			put(columnTime, uint64(n)+1)
		} else {
			times[t] = len(times)
			put(columnTime, 0)
			cols[columnTimes] = binary.AppendVarint(cols[columnTimes], t.sec-lastTime)
			put(columnTimes, uint64(t.nsec))
			lastTime = t.sec
		}
		switch e.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			put(columnSize, uint64(e.Size))
			if e.Size > 0 {
				cols[columnData] = binary.AppendVarint(cols[columnData], (e.Data-end)/Align)
				end = aligned(e.Data + e.Size)
			}
		case unix.S_IFLNK:
			cols[columnText] = putString(cols[columnText], e.Link)
		case unix.S_IFCHR, unix.S_IFBLK:
			put(columnOther, uint64(e.Major))
			put(columnOther, uint64(e.Minor))
		}
		if len(e.Xattrs) > 0 {
			put(columnText, uint64(len(e.Xattrs)))
			for _, a := range e.Xattrs {
				cols[columnText] = putString(putString(cols[columnText], a.Name), a.Value)
			}
		}
	}
}

func aligned(n int64) int64 { return (n + Align - 1) &^ (Align - 1) }

// sizes is what lengths of extents are guessed from: the size of the file at each offset.
func (x *Index) sizes() map[int64]int64 {
	m := make(map[int64]int64)
	for i := range x.Entries {
		if e := &x.Entries[i]; e.Size > 0 {
			m[e.Data] = e.Size
		}
	}
	return m
}

// guess is where the next extent is expected: after the padding of the last one's file,
// and in the tar after its padding and one header.
func (e Extent) guess() (data, stream int64) {
	return aligned(e.Data + e.Len), (e.Stream+e.Len+tarBlock-1)&^(tarBlock-1) + tarBlock
}

func (x *Index) putExtents(cols *[columns][]byte) {
	sizes := x.sizes()
	var last Extent
	for _, e := range x.Extents {
		data, stream := last.guess()
		cols[columnExtents] = binary.AppendVarint(cols[columnExtents], e.Data-data)
		cols[columnStreams] = binary.AppendVarint(cols[columnStreams], e.Stream-stream)
		cols[columnLengths] = binary.AppendVarint(cols[columnLengths], e.Len-sizes[e.Data])
		last = e
	}
}

func (x *Index) putPoints() (b, windows []byte) {
	var last Point
	for i := range x.Points {
		p := &x.Points[i]
		b = binary.AppendUvarint(b, uint64(p.Blob-last.Blob))
		b = binary.AppendUvarint(b, uint64(p.Stream-last.Stream))
		kind := p.Bit
		if p.Raw {
			kind |= 8
		}
		b = append(b, kind)
		if p.Raw {
			b = binary.AppendUvarint(b, uint64(len(p.Window)))
			windows = append(windows, p.Window...)
		}
		last = *p
	}
	return b, windows
}

// putChunks writes one length when all chunks but the last have it and no padding.
func (x *Index) putChunks() (lens, sums []byte) {
	even := true
	for i := range x.Chunks {
		c := &x.Chunks[i]
		sums = append(sums, c.Sum[:]...)
		even = even && c.Pad == 0 && (c.Len == x.Chunks[0].Len || i == len(x.Chunks)-1 && c.Len < x.Chunks[0].Len)
	}
	if len(x.Chunks) == 0 {
		return nil, nil
	}
	if even {
		return binary.AppendUvarint(nil, uint64(x.Chunks[0].Len)), sums
	}
	lens = append(lens, 0)
	for i := range x.Chunks {
		lens = binary.AppendUvarint(lens, uint64(x.Chunks[i].Len))
		lens = binary.AppendUvarint(lens, uint64(x.Chunks[i].Pad))
	}
	return lens, sums
}

func (x *Index) putFirst() (b []byte) {
	var end int64
	for _, r := range x.First {
		b = binary.AppendVarint(b, r.Off-end)
		b = binary.AppendUvarint(b, uint64(r.Len))
		end = r.Off + r.Len
	}
	return b
}
