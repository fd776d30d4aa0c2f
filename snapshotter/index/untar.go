package index

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strconv"
	"strings"
)

const tarBlock = 512

// untar reads the stream as a tar: the entries go to the tree, contents to the data
// file. The reader is archive/tar, as in containerd, so that both read the same.
func (b *build) untar() error {
	src := &recorder{queueReader: queueReader{in: b.raw.out[0], ctx: b.ctx}}
	tr := tar.NewReader(src)
	for {
		src.begin()
		h, err := tr.Next()
		src.on = false
		if err == io.EOF {
			break
		}
		if err != nil {
			return b.tarErr(err)
		}
		ino, err := b.tree.add(h)
		if err != nil {
			return err
		}
		if ino != nil && h.Size > 0 {
			ino.Data = b.data.off
			if err := b.contents(tr, h, src); err != nil {
				return err
			}
		}
		if _, err := io.Copy(io.Discard, tr); err != nil {
			return b.tarErr(err)
		}
	}
	// What follows the tar counts for the diff ID alone.
	if _, err := io.Copy(io.Discard, src); err != nil {
		return err
	}
	return b.data.close()
}

func (b *build) tarErr(err error) error {
	if cerr := b.ctx.Err(); cerr != nil {
		return cerr
	}
	return ErrNotIndexable{fmt.Errorf("its tar cannot be read: %w", err)}
}

// contents takes the regular file that tr is at.
func (b *build) contents(tr *tar.Reader, h *tar.Header, src *recorder) error {
	parts, err := sparseParts(h, src.head)
	if err != nil {
		return ErrNotIndexable{err}
	}
	at := int64(0) // in the file
	for _, part := range parts {
		if part.Data < at || part.Len < 0 || part.Len > h.Size-part.Data {
			return notIndexable("the sparse file %q has parts that cannot be", h.Name)
		}
		if err := b.hole(tr, part.Data-at); err != nil {
			return err
		}
		at = part.Data + part.Len
		if part.Len == 0 {
			continue
		}
		if len(b.x.Extents) == maxExtents {
			return notIndexable("it has more than %d extents", maxExtents)
		}
		b.x.Extents = append(b.x.Extents, Extent{Data: b.data.off, Stream: src.off, Len: part.Len})
		begin := src.off
		for left := part.Len; left > 0; {
			p, err := b.data.space()
			if err != nil {
				return err
			}
			n, err := tr.Read(p[:min(int64(len(p)), left)])
			b.data.advance(n)
			left -= int64(n)
			if err == io.EOF && left > 0 {
				err = io.ErrUnexpectedEOF
			}
			if err != nil && left > 0 {
				return b.tarErr(err)
			}
		}
		if src.off != begin+part.Len {
			return notIndexable("the sparse file %q is not stored as its map says", h.Name)
		}
	}
	if err := b.hole(tr, h.Size-at); err != nil {
		return err
	}
	return b.data.align()
}

// hole passes over n zeros that tr makes up.
func (b *build) hole(tr *tar.Reader, n int64) error {
	if n == 0 {
		return nil
	}
	if b.data.holes += n; n > maxHoles || b.data.holes > maxHoles {
		return notIndexable("its sparse files have holes of more than %d GiB", int64(maxHoles)>>30)
	}
	if _, err := io.CopyN(io.Discard, tr, n); err != nil {
		return b.tarErr(short(err))
	}
	return b.data.zeros(n)
}

// recorder keeps what is read for one header: the map of a sparse file is in there,
// and archive/tar does not tell it.
type recorder struct {
	queueReader
	on   bool
	skip int64 // padding of the entry before
	head []byte
}

func (r *recorder) begin() {
	r.on, r.head, r.skip = true, r.head[:0], -r.off&(tarBlock-1)
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.queueReader.Read(p)
	if r.on {
		q := p[:n]
		skip := min(int64(n), r.skip)
		r.skip -= skip
		// archive/tar reads at most 1 MiB of each kind of special header.
		if len(r.head)+n <= 8<<20 {
			r.head = append(r.head, q[skip:]...)
		}
	}
	return n, err
}

// sparseParts tells which parts of a file are in the tar, by their offset in the file
// (in Extent.Data): all of it, unless it is one of GNU's sparse files in PAX.
func sparseParts(h *tar.Header, head []byte) ([]Extent, error) {
	all := []Extent{{Len: h.Size}}
	major, minor := h.PAXRecords["GNU.sparse.major"], h.PAXRecords["GNU.sparse.minor"]
	list := h.PAXRecords["GNU.sparse.map"]
	bad := fmt.Errorf("the sparse file %q has a map that cannot be read", h.Name)
	var numbers []string
	switch {
	case major == "1" && minor == "0":
		text, ok := sparseText(head)
		if !ok {
			return nil, bad
		}
		numbers = strings.Split(text, "\n")
		n, err := strconv.Atoi(numbers[0])
		if err != nil || n < 0 || n > len(numbers)/2 || 2*n+1 > len(numbers) {
			return nil, bad
		}
		numbers = numbers[1 : 2*n+1]
	case major == "0" && (minor == "0" || minor == "1"), major == "" && minor == "" && list != "":
		if list != "" {
			numbers = strings.Split(list, ",")
		}
	default:
		return all, nil
	}
	if len(numbers)%2 != 0 {
		return nil, bad
	}
	parts := make([]Extent, 0, len(numbers)/2)
	for ; len(numbers) > 0; numbers = numbers[2:] {
		off, err1 := strconv.ParseInt(numbers[0], 10, 64)
		n, err2 := strconv.ParseInt(numbers[1], 10, 64)
		if err1 != nil || err2 != nil {
			return nil, bad
		}
		parts = append(parts, Extent{Data: off, Len: n})
	}
	return parts, nil
}

// sparseText is what follows the file's header in head: the map of version 1.0.
func sparseText(head []byte) (string, bool) {
	for len(head) >= tarBlock {
		switch head[156] { // the type
		case tar.TypeXHeader, tar.TypeGNULongName, tar.TypeGNULongLink:
			size, ok := tarNumber(head[124:136])
			if !ok || size < 0 || size > int64(len(head)) {
				return "", false
			}
			n := tarBlock + (int(size)+tarBlock-1)/tarBlock*tarBlock
			head = head[min(n, len(head)):]
		default:
			return string(head[tarBlock:]), true
		}
	}
	return "", false
}

// tarNumber reads a size as archive/tar does: octal, or binary with the high bit set.
func tarNumber(b []byte) (int64, bool) {
	if b[0]&0x80 != 0 {
		v := int64(b[0] & 0x3f)
		for _, c := range b[1:] {
			if v > maxSize>>8 {
				return 0, false
			}
			v = v<<8 | int64(c)
		}
		return v, true
	}
	b = bytes.Trim(b, " \x00")
	if len(b) == 0 {
		return 0, true
	}
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	v, err := strconv.ParseInt(string(b), 8, 64)
	return v, err == nil
}
