package index

import (
	"errors"
	"fmt"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Validate checks every rule of the types, in time linear in the index. What it lets
// through can be mounted and filled without looking again: the worst that a hostile
// index can do is to name chunks that the blob does not have.
func (x *Index) Validate() error {
	for _, check := range []func() error{x.checkHead, x.checkEntries, x.checkExtents, x.checkPoints, x.checkChunks, x.checkFirst} {
		if err := check(); err != nil {
			return fmt.Errorf("the layer's index is not valid: %w", err)
		}
	}
	return nil
}

func isSHA256(d digest.Digest) bool { return d.Validate() == nil && d.Algorithm() == digest.SHA256 }

func (x *Index) checkHead() error {
	switch {
	case !isSHA256(x.Blob):
		return fmt.Errorf("%q is not the digest of a blob", x.Blob)
	case x.DiffID != "" && !isSHA256(x.DiffID):
		return fmt.Errorf("%q is not a diff ID", x.DiffID)
	case x.BlobSize <= 0 || x.BlobSize > maxSize:
		return fmt.Errorf("a blob cannot have %d bytes", x.BlobSize)
	case x.Compression != Tar && x.Compression != Gzip && x.Compression != Zstd:
		return fmt.Errorf("the compression %q is not known", x.Compression)
	case x.DataSize < 0 || x.DataSize > maxData || x.DataSize%Align != 0:
		return fmt.Errorf("a data file cannot have %d bytes", x.DataSize)
	}
	return nil
}

func (x *Index) checkEntries() error {
	if len(x.Entries) == 0 || len(x.Entries) > maxEntries {
		return fmt.Errorf("a tree cannot have %d entries", len(x.Entries))
	}
	total := 0
	for i := range x.Entries {
		e := &x.Entries[i]
		total += len(e.Path) + len(e.Link)
		for _, a := range e.Xattrs {
			total += len(a.Name) + len(a.Value)
		}
		if total > maxNameBytes {
			return fmt.Errorf("the names have more than %d MiB", maxNameBytes>>20)
		}
		err := x.checkAttributes(e)
		if err == nil {
			err = checkPath(e.Path, i == 0)
		}
		if err != nil {
			return fmt.Errorf("entry %d, %.80q: %w", i, e.Path, err)
		}
	}
	return x.checkTree()
}

func checkPath(p string, first bool) error {
	if first || p == "" {
		if first != (p == "") {
			return errors.New("the root must be first, and only there")
		}
		return nil
	}
	if len(p) > maxPath {
		return errors.New("the path is too long")
	}
	for rest, more := p, true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." || len(name) > maxElement || strings.IndexByte(name, 0) >= 0 {
			return errors.New("the path has an element that cannot be")
		}
	}
	return nil
}

// checkTree checks the order, which also makes each path unique, and the parents.
func (x *Index) checkTree() error {
	parents := []*Entry{&x.Entries[0]} // from the root to where the walk is
	if !x.Entries[0].isDir() || x.Entries[0].HardLink != -1 {
		return errors.New("the root is not a directory")
	}
	for i := 1; i < len(x.Entries); i++ {
		e := &x.Entries[i]
		if compareEntryPaths(x.Entries[i-1].Path, e.Path) >= 0 {
			return fmt.Errorf("entry %d, %.80q, is not in its place", i, e.Path)
		}
		dir := ""
		if slash := strings.LastIndexByte(e.Path, '/'); slash >= 0 {
			dir = e.Path[:slash]
		}
		for len(parents) > 0 && parents[len(parents)-1].Path != dir {
			parents = parents[:len(parents)-1]
		}
		if len(parents) == 0 {
			return fmt.Errorf("entry %d, %.80q, is in no directory", i, e.Path)
		}
		if e.HardLink != -1 {
			if e.HardLink < 0 || e.HardLink >= len(x.Entries) {
				return fmt.Errorf("the hard link %.80q leads nowhere", e.Path)
			}
			if to := &x.Entries[e.HardLink]; to.HardLink != -1 || to.isDir() {
				return fmt.Errorf("the hard link %.80q leads to what is no file of its own", e.Path)
			}
		} else if e.isDir() {
			parents = append(parents, e)
		}
	}
	return nil
}

// compareEntryPaths orders paths by their elements: as bytes, with "/" before all others.
func compareEntryPaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if ca, cb := a[i], b[i]; ca != cb {
			switch {
			case ca == '/':
				return -1
			case cb == '/':
				return 1
			}
			return int(ca) - int(cb)
		}
	}
	return len(a) - len(b)
}

func (e *Entry) isDir() bool { return e.Mode&unix.S_IFMT == unix.S_IFDIR }

func (x *Index) checkAttributes(e *Entry) error {
	if e.HardLink != -1 {
		return nil // the other one's count
	}
	format := e.Mode & unix.S_IFMT
	switch format {
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO:
	default:
		return fmt.Errorf("the mode is %o", e.Mode)
	}
	switch {
	case e.Mode&^(unix.S_IFMT|0o7777) != 0:
		return fmt.Errorf("the mode is %o", e.Mode)
	case (format == unix.S_IFLNK) != (e.Link != "") || len(e.Link) > maxLink || strings.IndexByte(e.Link, 0) >= 0:
		return fmt.Errorf("the target %.80q cannot be", e.Link)
	case e.Size < 0 || e.Size > 0 && format != unix.S_IFREG:
		return fmt.Errorf("the size %d cannot be", e.Size)
	case e.Size == 0 && e.Data != 0, e.Data < 0, e.Data%Align != 0, e.Size > x.DataSize || e.Data > x.DataSize-e.Size:
		return fmt.Errorf("%d bytes from %d are not in the data file", e.Size, e.Data)
	case e.Nsec >= 1e9 || e.Sec < 0:
		return errors.New("the time cannot be")
	case (e.Major != 0 || e.Minor != 0) && format != unix.S_IFCHR && format != unix.S_IFBLK:
		return errors.New("only a device has numbers")
	case e.Major >= 1<<12 || e.Minor >= 1<<20:
		return fmt.Errorf("the device %d:%d cannot be", e.Major, e.Minor)
	case e.Implicit && format != unix.S_IFDIR:
		return errors.New("only a directory is implicit")
	}
	for i, a := range e.Xattrs {
		if a.Name == "" || len(a.Name) > maxXattrName || strings.IndexByte(a.Name, 0) >= 0 || len(a.Value) > maxXattrValue {
			return fmt.Errorf("the attribute %.80q cannot be", a.Name)
		}
		if i > 0 && e.Xattrs[i-1].Name >= a.Name {
			return fmt.Errorf("the attribute %.80q is not in its place", a.Name)
		}
	}
	return nil
}

func (x *Index) checkExtents() error {
	if len(x.Extents) > maxExtents {
		return fmt.Errorf("there cannot be %d extents", len(x.Extents))
	}
	var data, stream int64 // where the last one ends
	for i, e := range x.Extents {
		if e.Len <= 0 || e.Data < data || e.Data > x.DataSize || e.Len > x.DataSize-e.Data || e.Stream < stream || e.Stream > maxSize {
			return fmt.Errorf("extent %d, %d bytes from %d, cannot be", i, e.Len, e.Data)
		}
		data, stream = e.Data+e.Len, e.Stream+e.Len
	}
	if x.Compression == Tar && stream > x.BlobSize {
		return errors.New("the extents go on behind the end of the tar")
	}
	return nil
}

func (x *Index) checkPoints() error {
	if len(x.Points) > maxPoints {
		return fmt.Errorf("there cannot be %d points", len(x.Points))
	}
	if len(x.Points) == 0 {
		if len(x.Extents) > 0 {
			return errors.New("there is no point to decode from")
		}
		return nil
	}
	if x.Points[0].Stream != 0 {
		return errors.New("the first point is not at the begin")
	}
	if x.Compression == Tar && (len(x.Points) > 1 || x.Points[0].Blob != 0) {
		return errors.New("a tar has one point, at its begin")
	}
	windows := 0
	for i := range x.Points {
		p := &x.Points[i]
		bad := p.Blob < 0 || p.Blob >= x.BlobSize || p.Stream < 0 || p.Stream > maxSize || p.Bit > 7
		bad = bad || len(p.Window) > history || int64(len(p.Window)) > p.Stream
		bad = bad || p.Raw && x.Compression != Gzip || !p.Raw && (p.Bit != 0 || p.Window != nil)
		if i > 0 {
			before := &x.Points[i-1]
			bad = bad || p.Stream <= before.Stream || p.Blob < before.Blob || p.Blob == before.Blob && p.Bit <= before.Bit
		}
		if bad {
			return fmt.Errorf("point %d cannot be", i)
		}
		if windows += len(p.Window); windows > maxWindows {
			return fmt.Errorf("the windows have more than %d MiB", maxWindows>>20)
		}
	}
	return nil
}

func (x *Index) checkChunks() error {
	if len(x.Chunks) > maxChunks {
		return fmt.Errorf("there cannot be %d chunks", len(x.Chunks))
	}
	at := int64(0)
	for i := range x.Chunks {
		c := &x.Chunks[i]
		if c.Off != at || c.Len <= 0 || c.Len > maxChunk || c.Pad < 0 || c.Pad >= Align || c.Pad >= c.Len || c.Len > x.DataSize-at {
			return fmt.Errorf("chunk %d, %d bytes from %d, cannot be", i, c.Len, c.Off)
		}
		at += c.Len
	}
	if at != x.DataSize {
		return fmt.Errorf("the chunks are %d of %d bytes", at, x.DataSize)
	}
	return nil
}

func (x *Index) checkFirst() error {
	if len(x.First) > MaxFirst {
		return fmt.Errorf("an order of %d ranges is longer than %d", len(x.First), MaxFirst)
	}
	for _, r := range x.First {
		if r.Off < 0 || r.Len <= 0 || r.Len > x.DataSize-r.Off {
			return fmt.Errorf("the order has %d bytes from %d of %d", r.Len, r.Off, x.DataSize)
		}
	}
	return nil
}
