package lazy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/fs/layer"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// bytesLayer is a Layer of bytes.
type bytesLayer struct{ *bytes.Reader }

func (b bytesLayer) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	return b.Reader.ReadAt(p, off)
}
func (bytesLayer) Fetch()       {}
func (bytesLayer) Close() error { return nil }

// openJSON opens a layer whose table of contents is json, as an image's author could make it:
// with the right digest in the manifest.
func openJSON(t testing.TB, table string) error {
	var blob bytes.Buffer
	zw := gzip.NewWriter(&blob)
	zw.Write([]byte("the files' bytes would be here"))
	zw.Close()
	off := int64(blob.Len())
	zw = gzip.NewWriter(&blob)
	tw := tar.NewWriter(zw)
	tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.TOCTarName, Size: int64(len(table))})
	io.WriteString(tw, table)
	tw.Close()
	zw.Close()
	blob.Write(footer(off))
	l := bytesLayer{bytes.NewReader(blob.Bytes())}
	size := int64(blob.Len())
	toc, err := readTOC(context.Background(), l, size, tocRef{json: digest.FromString(table)})
	if err != nil {
		return err
	}
	cache, err := newChunkCache(filepath.Join(t.TempDir(), "chunks"), chunkCacheLimit)
	if err != nil {
		t.Fatal(err)
	}
	defer cache.close()
	b := &blobReader{blob: l, size: size, failed: func(error) {}}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	desc := ocispec.Descriptor{Digest: digest.FromBytes(blob.Bytes()), Size: size}
	tr, err := openTree(context.Background(), "registry.example/app:1", desc, toc, b, cache.newDir(), cache, layer.OverlayOpaqueTrusted)
	if err == nil {
		tr.close()
	}
	return err
}

// footer is an eStargz footer: an empty gzip member whose extra field has the table's offset.
func footer(tocOffset int64) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.NoCompression)
	w.Extra = append([]byte{'S', 'G', 22, 0}, fmt.Sprintf("%016xSTARGZ", tocOffset)...)
	w.Close()
	return b.Bytes()
}

func TestCraftedTables(t *testing.T) {
	sum := digest.FromString("x").String()
	for _, c := range []struct {
		name  string
		entry []estargz.TOCEntry
		want  string
	}{
		{"good", []estargz.TOCEntry{{Name: "a", Type: "reg", Size: 5, ChunkDigest: sum, Offset: 1}}, ""},
		{"a chunk too large to hold", []estargz.TOCEntry{{Name: "a", Type: "reg", Size: 1 << 60, ChunkSize: 1 << 60, ChunkDigest: sum, Offset: 1}}, "has a chunk of"},
		{"a file longer than its chunks", []estargz.TOCEntry{{Name: "a", Type: "reg", Size: 100, ChunkSize: 5, ChunkDigest: sum, Offset: 1}}, "does not cover all 100 bytes"},
		{"a chunk without digest", []estargz.TOCEntry{{Name: "a", Type: "reg", Size: 5, Offset: 1}}, "has no digest for a chunk"},
		{"a folder inside itself", []estargz.TOCEntry{
			{Name: "d", Type: "dir"},
			{Name: "d/e", Type: "hardlink", LinkName: "d"},
		}, "leads to no file"},
		{"a folder inside itself by way of a file", []estargz.TOCEntry{
			{Name: "f", Type: "reg"},
			{Name: "f/e", Type: "hardlink", LinkName: "f"},
		}, "is no folder"},
		{"a folder inside itself that is not listed", []estargz.TOCEntry{
			{Name: "d/f", Type: "reg"},
			{Name: "d/e", Type: "hardlink", LinkName: "d"},
		}, "leads to no file"},
		{"a name that was not UTF-8", []estargz.TOCEntry{{Name: "caf\ufffd", Type: "reg"}}, "not UTF-8"},
		{"a hard link like its file", []estargz.TOCEntry{
			{Name: "a", Type: "reg", Mode: 0o755, Xattrs: map[string][]byte{"security.capability": {1}, "user.a": {2}}},
			{Name: "b", Type: "hardlink", LinkName: "a", Mode: 0o755, Xattrs: map[string][]byte{"security.capability": {1}}},
		}, ""},
		{"a hard link unlike its file", []estargz.TOCEntry{
			{Name: "a", Type: "reg", Mode: 0o755},
			{Name: "b", Type: "hardlink", LinkName: "a", Mode: 0o644},
		}, "attributes that its file does not have"},
		{"a hard link that takes a capability away", []estargz.TOCEntry{
			{Name: "a", Type: "reg", Xattrs: map[string][]byte{"security.capability": {1}}},
			{Name: "b", Type: "hardlink", LinkName: "a"},
		}, "attributes that its file does not have"},
		{"links in a circle", []estargz.TOCEntry{
			{Name: "a", Type: "hardlink", LinkName: "b"},
			{Name: "b", Type: "hardlink", LinkName: "a"},
		}, "leads to no file"},
		{"folders without end", []estargz.TOCEntry{{Name: strings.Repeat("d/", maxName/2) + "f", Type: "reg"}}, "more than 4096 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			table, err := json.Marshal(estargz.JTOC{Version: 1, Entries: entries(c.entry)})
			if err != nil {
				t.Fatal(err)
			}
			err = openJSON(t, string(table))
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
		})
	}
}

func entries(list []estargz.TOCEntry) (all []*estargz.TOCEntry) {
	for i := range list {
		all = append(all, &list[i])
	}
	return all
}

// FuzzTable: no table of contents takes the daemon down.
func FuzzTable(f *testing.F) {
	f.Add(`{"version":1,"entries":[{"name":"a","type":"reg","size":5,"offset":1,"chunkDigest":"` + digest.FromString("x").String() + `"}]}`)
	f.Add(`{"version":1,"entries":[{"name":"d","type":"dir"},{"name":"d/e","type":"hardlink","linkName":"d"},null]}`)
	f.Add(`{"version":1,"entries":[null]}`)
	f.Fuzz(func(t *testing.T, table string) { _ = openJSON(t, table) })
}

// FuzzTOC: no layer takes the daemon down.
func FuzzTOC(f *testing.F) {
	f.Add(footer(0))
	f.Add(bytes.Repeat([]byte{0xff}, 60))
	f.Fuzz(func(t *testing.T, blob []byte) {
		_, _ = readTOC(context.Background(), bytesLayer{bytes.NewReader(blob)}, int64(len(blob)), tocRef{json: digest.FromString("x")})
	})
}

func TestImpliedFolder(t *testing.T) {
	dir := func(name string) *estargz.TOCEntry { return &estargz.TOCEntry{Name: name, Type: "dir"} }
	file := func(name string) *estargz.TOCEntry { return &estargz.TOCEntry{Name: name, Type: "reg"} }
	for _, c := range []struct {
		name    string
		entries []*estargz.TOCEntry
		want    string
	}{
		{"nothing", nil, ""},
		{"in the root", []*estargz.TOCEntry{file("a"), {Type: "chunk"}}, ""},
		{"listed, in any order and form", []*estargz.TOCEntry{file("./a/b/f"), dir("/a/b/"), dir("a")}, ""},
		{"left out", []*estargz.TOCEntry{dir("a"), file("a/b/f")}, "a/b"},
		{"left out above", []*estargz.TOCEntry{dir("a/b"), file("a/b/f")}, "a"},
	} {
		if got := impliedFolder(&estargz.JTOC{Entries: c.entries}); got != c.want {
			t.Errorf("%s: %q, not %q", c.name, got, c.want)
		}
	}
}
