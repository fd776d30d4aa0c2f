package index

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
)

// tocOf takes the table of contents out of a layer.
func tocOf(tb testing.TB, blob []byte, d estargz.Decompressor) []byte {
	tb.Helper()
	_, off, size, err := d.ParseFooter(blob[int64(len(blob))-d.FooterSize():])
	if err != nil {
		tb.Fatal(err)
	}
	if size <= 0 {
		size = int64(len(blob)) - d.FooterSize() - off
	}
	r, err := d.(interface {
		DecompressTOC(io.Reader) (io.ReadCloser, error)
	}).DecompressTOC(bytes.NewReader(blob[off : off+size]))
	if err != nil {
		tb.Fatal(err)
	}
	toc, err := io.ReadAll(r)
	if err != nil {
		tb.Fatal(err)
	}
	return toc
}

func tocLayer(tb testing.TB, stream []byte, opts ...estargz.Option) []byte {
	tb.Helper()
	b, err := estargz.Build(io.NewSectionReader(bytes.NewReader(stream), 0, int64(len(stream))), opts...)
	if err != nil {
		tb.Fatal(err)
	}
	defer b.Close()
	blob, err := io.ReadAll(b)
	if err != nil {
		tb.Fatal(err)
	}
	return blob
}

// An index from a table of contents has the tree that reading the whole layer gives,
// and fills the same contents.
func TestTOC(t *testing.T) {
	stream := realTar(t, 3<<20)
	gz := []estargz.Option{estargz.WithChunkSize(64 << 10)}
	zs := append(gz, estargz.WithCompression(&struct {
		*zstdchunked.Compressor
		*zstdchunked.Decompressor
	}{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault}, &zstdchunked.Decompressor{}}))
	for name, c := range map[string]struct {
		opts []estargz.Option
		dec  estargz.Decompressor
		from func([]byte, []byte) (*Index, error)
	}{
		"eStargz":                    {gz, new(estargz.GzipDecompressor), fromE},
		"eStargz, contents together": {append(gz, estargz.WithMinChunkSize(100_000)), new(estargz.GzipDecompressor), fromE},
		"zstd:chunked":               {zs, new(zstdchunked.Decompressor), fromZ},
	} {
		t.Run(name, func(t *testing.T) {
			blob := tocLayer(t, stream, c.opts...)
			x, err := c.from(tocOf(t, blob, c.dec), blob)
			if err != nil {
				t.Fatal(err)
			}
			whole, data := mustBuild(t, blob, Options{})
			want := make(map[string]string)
			for _, e := range whole.Entries {
				want[e.Path] = fmt.Sprintf("%o %d %d %d %q %d %x", e.Mode, e.UID, e.GID, e.Size, e.Link, e.HardLink, sha256.Sum256(data[e.Data:e.Data+e.Size]))
			}
			filled := make([]byte, x.DataSize)
			var opens, read int64
			err = x.Fill(context.Background(), 0, len(x.Chunks)-1, opener(blob, &opens, &read), func(i int, p []byte) error {
				copy(filled[x.Chunks[i].Off:], p)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if opens > 1 {
				t.Errorf("filling all opened the layer %d times", opens)
			}
			hardLinks := false
			for _, e := range x.Entries {
				hardLinks = hardLinks || e.HardLink >= 0
				got := fmt.Sprintf("%o %d %d %d %q %d %x", e.Mode, e.UID, e.GID, e.Size, e.Link, e.HardLink, sha256.Sum256(filled[e.Data:e.Data+e.Size]))
				if e.HardLink < 0 && got != want[e.Path] {
					t.Errorf("%q is\n%s, not\n%s", e.Path, got, want[e.Path])
				}
			}
			if len(x.Entries) < len(whole.Entries)-1 { // the table itself is no part of it
				t.Errorf("%d of %d entries", len(x.Entries), len(whole.Entries))
			}
			checkFill(t, x, blob, filled, 100)
			var b bytes.Buffer
			if err := Encode(&b, x); err != nil {
				t.Fatal(err)
			}
			if y, err := Decode(&b); err != nil || !sameIndex(x, y) {
				t.Errorf("the index changes when it is encoded and decoded: %v", err)
			}
		})
	}
}

func fromE(toc, blob []byte) (*Index, error) { return FromEStargz(toc, descOf(blob)) }
func fromZ(toc, blob []byte) (*Index, error) { return FromZstdChunked(toc, descOf(blob)) }

// What a hostile or careless table says is refused, or held inside the root.
func TestTOCHostile(t *testing.T) {
	blob := make([]byte, 1000)
	sum := "sha256:" + strings.Repeat("ab", 32)
	for name, c := range map[string]struct {
		entries string
		ok      bool
	}{
		"file":               {`{"type":"reg","name":"a","size":10,"offset":5,"chunkDigest":"` + sum + `"}`, true},
		"contained":          {`{"type":"reg","name":"../../a","size":10,"offset":5,"digest":"` + sum + `"}`, true},
		"hole":               {`{"type":"reg","name":"a","size":5000000,"chunkType":"zeros"}`, true},
		"no digest":          {`{"type":"reg","name":"a","size":10,"offset":5}`, false},
		"outside":            {`{"type":"reg","name":"a","size":10,"offset":1000,"digest":"` + sum + `"}`, false},
		"negative":           {`{"type":"reg","name":"a","size":10,"offset":-1,"digest":"` + sum + `"}`, false},
		"negative inner":     {`{"type":"reg","name":"a","size":10,"offset":1,"innerOffset":-5,"digest":"` + sum + `"}`, false},
		"too large":          {`{"type":"reg","name":"a","size":9000000000000000000,"offset":1,"digest":"` + sum + `"}`, false},
		"large hole":         {`{"type":"reg","name":"a","size":1000000000000,"chunkType":"zeros"}`, false},
		"incomplete":         {`{"type":"reg","name":"a","size":10,"chunkSize":5,"offset":1,"chunkDigest":"` + sum + `"}`, false},
		"gap":                {`{"type":"reg","name":"a","size":10,"chunkSize":5,"offset":1,"chunkDigest":"` + sum + `"},{"type":"chunk","chunkOffset":6,"offset":9,"chunkDigest":"` + sum + `"}`, false},
		"chunk of nothing":   {`{"type":"chunk","chunkOffset":6,"offset":9,"chunkDigest":"` + sum + `"}`, false},
		"overlap":            {`{"type":"reg","name":"a","size":10,"offset":1,"digest":"` + sum + `"},{"type":"reg","name":"b","size":10,"offset":1,"innerOffset":5,"digest":"` + sum + `"}`, false},
		"backwards":          {`{"type":"reg","name":"a","size":10,"offset":9,"digest":"` + sum + `"},{"type":"reg","name":"b","size":10,"offset":1,"digest":"` + sum + `"}`, false},
		"lost bytes":         {`{"type":"dir","name":"a` + "\xff" + `"}`, false},
		"hard link loop":     {`{"type":"hardlink","name":"a","linkName":"b"},{"type":"hardlink","name":"b","linkName":"a"}`, false},
		"hard link to a dir": {`{"type":"dir","name":"a"},{"type":"hardlink","name":"b","linkName":"a"}`, false},
		"odd type":           {`{"type":"door","name":"a"}`, false},
		"nothing":            {`null`, false},
		"no time":            {`{"type":"dir","name":"a","modtime":"yesterday"}`, false},
	} {
		_, err := FromZstdChunked([]byte(`{"version":1,"entries":[`+c.entries+`]}`), descOf(blob))
		var not ErrNotIndexable
		if (err == nil) != c.ok || err != nil && !errors.As(err, &not) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzTOC(f *testing.F) {
	blob := tocLayer(f, makeTar(f, []tarEntry{dir("d"), file("d/f", "hello"), file("g", strings.Repeat("x", 9000))}), estargz.WithChunkSize(4000))
	f.Add(tocOf(f, blob, new(estargz.GzipDecompressor)))
	f.Fuzz(func(t *testing.T, toc []byte) {
		x, err := FromEStargz(toc, descOf(blob))
		var not ErrNotIndexable
		if err != nil {
			if !errors.As(err, &not) {
				t.Fatal(err)
			}
			return
		}
		if len(x.Chunks) > 0 && x.DataSize < 1<<26 {
			var opens, read int64
			x.Fill(context.Background(), 0, len(x.Chunks)-1, opener(blob, &opens, &read), func(int, []byte) error { return nil })
		}
	})
}
