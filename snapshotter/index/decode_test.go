package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math"
	"runtime"
	"strings"
	"testing"
)

// trailed puts the right SHA-256 behind the body of an encoded index, as anybody can.
func trailed(body []byte) []byte {
	sum := sha256.Sum256(body)
	return append(append([]byte{}, body...), sum[:]...)
}

func small(tb testing.TB) *Index {
	blob := gzipped(tb, makeTar(tb, layers()["kinds"]))
	x, _ := mustBuild(tb, blob, Options{ChunkSize: 4096})
	return x
}

// Every way to break a rule of the types is noticed.
func TestValidate(t *testing.T) {
	for name, change := range map[string]func(*Index){
		"blob":                func(x *Index) { x.Blob = "sha256:12" },
		"blob of sha512":      func(x *Index) { x.Blob = "sha512:" + x.Blob[7:] + x.Blob[7:] },
		"no size":             func(x *Index) { x.BlobSize = 0 },
		"diff ID":             func(x *Index) { x.DiffID = "x" },
		"compression":         func(x *Index) { x.Compression = "lz4" },
		"data unaligned":      func(x *Index) { x.DataSize++ },
		"data negative":       func(x *Index) { x.DataSize = -4096 },
		"no root":             func(x *Index) { x.Entries = x.Entries[1:] },
		"no entries":          func(x *Index) { x.Entries = nil },
		"root a file":         func(x *Index) { x.Entries[0].Mode = 0o100644 },
		"dots":                func(x *Index) { x.Entries[1].Path = ".." },
		"absolute":            func(x *Index) { x.Entries[1].Path = "/a" },
		"zero byte":           func(x *Index) { x.Entries[1].Path = "a\x00" },
		"long":                func(x *Index) { x.Entries[1].Path = strings.Repeat("a", 256) },
		"out of order":        func(x *Index) { x.Entries[1], x.Entries[2] = x.Entries[2], x.Entries[1] },
		"twice":               func(x *Index) { x.Entries[2].Path = x.Entries[1].Path },
		"no parent":           func(x *Index) { x.Entries[1].Path = "a/b" },
		"in a file":           func(x *Index) { x.Entries[2].Path = x.Entries[1].Path + "/b" },
		"hard link far":       func(x *Index) { x.Entries[1].HardLink = 1000 },
		"hard link negative":  func(x *Index) { x.Entries[1].HardLink = -2 },
		"hard link to itself": func(x *Index) { x.Entries[1].HardLink = 1 },
		"hard link loop":      func(x *Index) { x.Entries[1].HardLink, x.Entries[2].HardLink = 2, 1 },
		"hard link to root":   func(x *Index) { x.Entries[1].HardLink = 0 },
		"mode":                func(x *Index) { x.Entries[1].Mode |= 1 << 20 },
		"socket":              func(x *Index) { x.Entries[1].Mode = 0o140644 },
		"size of a device":    func(x *Index) { x.Entries[1].Size = 5 },
		"nanoseconds":         func(x *Index) { x.Entries[1].Nsec = 1e9 },
		"device":              func(x *Index) { x.Entries[1].Major = 1 << 12 },
		"target of no link":   func(x *Index) { x.Entries[1].Link = "x" },
		"attributes in order": func(x *Index) { x.Entries[1].Xattrs = []Xattr{{"user.b", ""}, {"user.a", ""}} },
		"extent outside":      func(x *Index) { x.Extents[0].Len = 1 << 30 },
		"extent empty":        func(x *Index) { x.Extents[0].Len = 0 },
		"extent overlaps":     func(x *Index) { x.Extents = append(x.Extents, x.Extents[0]) },
		"extent overflows":    func(x *Index) { x.Extents[0].Stream = math.MaxInt64 },
		"no point":            func(x *Index) { x.Points = nil },
		"point late":          func(x *Index) { x.Points[0].Stream = 5 },
		"point outside":       func(x *Index) { x.Points[0].Blob = x.BlobSize },
		"point twice":         func(x *Index) { x.Points = append(x.Points, x.Points[0]) },
		"point with window":   func(x *Index) { x.Points[0].Window = make([]byte, 10) },
		"window before begin": func(x *Index) { x.Points[0].Raw, x.Points[0].Window = true, make([]byte, 10) },
		"chunk missing":       func(x *Index) { x.Chunks = x.Chunks[:0] },
		"chunk gap":           func(x *Index) { x.Chunks[0].Off = 1 },
		"chunk empty":         func(x *Index) { x.Chunks[0].Len = 0 },
		"padding":             func(x *Index) { x.Chunks[0].Pad = 4096 },
	} {
		x := small(t)
		if err := x.Validate(); err != nil {
			t.Fatal(err)
		}
		change(x)
		if x.Validate() == nil {
			t.Errorf("%s: not noticed", name)
		}
		if err := Encode(&bytes.Buffer{}, x); err == nil {
			t.Errorf("%s: encoded", name)
		}
	}
}

// A damaged index is refused, whichever byte it is, and one with a right sum and any
// byte changed does no harm.
func TestDecodeDamaged(t *testing.T) {
	var b bytes.Buffer
	if err := Encode(&b, small(t)); err != nil {
		t.Fatal(err)
	}
	whole := b.Bytes()
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x55
		if _, err := Decode(bytes.NewReader(bad)); err == nil {
			t.Errorf("byte %d changed: not noticed", i)
		}
		if _, err := Decode(bytes.NewReader(whole[:i])); err == nil {
			t.Errorf("cut off after %d bytes: not noticed", i)
		}
		if i < len(whole)-32 {
			Decode(bytes.NewReader(trailed(bad[:len(bad)-32])))
		}
	}
	if _, err := Decode(bytes.NewReader(append(bytes.Clone(whole), 0))); err == nil {
		t.Error("a byte more: not noticed")
	}
}

// Large numbers in a short file must not become memory.
func TestDecodeBomb(t *testing.T) {
	x := small(t)
	head := putString(nil, string(x.Blob))
	head = putString(head, "")
	head = putString(head, string(Gzip))
	for _, v := range []uint64{1000, maxData, maxEntries, maxExtents, maxPoints, maxChunks} {
		head = binary.AppendUvarint(head, v)
	}
	var b bytes.Buffer
	b.WriteString(magic)
	section(&b, head, nil)
	for range 4 { // sections that promise all that is allowed and have nothing
		b.Write(binary.AppendUvarint([]byte{0}, 64<<20))
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := Decode(bytes.NewReader(trailed(b.Bytes())))
	runtime.ReadMemStats(&after)
	if err == nil {
		t.Error("an index of nothing is accepted")
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 16<<20 {
		t.Errorf("%d bytes of index took %d MiB", b.Len(), used>>20)
	}
}
