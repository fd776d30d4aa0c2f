package index

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"golang.org/x/sys/unix"
)

var epoch = time.Unix(1_600_000_000, 123_456_789)

// entry is a tar entry with the attributes that do not matter filled in.
func entry(kind byte, name string, more ...func(*tar.Header)) tarEntry {
	h := tar.Header{Typeflag: kind, Name: name, Mode: 0o644, ModTime: epoch, Format: tar.FormatPAX}
	e := tarEntry{h: h}
	for _, f := range more {
		f(&e.h)
	}
	return e
}

type tarEntry struct {
	h    tar.Header
	body string
}

func file(name, body string, more ...func(*tar.Header)) tarEntry {
	e := entry(tar.TypeReg, name, more...)
	e.h.Size, e.body = int64(len(body)), body
	return e
}

func dir(name string, more ...func(*tar.Header)) tarEntry {
	return entry(tar.TypeDir, name+"/", append([]func(*tar.Header){func(h *tar.Header) { h.Mode = 0o750 }}, more...)...)
}

func link(kind byte, name, to string) tarEntry {
	return entry(kind, name, func(h *tar.Header) { h.Linkname = to })
}

func pax(key, value string) func(*tar.Header) {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[key] = value
	}
}

// capability is what setcap(8) makes of "cap_net_raw=ep".
const capability = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

func makeTar(tb testing.TB, entries []tarEntry) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&e.h); err != nil {
			tb.Fatalf("%q: %v", e.h.Name, err)
		}
		if _, err := w.Write([]byte(e.body)); err != nil {
			tb.Fatalf("%q: %v", e.h.Name, err)
		}
	}
	w.Close()
	return b.Bytes()
}

// layers are tars that unpackers stumble over.
func layers() map[string][]tarEntry {
	long := strings.Repeat("long/", 60) + "name"
	owned := func(h *tar.Header) { h.Uid, h.Gid, h.Mode = 3_000_000_000, 70_000, 0o6755 }
	many := make([]tarEntry, 0, 300)
	for i := range 300 {
		many = append(many, file(fmt.Sprintf("many/%d/f", i*7919%300), strings.Repeat("x", i*37)))
	}
	return map[string][]tarEntry{
		"kinds": {
			dir("."), dir("d"), file("d/f", "hello", owned), file("d/empty", ""),
			link(tar.TypeSymlink, "d/l", "../nowhere"), link(tar.TypeLink, "d/h", "d/f"), link(tar.TypeLink, "h2", "/d/h"),
			entry(tar.TypeFifo, "fifo"),
			entry(tar.TypeChar, "char", func(h *tar.Header) { h.Devmajor, h.Devminor = 259, 70_000 }),
			entry(tar.TypeBlock, "block", func(h *tar.Header) { h.Devmajor, h.Devminor = 8, 1 }),
			dir("sticky", func(h *tar.Header) { h.Mode = 0o1777 }),
		},
		"names":       {file("caf\xe9", "not UTF-8", pax("path", "caf\xe9\xff")), file(long, "long"), file(" space\n", "x"), file("./././dot//slash", "x"), file("a\\b", "x")},
		"order":       {file("a.b", "1"), dir("a"), file("a/z", "2"), file("a-b", "3"), file("a/y/x", "4"), file("a/y.x", "5")},
		"implicit":    {file("x/y/z", "1"), dir("x"), file("p/q", "2")},
		"in setgid":   {dir("g", owned), file("g/x/y/z", "1")},
		"xattrs":      {file("f", "1", pax("SCHILY.xattr.user.a", "1"), pax("SCHILY.xattr.user.z", "\x00\xff"), pax("SCHILY.xattr.trusted.no", "1"), pax("SCHILY.xattr.strange", "1"), pax("SCHILY.xattr.security.capability", capability)), dir("d", pax("SCHILY.xattr.user.d", "x")), entry(tar.TypeFifo, "p", pax("SCHILY.xattr.user.p", "x"))},
		"whiteouts":   {file(".wh.a", ""), file("d/.wh.b", ""), file("d/.wh..wh..opq", ""), file("d/c", "x"), file(".wh..wh.plnk", "", owned), file(".wh.back", ""), file("back", "again")},
		"opaque root": {file(".wh..wh..opq", ""), file("a", "x")},
		"replaced": {
			file("f", "old old old"), file("f", "new"), dir("d"), file("d/in", "x"), file("d", "a file now"),
			file("e", "a file"), dir("e"), dir("e/sub"), dir("e", func(h *tar.Header) { h.Mode = 0o700 }),
			link(tar.TypeSymlink, "l", "e"), dir("l"),
		},
		"link survives":   {file("a", "data"), link(tar.TypeLink, "b", "a"), file("a", "other")},
		"link attributes": {file("a", "data"), func() tarEntry { e := link(tar.TypeLink, "b", "a"); e.h.Mode, e.h.Uid = 0o600, 7; return e }()},
		"link takes capabilities": {
			file("a", "data", pax("SCHILY.xattr.security.capability", capability), pax("SCHILY.xattr.user.a", "1")), link(tar.TypeLink, "b", "a"),
			file("c", "data"), func() tarEntry {
				e := link(tar.TypeLink, "d", "c")
				pax("SCHILY.xattr.security.capability", capability)(&e.h)
				return e
			}(),
		},
		"through links":   {dir("usr/lib"), link(tar.TypeSymlink, "lib", "usr/lib"), file("lib/f", "1"), link(tar.TypeSymlink, "abs", "/usr"), file("abs/lib/g", "2"), link(tar.TypeLink, "h", "lib/g"), link(tar.TypeSymlink, "up", "../../../usr"), file("up/k", "3"), link(tar.TypeLink, "tolink", "lib")},
		"through missing": {link(tar.TypeSymlink, "l", "not/here"), file("l/f", "1")},
		"contained":       {file("../../escape", "1"), file("/abs", "2"), file("a/../../b", "3"), dir("..")},
		"times":           {file("old", "", func(h *tar.Header) { h.ModTime = time.Unix(-5, 0) }), file("far", "", func(h *tar.Header) { h.ModTime = time.Unix(1<<34, 5) })},
		"global":          {file("g", "1"), {h: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "x"}}}, file("after", "2")},
		"many":            many,
		// What containerd refuses.
		"whiteout of what is there": {file("a", "x"), file(".wh.a", "")},
		"whiteout of nothing":       {file(".wh.", "")},
		"whiteout of dots":          {file("d/.wh...", "")},
		"link to below":             {link(tar.TypeLink, "a", "not/here")},
		"link to itself":            {file("a", "x"), link(tar.TypeLink, "a", "a")},
		"link to directory":         {dir("d"), link(tar.TypeLink, "a", "d")},
		"link loop":                 {link(tar.TypeSymlink, "a", "b"), link(tar.TypeSymlink, "b", "a"), file("a/f", "x")},
		"in a file":                 {file("a", "x"), file("a/b", "y")},
		"odd type":                  {entry(tar.TypeCont, "a")},
		"long element":              {file(strings.Repeat("n", 256), "x")},
		"directory gone":            {dir("d"), {h: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "d", PAXRecords: map[string]string{"comment": "x"}}}},
	}
}

// What comes out must be what containerd makes of the same tar in an overlay's upper
// directory, and refused must be what it refuses.
func TestLikeContainerd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("unpacking with owners and devices needs root")
	}
	for name, entries := range layers() {
		t.Run(name, func(t *testing.T) {
			stream := makeTar(t, entries)
			sink := &memory{}
			x, err := Build(context.Background(), bytes.NewReader(stream), descOf(stream), sink, Options{})
			root := t.TempDir()
			started := time.Now()
			_, applied := archive.Apply(context.Background(), root, bytes.NewReader(stream), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
			var not ErrNotIndexable
			if (err == nil) != (applied == nil) || err != nil && !errors.As(err, &not) {
				t.Fatalf("error %v, but containerd says %v", err, applied)
			}
			if err != nil {
				t.Log(err)
				return
			}
			want := describe(t, root, started)
			got := describeIndex(x, sink.b)
			if !slices.Equal(got, want) {
				t.Errorf("the tree is\n%s\nbut containerd's is\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

// describe lists a directory in the order of an index.
func describe(t *testing.T, root string, started time.Time) []string {
	var out []string
	first := make(map[uint64]string)
	filepath.WalkDir(root, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			t.Fatal(err)
		}
		rel, _ := filepath.Rel(root, p)
		if rel == "." {
			rel = ""
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			t.Fatal(err)
		}
		body, target := "", ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, _ := os.ReadFile(p)
			body = string(b)
		case unix.S_IFLNK:
			target, _ = os.Readlink(p)
		}
		same := ""
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if same = first[st.Ino]; same == "" {
				first[st.Ino] = rel
			}
		}
		sec, nsec := st.Mtim.Sec, st.Mtim.Nsec
		if sec >= started.Unix()-1 && sec < started.Unix()+60 {
			sec, nsec = 0, 0 // the time of unpacking
		}
		var rdev uint64
		if f := st.Mode & unix.S_IFMT; f == unix.S_IFCHR || f == unix.S_IFBLK {
			rdev = st.Rdev
		}
		out = append(out, fmt.Sprintf("%q %o %d:%d %d.%d %d:%d %q %q link=%q %v", rel, st.Mode, st.Uid, st.Gid, sec, nsec, unix.Major(rdev), unix.Minor(rdev), target, body, same, xattrs(p)))
		return nil
	})
	return out
}

func xattrs(p string) []Xattr {
	buf := make([]byte, 1<<16)
	n, _ := unix.Llistxattr(p, buf)
	var out []Xattr
	for _, name := range strings.Split(string(buf[:max(n, 0)]), "\x00") {
		v := make([]byte, 1<<16)
		if m, err := unix.Lgetxattr(p, name, v); name != "" && err == nil {
			out = append(out, Xattr{name, string(v[:m])})
		}
	}
	slices.SortFunc(out, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func describeIndex(x *Index, data []byte) []string {
	var out []string
	name := make(map[int]string)
	for i := range x.Entries {
		e, p, same, at := &x.Entries[i], x.Entries[i].Path, "", i
		if e.HardLink >= 0 {
			at = e.HardLink
			e, same = &x.Entries[at], name[at]
		}
		if same == "" {
			name[at] = p
		}
		body := ""
		if e.Size > 0 {
			body = string(data[e.Data : e.Data+e.Size])
		}
		mode := e.Mode
		if i == 0 {
			mode = unix.S_IFDIR | 0o755
		}
		out = append(out, fmt.Sprintf("%q %o %d:%d %d.%d %d:%d %q %q link=%q %v", p, mode, e.UID, e.GID, e.Sec, e.Nsec, e.Major, e.Minor, e.Link, body, same, e.Xattrs))
	}
	return out
}

// What is made in a directory with a default access control list gets one itself when it is unpacked, which depends on the file
// system: such a layer is left to containerd.
func TestDefaultACL(t *testing.T) {
	acl := dir("d", pax("SCHILY.xattr.system.posix_acl_default", "\x02\x00\x00\x00"))
	for name, c := range map[string]struct {
		in []tarEntry
		ok bool
	}{
		"empty":                {[]tarEntry{acl}, true},
		"links":                {[]tarEntry{file("f", "x"), acl, link(tar.TypeLink, "d/f", "f"), link(tar.TypeSymlink, "d/l", "f")}, true},
		"made before":          {[]tarEntry{dir("d"), file("d/f", "x"), acl}, true},
		"a file":               {[]tarEntry{acl, file("d/f", "x")}, false},
		"a directory left out": {[]tarEntry{acl, link(tar.TypeSymlink, "d/e/l", "f")}, false},
	} {
		stream := makeTar(t, c.in)
		_, err := Build(context.Background(), bytes.NewReader(stream), descOf(stream), nil, Options{})
		var not ErrNotIndexable
		if c.ok && err != nil || !c.ok && !errors.As(err, &not) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Sparse files of all three kinds that GNU tar writes into PAX come out as they were.
func TestSparse(t *testing.T) {
	want := make([]byte, 1_000_000)
	copy(want[4096:], bytes.Repeat([]byte("data"), 1024))
	copy(want[700_000:], "the end is a hole")
	body := string(want[4096:8192]) + string(want[700_000:700_017])
	table := "2\n4096\n4096\n700000\n17\n"
	padded := table + strings.Repeat("\x00", 512-len(table))
	long := strings.Repeat("sparse/", 40)
	for name, e := range map[string]tarEntry{
		"0.1": file(long+"f", body, pax("GNU.sparse.major", "0"), pax("GNU.sparse.minor", "1"), pax("GNU.sparse.name", long+"f"), pax("GNU.sparse.size", "1000000"), pax("GNU.sparse.numblocks", "2"), pax("GNU.sparse.map", "4096,4096,700000,17")),
		"1.0": file(long+"f", padded+body, pax("GNU.sparse.major", "1"), pax("GNU.sparse.minor", "0"), pax("GNU.sparse.name", long+"f"), pax("GNU.sparse.realsize", "1000000")),
	} {
		t.Run(name, func(t *testing.T) {
			stream := rawPAX(e)
			for form, blob := range map[string][]byte{"tar": stream, "gzip": gzipped(t, stream)} {
				x, data := mustBuild(t, blob, Options{ChunkSize: 4096})
				checkAgainstTar(t, x, data, stream)
				checkFill(t, x, blob, data, 50)
				if !bytes.HasPrefix(data[4096:], want) {
					t.Errorf("%s: the file has other contents", form)
				}
				if len(x.Extents) != 4 {
					t.Errorf("%s: %d extents: the holes are stored", form, len(x.Extents))
				}
			}
		})
	}
}

// rawPAX makes a tar of three entries, of which e is in the middle with its PAX
// records as they are, which archive/tar would not write.
func rawPAX(e tarEntry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "before", Size: 1, Mode: 0o644})
	w.Write([]byte("x"))
	w.Flush()
	records := ""
	for k, v := range e.h.PAXRecords {
		n := len(k) + len(v) + 3
		for l := 0; l != n; {
			l = n
			n = len(fmt.Sprint(l)) + len(k) + len(v) + 3
		}
		records += fmt.Sprintf("%d %s=%s\n", n, k, v)
	}
	raw := func(kind byte, name, body string) {
		var h bytes.Buffer
		tw := tar.NewWriter(&h)
		tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(body)), Mode: 0o644, ModTime: time.Unix(1e9, 0), Format: tar.FormatUSTAR})
		p := h.Bytes()[:512]
		p[156] = kind
		copy(p[148:156], "        ")
		sum := 0
		for _, c := range p {
			sum += int(c)
		}
		copy(p[148:156], fmt.Sprintf("%06o\x00 ", sum))
		b.Write(p)
		b.WriteString(body)
		b.Write(make([]byte, -len(body)&511))
	}
	raw('x', "PaxHeaders/f", records)
	raw('0', "GNUSparseFile/f", e.body)
	w = tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "after", Size: 5, Mode: 0o644})
	w.Write([]byte("hello"))
	w.Close()
	return b.Bytes()
}

func FuzzTar(f *testing.F) {
	for _, entries := range layers() {
		if s := makeTar(f, entries); len(s) < 1<<16 {
			f.Add(s)
		}
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		stream = summed(stream)
		sink := &memory{}
		x, err := Build(context.Background(), bytes.NewReader(stream), descOf(stream), sink, Options{ChunkSize: 4096})
		var not ErrNotIndexable
		if err != nil {
			if !errors.As(err, &not) {
				t.Fatal(err)
			}
			return
		}
		var b bytes.Buffer
		if err := Encode(&b, x); err != nil {
			t.Fatal(err)
		}
		if _, err := Decode(&b); err != nil {
			t.Fatal(err)
		}
	})
}

// summed is stream with the checksums of its headers made right: else hardly an input that a fuzzer makes is read past its
// first block.
func summed(stream []byte) []byte {
	stream = bytes.Clone(stream)
	for at := 0; at+tarBlock <= len(stream); {
		p := stream[at : at+tarBlock]
		copy(p[148:156], "        ")
		sum := 0
		for _, c := range p {
			sum += int(c)
		}
		if sum == 8*' ' {
			clear(p) // the end, of two empty blocks
		} else {
			copy(p[148:156], fmt.Sprintf("%06o\x00 ", sum))
		}
		size, ok := tarNumber(p[124:136])
		if !ok || size < 0 || size > int64(len(stream)) {
			break
		}
		at += tarBlock + (int(size)+tarBlock-1)/tarBlock*tarBlock
	}
	return stream
}

func FuzzZstd(f *testing.F) {
	stream := makeTar(f, layers()["kinds"])
	f.Add(zstdFrames(f, stream, 700))
	f.Add(zstdFrames(f, stream, len(stream)))
	f.Fuzz(func(t *testing.T, blob []byte) {
		x, err := Build(context.Background(), bytes.NewReader(blob), descOf(blob), &memory{}, Options{ChunkSize: 4096})
		if err != nil || len(x.Chunks) == 0 {
			return
		}
		var opens, read int64
		if err := x.Fill(context.Background(), len(x.Chunks)/2, len(x.Chunks)-1, opener(blob, &opens, &read), func(int, []byte) error { return nil }); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzDecode(f *testing.F) {
	for _, name := range []string{"kinds", "xattrs", "many", "whiteouts"} {
		blob := gzipped(f, makeTar(f, layers()[name]))
		x, _ := mustBuild(f, blob, Options{ChunkSize: 4096})
		var b bytes.Buffer
		if err := Encode(&b, x); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes()[:b.Len()-32])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		x, err := Decode(bytes.NewReader(trailed(body)))
		if err != nil {
			return
		}
		if err := x.Validate(); err != nil {
			t.Fatal(err)
		}
		for i := range x.Chunks {
			x.Span(i, len(x.Chunks)-1)
			x.ChunkPoint(i)
		}
		for i := range x.Points {
			x.PointChunks(i)
		}
	})
}
