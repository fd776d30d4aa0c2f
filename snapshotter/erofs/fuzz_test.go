package erofs

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// tape is fuzz input that values are taken from; zeros follow its end.
type tape struct{ rest []byte }

func (t *tape) number(bytes int) uint64 {
	var b [8]byte
	n := copy(b[:bytes], t.rest)
	t.rest = t.rest[n:]
	return binary.LittleEndian.Uint64(b[:])
}

func (t *tape) text() string {
	n := int(t.number(1))
	if n >= 250 { // long ones from few bytes
		return strings.Repeat(string([]byte{byte(t.number(1))}), int(t.number(2)))
	}
	n = min(n%16, len(t.rest))
	s := string(t.rest[:n])
	t.rest = t.rest[n:]
	return s
}

func (t *tape) entry(paths []string) index.Entry {
	kinds := []uint32{unix.S_IFREG, unix.S_IFDIR, unix.S_IFDIR, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK, 0, 1 << 20}
	e := index.Entry{Path: t.text(), Mode: kinds[t.number(1)%uint64(len(kinds))] | uint32(t.number(2))&0o7777, HardLink: -1}
	if parent := int(t.number(1)); parent < len(paths) && paths[parent] != "" {
		e.Path = paths[parent] + "/" + e.Path
	}
	more := t.number(1)
	if more&1 != 0 {
		e.Size, e.Data = int64(t.number(2)), int64(t.number(1))*blockSize
	}
	if more&2 != 0 {
		e.Size, e.Data, e.Sec, e.Nsec = int64(t.number(8)), int64(t.number(8)), int64(t.number(8)), uint32(t.number(4))
	}
	if more&4 != 0 {
		e.Major, e.Minor, e.UID, e.GID = uint32(t.number(4)), uint32(t.number(4)), uint32(t.number(4)), uint32(t.number(4))
	}
	if more&8 != 0 {
		e.Link = t.text()
	}
	if more&16 != 0 {
		e.HardLink = int(int16(t.number(2)))
	}
	for range more >> 5 {
		prefixes := []string{"user.", "trusted.", "security.", "system.posix_acl_access", "system.posix_acl_default", ""}
		name := prefixes[t.number(1)%uint64(len(prefixes))]
		if !strings.HasPrefix(name, "system.") {
			name += t.text()
		}
		e.Xattrs = append(e.Xattrs, index.Xattr{Name: name, Value: t.text()})
	}
	return e
}

// acceptable leaves out what is refused.
func acceptable(entries []index.Entry, dataSize int64) (kept []index.Entry) {
	for _, e := range entries {
		if _, err := Plan("", append(kept, e), dataSize); err == nil {
			kept = append(kept, e)
		}
	}
	return kept
}

// FuzzWrite gives the writer any entries at all. What it writes must read back as the
// same entries; what it refuses, it must refuse without having taken memory for it.
func FuzzWrite(f *testing.F) {
	f.Add([]byte("\x00"), true)
	f.Add([]byte("\x01\x03abc\x00\x00\x00\x00\xff\x02bc\x01\x00\x00\x01\x01"), true)
	f.Add(bytes.Repeat([]byte("\x01\x02ab\x01\xff\x01\x00\x03"), 100), true)
	f.Add(bytes.Repeat([]byte("\xfaq\x10\x00\x03\x00\x00\xff\x08\xfat\x00\x0e"), 50), true)
	f.Add(bytes.Repeat([]byte("\x05user!\x00\x00\x00\xff\xe0\x00\x03abc\x02va\x01\x01x\xfa0\x00\x02"), 50), false)
	f.Fuzz(func(t *testing.T, input []byte, ordered bool) {
		in := tape{input}
		dataSize := int64(in.number(1)) * blockSize
		entries := []index.Entry{{Mode: unix.S_IFDIR | 0o755, HardLink: -1}}
		paths := []string{""}
		for len(in.rest) > 0 && len(entries) < 200 {
			e := in.entry(paths)
			entries = append(entries, e)
			paths = append(paths, e.Path)
		}
		if ordered { // so that more than the first checks is reached
			slices.SortStableFunc(entries, func(a, b index.Entry) int {
				return slices.Compare(strings.Split(a.Path, "/"), strings.Split(b.Path, "/"))
			})
			entries = slices.CompactFunc(entries, func(a, b index.Entry) bool { return a.Path == b.Path })
			for i := range entries {
				slices.SortFunc(entries[i].Xattrs, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
				entries[i].Xattrs = slices.CompactFunc(entries[i].Xattrs, func(a, b index.Xattr) bool { return a.Name == b.Name })
			}
			entries = acceptable(entries, dataSize)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		l, err := Plan("", entries, dataSize)
		runtime.ReadMemStats(&after)
		if most := uint64(1<<20 + 1<<10*len(entries)); after.TotalAlloc-before.TotalAlloc > most {
			t.Fatalf("the plan of %d entries took %d bytes", len(entries), after.TotalAlloc-before.TotalAlloc)
		}
		if err != nil {
			return
		}
		if most := int64(1<<20 + 4*len(input) + len(entries)*(3*blockSize+1<<18)); l.Size() > most {
			t.Fatalf("the image of %d entries has %d bytes", len(entries), l.Size())
		}
		var b bytes.Buffer
		if n, err := l.WriteTo(&b); err != nil || n != l.Size() || int(n) != b.Len() {
			t.Fatalf("WriteTo gave %d, %v and wrote %d bytes; the plan has %d", n, err, b.Len(), l.Size())
		}
		if err := checkImage(b.Bytes(), entries, dataSize); err != nil {
			t.Fatal(err)
		}
	})
}
