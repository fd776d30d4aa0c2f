package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"
)

// nastyLayer writes a layer's tar entry by entry: here order counts, and names may come twice.
type nastyLayer struct {
	out   *bytes.Buffer
	tar   *tar.Writer
	plain bool // no table of contents is made of it
	heads map[string]tar.Header
	err   error
}

func (l *nastyLayer) keep(err error) {
	if l.err == nil {
		l.err = err
	}
}

// add writes an entry with the attributes that do not matter filled in.
func (l *nastyLayer) add(kind byte, name, body string, more ...func(*tar.Header)) {
	h := tar.Header{
		Typeflag: kind, Name: name, Mode: 0o644, Size: int64(len(body)), ModTime: Epoch.Add(-time.Duration(len(name)) * time.Hour), Format: tar.FormatPAX,
	}
	if kind == tar.TypeDir {
		h.Name, h.Mode = name+"/", 0o755
	}
	for _, f := range more {
		f(&h)
	}
	l.heads[name] = h
	if err := l.tar.WriteHeader(&h); err != nil {
		l.keep(fmt.Errorf("%q: %w", name, err))
		return
	}
	_, err := io.WriteString(l.tar, body)
	l.keep(err)
}

func (l *nastyLayer) file(name, body string, more ...func(*tar.Header)) {
	l.add(tar.TypeReg, name, body, more...)
}

func (l *nastyLayer) dir(name string, more ...func(*tar.Header)) {
	l.add(tar.TypeDir, name, "", more...)
}

// link adds a hard link as tars have them, with the attributes of what it leads to.
func (l *nastyLayer) link(name, to string) {
	l.add(tar.TypeLink, name, "", func(h *tar.Header) {
		*h = l.heads[clean(to)]
		h.Typeflag, h.Name, h.Linkname, h.Size = tar.TypeLink, name, to, 0
	})
}

// otherLink adds one that says otherwise: what it says counts for all names.
func (l *nastyLayer) otherLink(name, to string, more ...func(*tar.Header)) {
	l.add(tar.TypeLink, name, "", append(more, func(h *tar.Header) { h.Linkname = to })...)
}

func (l *nastyLayer) symlink(name, to string, more ...func(*tar.Header)) {
	l.add(tar.TypeSymlink, name, "", append(more, func(h *tar.Header) { h.Linkname = to })...)
}

// sparse writes a sparse file in GNU's PAX format 1.0, which archive/tar reads and does not write: data at each of the offsets, and
// holes between.
func (l *nastyLayer) sparse(name string, size int64, data string, offsets ...int64) {
	table := fmt.Sprintf("%d\n", len(offsets))
	for _, at := range offsets {
		table += fmt.Sprintf("%d\n%d\n", at, len(data))
	}
	table += strings.Repeat("\x00", -len(table)&511)
	body := table + strings.Repeat(data, len(offsets))
	records := ""
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=" + name, fmt.Sprintf("GNU.sparse.realsize=%d", size)} {
		n := len(r) + len("00 \n")
		records += fmt.Sprintf("%02d %s\n", n, r)
	}
	l.keep(l.tar.Flush())
	for _, e := range []struct {
		kind byte
		body string
	}{{tar.TypeXHeader, records}, {tar.TypeReg, body}} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		l.keep(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "GNUSparseFile.0", Size: int64(len(e.body)), Mode: 0o644, ModTime: Epoch, Format: tar.FormatUSTAR}))
		_, err := io.WriteString(w, e.body)
		l.keep(err)
		l.keep(w.Flush())
		head := b.Bytes()[:512]
		head[156] = e.kind
		copy(head[148:156], "        ")
		sum := 0
		for _, c := range head {
			sum += int(c)
		}
		copy(head[148:156], fmt.Sprintf("%06o\x00 ", sum))
		l.out.Write(b.Bytes())
	}
}

func mode(m int64) func(*tar.Header) { return func(h *tar.Header) { h.Mode = m } }

func owner(uid, gid int) func(*tar.Header) {
	return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
}

func at(sec, nsec int64) func(*tar.Header) {
	return func(h *tar.Header) { h.ModTime = time.Unix(sec, nsec) }
}

func device(major, minor int64) func(*tar.Header) {
	return func(h *tar.Header) { h.Devmajor, h.Devminor = major, minor }
}

func xattr(name, value string) func(*tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

// netRaw is what setcap(8) makes of "cap_net_raw=ep".
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
