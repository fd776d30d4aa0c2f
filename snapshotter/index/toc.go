package index

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// zeroChunk is the length of the chunks that a hole is made into, in bytes.
const zeroChunk = 1 << 20

// FromEStargz makes the index of an eStargz layer from its table of contents: JSON that the
// caller has checked against the image's manifest. DiffID stays empty, and the
// stream is not the tar's: it has the files' contents alone.
func FromEStargz(toc []byte, desc ocispec.Descriptor) (*Index, error) {
	return fromTOC(toc, desc, Gzip)
}

// FromZstdChunked is FromEStargz for a zstd:chunked layer and its manifest.
func FromZstdChunked(manifest []byte, desc ocispec.Descriptor) (*Index, error) {
	return fromTOC(manifest, desc, Zstd)
}

func fromTOC(toc []byte, desc ocispec.Descriptor, c Compression) (*Index, error) {
	if !isSHA256(desc.Digest) || desc.Size <= 0 || desc.Size > maxSize {
		return nil, notIndexable("its descriptor has the digest %q and the size %d", desc.Digest, desc.Size)
	}
	b := &tocBuild{x: &Index{Blob: desc.Digest, BlobSize: desc.Size, Compression: c}, tree: newTree(), last: -1}
	err := readTOC(toc, b.entry)
	if err == nil {
		err = b.endFile()
	}
	if err == nil {
		b.x.Entries, err = b.tree.entries()
	}
	if err != nil {
		var not ErrNotIndexable
		if errors.As(err, &not) {
			return nil, err
		}
		return nil, notIndexable("its table of contents cannot be used: %w", err)
	}
	return b.x, b.x.Validate()
}

// tocEntry is an entry as both formats have it; the keys are those of stargz's TOCEntry and
// of containers/storage's FileMetadata.
type tocEntry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	LinkName    string            `json:"linkName"`
	Mode        int64             `json:"mode"`
	Size        int64             `json:"size"`
	UID         int               `json:"uid"`
	GID         int               `json:"gid"`
	ModTime     string            `json:"modtime"`
	DevMajor    int64             `json:"devMajor"`
	DevMinor    int64             `json:"devMinor"`
	Xattrs      map[string][]byte `json:"xattrs"`
	Digest      string            `json:"digest"`
	Offset      int64             `json:"offset"`
	InnerOffset int64             `json:"innerOffset"`
	ChunkOffset int64             `json:"chunkOffset"`
	ChunkSize   int64             `json:"chunkSize"`
	ChunkDigest string            `json:"chunkDigest"`
	ChunkType   string            `json:"chunkType"` // "zeros" for what is not in the blob
}

// readTOC gives each entry to f, and never holds more than one.
func readTOC(toc []byte, f func(*tocEntry) error) error {
	d := json.NewDecoder(bytes.NewReader(toc))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("it is not a JSON object: %w", errors.Join(err))
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		if s, ok := key.(string); !ok || !strings.EqualFold(s, "entries") {
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return err
			}
			continue
		}
		if t, err := d.Token(); err != nil || t != json.Delim('[') {
			return fmt.Errorf("its entries are not a list: %w", errors.Join(err))
		}
		for d.More() {
			var e *tocEntry
			if err := d.Decode(&e); err != nil {
				return err
			}
			if e == nil {
				return errors.New("it has an entry of nothing")
			}
			if err := f(e); err != nil {
				return err
			}
		}
		if _, err := d.Token(); err != nil {
			return err
		}
	}
	_, err := d.Token()
	return err
}

// tocBuild makes an index from the entries of a table of contents, in their order.
type tocBuild struct {
	x      *Index
	tree   *tree
	file   *tocEntry // the regular file whose pieces come; nil when there is none
	data   int64     // where it begins in the data file
	at     int64     // bytes of it so far
	pieces int
	last   int64 // blob offset of the last point
	inner  int64 // where its content begins in the stream
	stream int64 // bytes so far
	holes  int64
}

var tocTypes = map[string]byte{
	"reg": tar.TypeReg, "dir": tar.TypeDir, "symlink": tar.TypeSymlink, "hardlink": tar.TypeLink,
	"char": tar.TypeChar, "block": tar.TypeBlock, "fifo": tar.TypeFifo,
}

func (b *tocBuild) entry(e *tocEntry) error {
	if e.Type == "chunk" {
		if b.file == nil {
			return errors.New("it has a chunk of no file")
		}
		return b.piece(e)
	}
	if err := b.endFile(); err != nil {
		return err
	}
	kind, ok := tocTypes[e.Type]
	if !ok {
		return fmt.Errorf("%q is of the type %q", e.Name, e.Type)
	}
	if strings.Contains(e.Name+e.LinkName, "\ufffd") {
		// JSON has no way to write such a name: the tar alone still has it.
		return fmt.Errorf("the name %q may have lost bytes that are not UTF-8", e.Name)
	}
	h := &tar.Header{
		Typeflag: kind, Name: e.Name, Linkname: e.LinkName, Mode: e.Mode, Size: e.Size, Uid: e.UID, Gid: e.GID,
		Devmajor: e.DevMajor, Devminor: e.DevMinor,
	}
	if e.ModTime != "" {
		t, err := time.Parse(time.RFC3339, e.ModTime)
		if err != nil {
			return fmt.Errorf("%q has a time that cannot be read: %w", e.Name, err)
		}
		h.ModTime = t
	}
	if len(e.Xattrs) > 0 {
		h.PAXRecords = make(map[string]string, len(e.Xattrs))
		for name, value := range e.Xattrs {
			h.PAXRecords[paxXattr+name] = string(value)
		}
	}
	if e.Size < 0 || e.Size > maxData {
		return fmt.Errorf("%q cannot have %d bytes", e.Name, e.Size)
	}
	ino, err := b.tree.add(h)
	if err != nil {
		return err
	}
	if kind != tar.TypeReg || e.Size == 0 {
		return nil
	}
	b.file, b.data, b.at, b.pieces = e, b.x.DataSize, 0, 0
	if ino != nil {
		ino.Data = b.data
	}
	return b.piece(e)
}

// piece takes a part of the file, with which the file itself may begin.
func (b *tocBuild) piece(e *tocEntry) error {
	f := b.file
	size := e.ChunkSize
	if size == 0 {
		size = f.Size - e.ChunkOffset
	}
	if e.ChunkOffset != b.at || size <= 0 || size > f.Size-b.at {
		return fmt.Errorf("the chunks of %q are not all of its %d bytes", f.Name, f.Size)
	}
	off := b.data + b.at
	b.at += size
	b.pieces++
	if e.ChunkType == "zeros" {
		return b.zeros(off, size)
	}
	if e.ChunkType != "" && e.ChunkType != "data" {
		return fmt.Errorf("%q has a chunk of the kind %q", f.Name, e.ChunkType)
	}
	if size > maxChunk {
		return fmt.Errorf("%q has a chunk of %d MiB", f.Name, size>>20)
	}
	sum := e.ChunkDigest
	if sum == "" && size == f.Size {
		sum = f.Digest
	}
	d, err := digest.Parse(sum)
	if err != nil || !isSHA256(d) {
		return fmt.Errorf("a chunk of %q has no SHA-256 to check it by", f.Name)
	}
	var c Chunk
	if _, err := hex.Decode(c.Sum[:], []byte(d.Encoded())); err != nil {
		return err
	}
	c.Off, c.Len = off, size
	if e.Offset < b.last || e.Offset < 0 || e.Offset >= b.x.BlobSize || e.InnerOffset < 0 || e.InnerOffset > maxData {
		return fmt.Errorf("a chunk of %q lies at %d, out of order", f.Name, e.Offset)
	}
	if e.Offset > b.last {
		b.x.Points = append(b.x.Points, Point{Blob: e.Offset, Stream: b.stream})
		b.last, b.inner = e.Offset, b.stream
	}
	if b.inner+e.InnerOffset < b.stream || b.stream > maxSize-2*maxData {
		return fmt.Errorf("a chunk of %q overlaps the one before", f.Name)
	}
	stream := b.inner + e.InnerOffset
	b.x.Extents = append(b.x.Extents, Extent{Data: off, Stream: stream, Len: size})
	b.stream = stream + size
	b.x.Chunks = append(b.x.Chunks, c)
	return b.bounded()
}

func (b *tocBuild) bounded() error {
	if len(b.x.Chunks) > maxChunks || len(b.x.Extents) > maxExtents || len(b.x.Points) > maxPoints || b.x.DataSize > maxData {
		return errors.New("it has too many chunks")
	}
	return nil
}

func (b *tocBuild) zeros(off, size int64) error {
	if b.holes += size; b.holes > maxHoles {
		return fmt.Errorf("it has holes of more than %d GiB", int64(maxHoles)>>30)
	}
	var p []byte
	var whole [32]byte // the sum of a chunk of zeroChunk
	for size > 0 {
		c := Chunk{Off: off, Len: min(size, zeroChunk)}
		if p == nil {
			p = make([]byte, c.Len)
			whole = sha256.Sum256(p)
		}
		c.Sum = whole
		if c.Len < int64(len(p)) {
			c.Sum = sha256.Sum256(p[:c.Len])
		}
		b.x.Chunks = append(b.x.Chunks, c)
		off, size = off+c.Len, size-c.Len
	}
	return b.bounded()
}

// endFile checks that the file is whole, and gives its padding to its last chunk.
func (b *tocBuild) endFile() error {
	if b.file == nil {
		return nil
	}
	if b.at != b.file.Size {
		return fmt.Errorf("%q has %d of its %d bytes", b.file.Name, b.at, b.file.Size)
	}
	last := &b.x.Chunks[len(b.x.Chunks)-1]
	last.Pad = aligned(last.Off+last.Len) - last.Off - last.Len
	last.Len += last.Pad
	b.x.DataSize = last.Off + last.Len
	b.file = nil
	return b.bounded()
}
