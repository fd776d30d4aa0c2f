package index

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
)

// sample is about n bytes of real files of this machine, the same each time.
func sample(tb testing.TB, n int) []byte {
	tb.Helper()
	var b []byte
	for _, dir := range []string{"/usr/lib/python3", "/usr/share/perl", "/usr/bin", "/usr/share/doc", "/usr/lib"} {
		filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil
			}
			if len(b) >= n {
				return filepath.SkipAll
			}
			if p, err := os.ReadFile(path); err == nil {
				b = append(b, p[:min(len(p), n-len(b))]...)
			}
			return nil
		})
	}
	if len(b) < n {
		tb.Skip("this machine has too few files to make a sample of")
	}
	return b
}

func gunzipAll(src io.Reader, gap int64) ([]byte, []Point, error) {
	g := newGunzip(src, gap)
	buf := make([]byte, 256<<10)
	var out []byte
	for {
		p, err := g.next(buf)
		out = append(out, p...)
		if err == io.EOF {
			return out, g.points, nil
		}
		if err != nil {
			return out, nil, err
		}
	}
}

// gzipForms are the shapes in which gzip streams come.
func gzipForms(tb testing.TB, data []byte) map[string][]byte {
	forms := make(map[string][]byte)
	for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, 1, 2, 6, 9} {
		var b bytes.Buffer
		w, _ := gzip.NewWriterLevel(&b, level)
		w.Write(data)
		w.Close()
		forms[fmt.Sprintf("level %d", level)] = b.Bytes()
		var k bytes.Buffer
		kw, _ := kgzip.NewWriterLevel(&k, level)
		kw.Write(data)
		kw.Close()
		forms[fmt.Sprintf("klauspost level %d", level)] = k.Bytes()
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	var flushed, members bytes.Buffer
	w := gzip.NewWriter(&flushed)
	for rest := data; len(rest) > 0; {
		n := min(len(rest), rnd.IntN(50000))
		w.Write(rest[:n])
		w.Flush()
		rest = rest[n:]
	}
	w.Close()
	forms["flushes"] = flushed.Bytes()
	for i, rest := 0, data; len(rest) > 0; i++ {
		n := min(len(rest), rnd.IntN(200000))
		w := gzip.NewWriter(&members)
		w.Name, w.Comment, w.Extra = "a name", "a comment", make([]byte, i%3*100)
		w.Write(rest[:n])
		w.Close()
		rest = rest[n:]
	}
	if len(data) > 0 {
		forms["members"] = members.Bytes()
	}
	for _, cmd := range [][]string{{"gzip", "-1"}, {"gzip", "-9"}, {"gzip", "--rsyncable"}, {"pigz"}, {"zopfli"}} {
		if _, err := exec.LookPath(cmd[0]); err != nil {
			continue
		}
		c := exec.Command(cmd[0], append(cmd[1:], "-c")...)
		c.Stdin = bytes.NewReader(data)
		if out, err := c.Output(); err == nil {
			forms[fmt.Sprint(cmd)] = out
		}
	}
	return forms
}

func TestInflate(t *testing.T) {
	for name, data := range map[string][]byte{
		"files":   sample(t, 3<<20),
		"empty":   {},
		"byte":    {7},
		"zeros":   make([]byte, 1<<20),
		"pattern": bytes.Repeat([]byte("abcde"), 200000),
	} {
		for form, blob := range gzipForms(t, data) {
			t.Run(name+"/"+form, func(t *testing.T) {
				got, points, err := gunzipAll(bytes.NewReader(blob), 100_000)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, data) {
					t.Fatal("the stream differs from what was compressed")
				}
				for i := range points {
					p := &points[i]
					g := newGunzip(nil, 0)
					buf := make([]byte, history+slack+70_000)
					if err := g.startAt(bytes.NewReader(blob[p.Blob:]), p, buf); err != nil {
						t.Fatal(err)
					}
					if p.Stream == int64(len(data)) {
						continue
					}
					part, err := g.next(buf)
					if err != nil && err != io.EOF {
						t.Fatalf("point %d of %d: %v", i, len(points), err)
					}
					if !bytes.HasPrefix(data[p.Stream:], part) {
						t.Fatalf("point %d of %d at %d begins a different stream", i, len(points), p.Stream)
					}
				}
			})
		}
	}
}

// A stream that ends early must fail, never come out short.
func TestInflateTruncated(t *testing.T) {
	data := sample(t, 200_000)
	for form, blob := range gzipForms(t, data) {
		for cut := range 40 {
			n := len(blob) - 1 - cut*cut*len(blob)/1700
			if _, _, err := gunzipAll(bytes.NewReader(blob[:n]), 0); err == nil {
				if _, err := readGzip(blob[:n]); err == nil {
					continue // cut between members
				}
				t.Errorf("%s: %d of %d bytes decode without an error", form, n, len(blob))
			} else if !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("%s: %d of %d bytes: %v", form, n, len(blob), err)
			}
		}
	}
}

func readGzip(blob []byte) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func FuzzInflate(f *testing.F) {
	data := bytes.Repeat([]byte("hello, world; "), 30)
	for _, blob := range gzipForms(f, append(data, 1, 2, 3)) {
		f.Add(blob)
	}
	f.Fuzz(func(t *testing.T, blob []byte) {
		want, wantErr := readGzip(blob)
		got, points, err := gunzipAll(bytes.NewReader(blob), 64)
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("error %v, but compress/gzip says %v", err, wantErr)
		}
		if err != nil {
			return
		}
		if !bytes.Equal(got, want) {
			t.Fatal("the stream differs from compress/gzip's")
		}
		for i := range points {
			p := &points[i]
			g := newGunzip(nil, 0)
			buf := make([]byte, 256<<10)
			if err := g.startAt(bytes.NewReader(blob[p.Blob:]), p, buf); err != nil {
				t.Fatal(err)
			}
			part, err := g.next(buf)
			if err != nil && err != io.EOF || !bytes.HasPrefix(want[p.Stream:], part) {
				t.Fatalf("point %d: %v", i, err)
			}
		}
	})
}

func BenchmarkInflate(b *testing.B) {
	data := sample(b, 48<<20)
	for _, level := range []string{"-6", "-1"} {
		c := exec.Command("gzip", level, "-c")
		c.Stdin = bytes.NewReader(data)
		blob, err := c.Output()
		if err != nil {
			b.Skip(err)
		}
		for name, decode := range map[string]func(io.Reader) error{
			"own": func(r io.Reader) error {
				g, buf := newGunzip(r, 0), make([]byte, 256<<10)
				for {
					if _, err := g.next(buf); err != nil {
						if err == io.EOF {
							return nil
						}
						return err
					}
				}
			},
			"klauspost": func(r io.Reader) error {
				z, err := kgzip.NewReader(r)
				if err == nil {
					_, err = io.Copy(io.Discard, z)
				}
				return err
			},
			"stdlib": func(r io.Reader) error {
				z, err := gzip.NewReader(r)
				if err == nil {
					_, err = io.Copy(io.Discard, struct{ io.Reader }{z})
				}
				return err
			},
		} {
			b.Run(name+level, func(b *testing.B) {
				b.SetBytes(int64(len(data)))
				for b.Loop() {
					if err := decode(bytes.NewReader(blob)); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// TestPointsOfSmallLayers: what compresses very well has fewer points for its stream, but never so few that much has to be decoded
// for one read.
func TestPointsOfSmallLayers(t *testing.T) {
	const gap = 256 << 10
	random := rand.New(rand.NewPCG(1, 2))
	for name, repeat := range map[string]int{"not at all": 1, "well": 6, "very well": 40, "nearly nothing": 5000} {
		var b bytes.Buffer
		for b.Len() < 16<<20 {
			block := make([]byte, 100)
			for i := range block {
				block[i] = byte(random.Uint32())
			}
			for range repeat {
				b.Write(block)
			}
		}
		blob := gzipped(t, b.Bytes())
		_, points, err := gunzipAll(bytes.NewReader(blob), gap)
		if err != nil {
			t.Fatal(err)
		}
		if len(points) < 4 {
			t.Errorf("%s: %d points", name, len(points))
		}
		for i := 1; i < len(points); i++ {
			blobs, stream := points[i].Blob-points[i-1].Blob, points[i].Stream-points[i-1].Stream
			// Points are between DEFLATE blocks, the longest of which have 8 MiB here.
			if stream < gap || blobs < gap*blobShare/16 && stream < streamGap*gap || stream > streamGap*gap+8<<20 {
				t.Errorf("%s: points %d bytes of stream and %d of the blob apart", name, stream, blobs)
			}
		}
		t.Logf("%s: %d points in %d bytes", name, len(points), len(blob))
	}
}
