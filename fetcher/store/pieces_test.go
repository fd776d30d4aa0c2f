package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"
)

// validPieces is the file of a blob of three pieces, the first and the last held.
func validPieces(complete bool) []byte {
	const size = 2*64*kib + 9
	b := header{size: size, bootID: "01234567-89ab-cdef-0123-456789abcdef", complete: complete}.encode()
	b = append(b, make([]byte, piecesLen(size)-headerSize)...)
	for i, src := range map[int]Source{0: Origin, 2: Peer} {
		r := encodeRecord(i, uint32(i+7), src)
		copy(b[recordOffset(i):], r[:])
	}
	return b
}

func TestReadPieces(t *testing.T) {
	type edit func([]byte) []byte
	at := func(off int, x byte) edit {
		return func(b []byte) []byte { b[off] ^= x; return b }
	}
	for _, c := range []struct {
		name string
		edit edit
		held string // of the three pieces; "" for an unusable file
	}{
		{"as written", at(0, 0), "x-x"},
		{"no bytes", func([]byte) []byte { return nil }, ""},
		{"half a header", func(b []byte) []byte { return b[:headerSize/2] }, ""},
		{"only a header", func(b []byte) []byte { return b[:headerSize] }, ""},
		{"one byte short", func(b []byte) []byte { return b[:len(b)-1] }, ""},
		{"one byte long", func(b []byte) []byte { return append(b, 0) }, ""},
		{"zeros", func(b []byte) []byte { return make([]byte, len(b)) }, ""},
		{"magic", at(3, 1), ""},
		{"version, checksum wrong", at(8, 1), ""},
		{"boot id, checksum wrong", at(40, 1), ""},
		{"checksum", at(headerSize-1, 1), ""},
		{"another version", func([]byte) []byte { return rehash(validPieces(false), 8, 2) }, ""},
		{"unknown state", func([]byte) []byte { return rehash(validPieces(false), 12, 9) }, ""},
		{"negative size", func([]byte) []byte { return rehash(validPieces(false), 23, 0xff) }, ""},
		{"other piece size", func([]byte) []byte { return rehash(validPieces(false), 27, 1) }, ""},
		{"record's crc", at(headerSize, 1), "--x"},
		{"record's source", at(headerSize+4, 1), "--x"},
		{"record's state", at(headerSize+5, 3), "--x"},
		{"record's check", at(headerSize+7, 1), "--x"},
		{"record of another piece", func(b []byte) []byte { copy(b[headerSize+8:], b[headerSize:headerSize+8]); return b }, "x-x"},
		{"unknown source", func(b []byte) []byte { r := encodeRecord(0, 7, 9); copy(b[headerSize:], r[:]); return b }, "--x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := c.edit(validPieces(false))
			held := []byte("---")
			h, err := readPieces(bytes.NewReader(b), int64(len(b)), func(i int, _ Source, _ uint32) { held[i] = 'x' })
			if c.held == "" {
				if !errors.Is(err, errPieces) || string(held) != "---" {
					t.Errorf("error %v, held %s; want errPieces", err, held)
				}
				return
			}
			if err != nil || string(held) != c.held || h.size != 2*64*kib+9 || h.complete {
				t.Errorf("%+v, %v, held %s; want %s", h, err, held, c.held)
			}
		})
	}
}

// rehash sets a byte of a header and makes its checksum right again.
func rehash(b []byte, off int, x byte) []byte {
	b[off] = x
	binary.LittleEndian.PutUint32(b[headerSize-4:], crc32.Checksum(b[:headerSize-4], castagnoli))
	return b
}

func FuzzReadPieces(f *testing.F) {
	f.Add(validPieces(false))
	f.Add(validPieces(true))
	f.Add(validPieces(false)[:headerSize+3])
	f.Add(rehash(validPieces(false), 22, 0x0f))
	f.Fuzz(func(t *testing.T, b []byte) {
		last, claimed := -1, 0
		h, err := readPieces(bytes.NewReader(b), int64(len(b)), func(i int, src Source, _ uint32) {
			if i <= last || src < Cache || src > Peer {
				t.Errorf("piece %d from %s after %d", i, src, last)
			}
			last = i
			claimed++
		})
		if err != nil {
			if !errors.Is(err, errPieces) || claimed > 0 {
				t.Errorf("error %v after %d claims", err, claimed)
			}
			return
		}
		if h.size < 0 || h.size > maxSize || last >= pieceCount(h.size) || int64(len(b)) != piecesLen(h.size) {
			t.Errorf("%+v with piece %d from %d bytes", h, last, len(b))
		}
		if h2, err := decodeHeader(h.encode()); err != nil || h2 != h {
			t.Errorf("%+v became %+v, %v", h, h2, err)
		}
	})
}

// What is on disk may be damaged in any way: the blob opens with nothing held that is not right, and can be filled.
func TestDamagedFiles(t *testing.T) {
	const size = 3 * 64 * kib
	data, d := content(size)
	truncate := func(n int64) func(string) error {
		return func(p string) error { return os.Truncate(p, n) }
	}
	garbage := func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("garbage!"), 500), 0o600) }
	for _, c := range []struct {
		name, file string
		damage     func(path string) error
		held       bool // what was held before still is
	}{
		{"nothing", filePieces, func(string) error { return nil }, true},
		{"pieces gone", filePieces, os.Remove, false},
		{"pieces empty", filePieces, truncate(0), false},
		{"pieces short", filePieces, truncate(headerSize + 8), false},
		{"pieces long", filePieces, truncate(1 << 30), false},
		{"pieces garbage", filePieces, garbage, false},
		{"data gone", fileData, os.Remove, false},
		{"data short", fileData, truncate(size - 1), false},
		{"data long", fileData, truncate(size + 1), false},
		{"use mark gone", fileUsed, os.Remove, true},
		{"pid garbage", fileWriter, garbage, true},
	} {
		for _, complete := range []bool{false, true} {
			name := c.name + ", incomplete"
			if complete {
				name = c.name + ", complete"
			}
			t.Run(name, func(t *testing.T) {
				s := openStore(t, t.TempDir(), 0)
				if complete {
					fill(t, s, size)
				} else {
					b := openBlob(t, s, d, size)
					put(t, b, data, 0, 2)
					b.Close()
				}
				if err := c.damage(filepath.Join(s.blobDir(d), c.file)); err != nil {
					t.Fatal(err)
				}
				in, err := s.Stat(d)
				if c.name == "data gone" {
					want(t, "stat", err, os.ErrNotExist)
				} else if err != nil || (in.Have > 0) != c.held {
					t.Errorf("stat: %+v, %v", in, err)
				}
				b := openBlob(t, s, d, size)
				if b.Has(0) != c.held || b.Complete() != (c.held && complete) {
					t.Errorf("opened with %d bytes, complete %v", b.Have(), b.Complete())
				}
				for _, i := range all(b) {
					if !b.Has(i) {
						put(t, b, data, i)
					}
				}
				if err := b.Verify(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
