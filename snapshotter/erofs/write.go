package erofs

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
)

// bufferSize is how much is written at once, bytes. It is more than the largest single
// piece, an extended attribute of 64 KiB.
const bufferSize = 256 << 10

// WriteTo writes the image, Size bytes.
func (l *Layout) WriteTo(w io.Writer) (int64, error) {
	m := &emitter{w: w, buf: make([]byte, 0, min(bufferSize, l.size))}
	l.writeSuper(m)
	for i := range l.entries {
		if l.entries[i].HardLink < 0 {
			l.writeInode(m, i)
		}
	}
	m.padTo(l.blocks * blockSize)
	for i := range l.entries {
		if n := &l.nodes[i]; l.entries[i].HardLink < 0 && n.ownBlocks() > 0 {
			m.padTo((l.blocks + n.block) * blockSize)
			l.writeBlocks(m, i)
		}
	}
	m.padTo(l.size)
	m.flush()
	if m.err != nil {
		return m.wrote, fmt.Errorf("the layer's metadata image cannot be written: %w", m.err)
	}
	return m.wrote, nil
}

func (l *Layout) writeSuper(m *emitter) {
	le := binary.LittleEndian
	m.take(superOffset)
	b := m.take(deviceOffset - superOffset)
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatChecksum|compatMtime)
	b[12] = blockBits
	le.PutUint16(b[14:], rootOffset/slotSize)
	le.PutUint64(b[16:], uint64(l.inodes))
	le.PutUint32(b[36:], uint32(l.size/blockSize))
	uuid := l.uuid()
	copy(b[48:], uuid[:])
	le.PutUint32(b[80:], incompatDevice)
	le.PutUint16(b[86:], 1) // extra devices
	le.PutUint16(b[88:], deviceOffset/deviceSize)

	d := m.take(deviceSize)
	if l.blob != "" {
		copy(d[:64], l.blob.Encoded())
	}
	le.PutUint32(d[64:], uint32(l.dataSize/blockSize))
	le.PutUint32(d[68:], uint32(l.size/blockSize)) // in the address space: right behind the image
}

// writeInode writes an entry's inode and what follows it.
func (l *Layout) writeInode(m *emitter, i int) {
	le := binary.LittleEndian
	e, n := &l.entries[i], &l.nodes[i]
	m.padTo(n.at)
	b := m.take(inodeSize)

	size, place := uint64(0), uint32(0)
	switch {
	case n.last > 0:
		size = uint64(n.full)*blockSize + uint64(n.last)
		if n.ownBlocks() > 0 {
			place = uint32(l.blocks + n.block)
		}
	case isRegular(e):
		size = uint64(e.Size)
		if size > 0 {
			place = uint32((l.size + e.Data) / blockSize)
		}
	case isDevice(e):
		place = deviceNumber(e.Major, e.Minor)
	}
	format := uint16(inodeExtended | layoutPlain)
	if n.inline {
		format = inodeExtended | layoutInline
	}
	le.PutUint16(b[0:], format)
	if n.xattrs > 0 {
		le.PutUint16(b[2:], uint16((n.xattrs-xattrHeader)/4+1))
	}
	le.PutUint16(b[4:], uint16(e.Mode))
	le.PutUint64(b[8:], size)
	le.PutUint32(b[16:], place)
	le.PutUint32(b[20:], uint32(i)+1) // for stat(2) of 32 bits
	le.PutUint32(b[24:], e.UID)
	le.PutUint32(b[28:], e.GID)
	le.PutUint64(b[32:], uint64(e.Sec))
	le.PutUint32(b[40:], e.Nsec)
	le.PutUint32(b[44:], n.links)
	m.writeXattrs(e.Xattrs)
	switch {
	case !n.inline:
	case isDir(e):
		l.writeNames(m, i, l.names[n.tail:n.names[1]], int(n.last))
	default:
		copy(m.take(len(e.Link)), e.Link)
	}
}

// writeBlocks writes the blocks that an entry has behind all inodes.
func (l *Layout) writeBlocks(m *emitter, i int) {
	e, n := &l.entries[i], &l.nodes[i]
	if isSymlink(e) {
		copy(m.take(len(e.Link)), e.Link)
		return
	}
	rest := l.names[n.names[0]:n.names[1]]
	for range n.ownBlocks() {
		now := l.fill(rest)
		l.writeNames(m, i, now, blockSize)
		rest = rest[len(now):]
	}
}

// writeNames writes one block of directory i, or as much of it as there is: size bytes.
func (l *Layout) writeNames(m *emitter, i int, run []int32, size int) {
	le := binary.LittleEndian
	b := m.take(size)
	at := len(run) * direntSize
	for k, place := range run {
		name := l.name(place)
		switch place {
		case dot:
			place = int32(i)
		case dotdot:
			place = l.parents[i]
		}
		if link := l.entries[place].HardLink; link >= 0 {
			place = int32(link)
		}
		kind, _ := fileType(l.entries[place].Mode)
		d := b[k*direntSize:]
		le.PutUint64(d[0:], uint64(l.nodes[place].at/slotSize))
		le.PutUint16(d[8:], uint16(at))
		d[10] = kind
		at += copy(b[at:], name)
	}
}

// emitter gathers the image in a buffer and writes it. After an error it goes on
// without writing; the error is asked for at the end.
type emitter struct {
	w     io.Writer
	buf   []byte
	start int64 // of buf in the image
	wrote int64 // bytes that w has taken
	err   error
}

// take gives the next n bytes of the image, all zero, to be filled before the next
// call. n is at most bufferSize.
func (m *emitter) take(n int) []byte {
	if len(m.buf)+n > cap(m.buf) {
		m.flush()
	}
	from := len(m.buf)
	m.buf = m.buf[:from+n]
	clear(m.buf[from:])
	return m.buf[from:]
}

// padTo goes on at an offset in the image, less than a block ahead.
func (m *emitter) padTo(at int64) { m.take(int(at - m.start - int64(len(m.buf)))) }

func (m *emitter) flush() {
	if m.start == 0 {
		// Of the rest of the superblock's block, with the checksum's own field zero. The
		// kernel's CRC-32C is Go's without the inversion at the end.
		sum := ^crc32.Checksum(m.buf[superOffset:blockSize], crc32.MakeTable(crc32.Castagnoli))
		binary.LittleEndian.PutUint32(m.buf[superOffset+4:], sum)
	}
	if m.err == nil {
		var n int
		n, m.err = m.w.Write(m.buf)
		m.wrote += int64(n)
	}
	m.start += int64(len(m.buf))
	m.buf = m.buf[:0]
}
