package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// The pieces file, version 1, little endian: one header, then one record per piece. Every field that could claim something is under a
// checksum, so garbage claims nothing. Header and records are multiples of 8 bytes, so no record crosses a page or a sector.
//
//	header   0 magic [8]  8 version u32  12 state u32  16 blob size i64  24 piece size i64
//	        32 boot id, text, zero padded [40]  72 zero [20]  92 CRC-32C of the bytes before u32
//	record   0 CRC-32C of the piece u32  4 source u8  5 state u8 (0 missing, 1 held)  6 check u16
//
// A missing piece is 8 zero bytes: a new file is a hole behind its header.
const (
	piecesMagic   = "quaypcs\n"
	piecesVersion = 1

	headerSize = 96
	recordSize = 8
	bootIDSize = 40 // a boot id has 36 characters

	recordHeld = 1

	stateIncomplete = 1
	stateComplete   = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errPieces: the pieces file says nothing that can be used.
var errPieces = errors.New("unusable pieces file")

// Source is who supplied a piece.
type Source uint8

// The sources. The zero Source is a piece that is not held.
const (
	// Cache is a piece found on disk by other means than this store's own records.
	Cache Source = iota + 1
	// Origin is a piece from the registry.
	Origin
	// Peer is a piece from another node.
	Peer
)

func (s Source) String() string {
	switch s {
	case 0:
		return "none"
	case Cache:
		return "cache"
	case Origin:
		return "origin"
	case Peer:
		return "peer"
	}
	return fmt.Sprintf("source(%d)", uint8(s))
}

type header struct {
	size     int64
	bootID   string
	complete bool
}

// piecesLen is the length of the pieces file of a blob of this size.
func piecesLen(size int64) int64 { return headerSize + recordSize*int64(pieceCount(size)) }

func (h header) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, piecesMagic)
	le := binary.LittleEndian
	le.PutUint32(b[8:], piecesVersion)
	le.PutUint32(b[12:], stateIncomplete)
	if h.complete {
		le.PutUint32(b[12:], stateComplete)
	}
	le.PutUint64(b[16:], uint64(h.size))
	le.PutUint64(b[24:], uint64(PieceSize(h.size)))
	copy(b[32:32+bootIDSize], h.bootID)
	le.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

// decodeHeader checks everything that encode writes; b has headerSize bytes.
func decodeHeader(b []byte) (header, error) {
	le := binary.LittleEndian
	switch {
	case string(b[:8]) != piecesMagic:
		return header{}, fmt.Errorf("%w: wrong magic", errPieces)
	case le.Uint32(b[headerSize-4:]) != crc32.Checksum(b[:headerSize-4], castagnoli):
		return header{}, fmt.Errorf("%w: wrong header checksum", errPieces)
	case le.Uint32(b[8:]) != piecesVersion:
		return header{}, fmt.Errorf("%w: version %d, this is version %d", errPieces, le.Uint32(b[8:]), piecesVersion)
	}
	h := header{size: int64(le.Uint64(b[16:]))}
	if h.size < 0 || h.size > maxSize || int64(le.Uint64(b[24:])) != PieceSize(h.size) {
		return header{}, fmt.Errorf("%w: size %d with pieces of %d", errPieces, h.size, int64(le.Uint64(b[24:])))
	}
	switch le.Uint32(b[12:]) {
	case stateIncomplete:
	case stateComplete:
		h.complete = true
	default:
		return header{}, fmt.Errorf("%w: state %d", errPieces, le.Uint32(b[12:]))
	}
	id, _, _ := bytes.Cut(b[32:32+bootIDSize], []byte{0})
	h.bootID = string(id)
	return h, nil
}

func encodeRecord(i int, crc uint32, src Source) (b [recordSize]byte) {
	binary.LittleEndian.PutUint32(b[:], crc)
	b[4] = byte(src)
	b[5] = recordHeld
	binary.LittleEndian.PutUint16(b[6:], recordCheck(i, b[:6]))
	return b
}

// decodeRecord is ok only for a record that encodeRecord made for this piece.
func decodeRecord(i int, b []byte) (crc uint32, src Source, ok bool) {
	src = Source(b[4])
	ok = b[5] == recordHeld && src >= Cache && src <= Peer && binary.LittleEndian.Uint16(b[6:]) == recordCheck(i, b[:6])
	return binary.LittleEndian.Uint32(b), src, ok
}

// recordCheck binds a record to its place, so that shifted or stray bytes are not taken for one.
func recordCheck(i int, b []byte) uint16 {
	var in [14]byte
	binary.LittleEndian.PutUint64(in[:], uint64(i))
	copy(in[8:], b)
	return uint16(crc32.Checksum(in[:], castagnoli))
}

func recordOffset(i int) int64 { return headerSize + recordSize*int64(i) }

// readPieces reads a pieces file of the given length and calls each (which may be nil) for every piece that it claims as held, in
// order. A file that is short, long, torn or of another version is errPieces before each is called; an unreadable record is a
// missing piece.
func readPieces(r io.ReaderAt, length int64, each func(i int, src Source, crc uint32)) (header, error) {
	var hb [headerSize]byte
	if length < headerSize {
		return header{}, fmt.Errorf("%w: %d bytes", errPieces, length)
	}
	if err := readFull(r, hb[:], 0); err != nil {
		return header{}, err
	}
	h, err := decodeHeader(hb[:])
	if err != nil {
		return header{}, err
	}
	if length != piecesLen(h.size) {
		return header{}, fmt.Errorf("%w: %d bytes instead of %d", errPieces, length, piecesLen(h.size))
	}
	if each == nil {
		return h, nil
	}
	buf := make([]byte, min(64*kib, length-headerSize))
	for i, n := 0, pieceCount(h.size); i < n; {
		k := min(len(buf)/recordSize, n-i)
		if err := readFull(r, buf[:k*recordSize], recordOffset(i)); err != nil {
			return header{}, err
		}
		for j := range k {
			if crc, src, ok := decodeRecord(i+j, buf[j*recordSize:]); ok {
				each(i+j, src, crc)
			}
		}
		i += k
	}
	return h, nil
}

// readFull reads len(p) bytes at off; the file being shorter is errPieces.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it ends early", errPieces)
	}
	return err
}
