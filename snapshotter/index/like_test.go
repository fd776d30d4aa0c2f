package index

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/log"
)

// entriesOf makes a layer of any bytes, four for an entry, whose names and targets are few, so that they meet: a name that is
// there twice, in a link, in a file, below a whiteout.
func entriesOf(b []byte) (all []tarEntry) {
	elements := []string{"a", "b", "c", "a", "b", "..", ".wh.a", ".wh.b", ".wh..wh..opq", ".", "a", "c", ".wh..wh.plnk", "", "b", ".wh."}
	name := func(n byte) string {
		s := elements[n&15]
		if n&16 != 0 {
			s = elements[n>>5] + "/" + s
		}
		if n&0xe0 == 0x60 {
			s = "a/b/" + s
		}
		return s
	}
	target := func(n byte) string {
		s := name(n)
		if n&0x80 != 0 {
			s = "/" + s
		}
		return s
	}
	for ; len(b) >= 4 && len(all) < 40; b = b[4:] {
		n := strings.TrimSuffix(name(b[1]), "/")
		more := func(h *tar.Header) {
			h.Mode = int64(b[3])<<4 | int64(b[2])&0o17
			h.Uid, h.Gid = int(b[3])*1000, int(b[2])
			h.ModTime = time.Unix(int64(b[2])<<20, int64(b[3]))
			if b[0]&0x80 != 0 {
				pax("SCHILY.xattr.security.capability", capability)(h)
			}
			if b[0]&0x40 != 0 {
				pax("SCHILY.xattr.user."+string(rune('a'+b[2]&1)), string(rune('a'+b[3]&15)))(h)
			}
		}
		if n == "" {
			n = "." // archive/tar writes no entry without a name
		}
		switch b[0] % 8 {
		case 0, 1:
			all = append(all, file(n, strings.Repeat(string(rune('a'+b[2]&15)), int(b[3])), more))
		case 2, 3:
			all = append(all, dir(n, more))
		case 4:
			all = append(all, entry(tar.TypeSymlink, n, more, func(h *tar.Header) { h.Linkname = target(b[2]) }))
		case 5, 6:
			all = append(all, entry(tar.TypeLink, n, more, func(h *tar.Header) { h.Linkname = target(b[2]) }))
		case 7:
			if b[2]&1 == 0 {
				all = append(all, entry(tar.TypeFifo, n, more))
			} else {
				all = append(all, entry(tar.TypeChar, n, more, func(h *tar.Header) { h.Devmajor, h.Devminor = int64(b[2]), int64(b[3]) }))
			}
		}
	}
	return all
}

// FuzzLikeContainerd is TestLikeContainerd with layers that nobody thought of.
func FuzzLikeContainerd(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("unpacking with owners and devices needs root")
	}
	f.Add([]byte("\x02\x00\x00\x00\x00\x10\x01\x05\x05\x01\x10\x00"))
	f.Add([]byte("\x04\x00\x01\x00\x02\x01\x00\x00\x00\x10\x01\x05\x00\x06\x00\x00"))
	f.Add([]byte("\x00\x00\x01\x09\x06\x01\x00\x00\x00\x00\x02\x03\x06\x02\x01\x00"))
	log.L.Logger.SetOutput(io.Discard) // containerd warns of each attribute that it leaves out
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		stream := makeTar(t, entriesOf(b))
		sink := &memory{}
		x, err := Build(context.Background(), bytes.NewReader(stream), descOf(stream), sink, Options{})
		root := filepath.Join(dir, "root")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(root)
		started := time.Now()
		_, applied := archive.Apply(context.Background(), root, bytes.NewReader(stream), archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
		var not ErrNotIndexable
		if (err == nil) != (applied == nil) || err != nil && !errors.As(err, &not) {
			t.Fatalf("error %v, but containerd says %v", err, applied)
		}
		if err != nil {
			return
		}
		want, got := describe(t, root, started), describeIndex(x, sink.b)
		if !slices.Equal(got, want) {
			t.Errorf("the tree is\n%s\nbut containerd's is\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})
}
