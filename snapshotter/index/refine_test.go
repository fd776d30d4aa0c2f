package index

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

func TestRefinedIndexReadsLessAndTheSame(t *testing.T) {
	stream := realTar(t, 16<<20)
	half := len(stream) / 2
	members := append(gzipped(t, stream[:half]), gzipped(t, stream[half:])...)
	for form, blob := range map[string][]byte{"one member": gzipped(t, stream), "two members": members} {
		t.Run(form, func(t *testing.T) {
			x, data := mustBuild(t, blob, Options{Spacing: 2 << 20})
			rnd := rand.New(rand.NewPCG(7, 8))
			var first []Range
			for range 12 {
				c := x.Chunks[rnd.IntN(len(x.Chunks))]
				first = append(first, Range{c.Off, c.Len})
			}
			read := func(x *Index) (n int64) {
				var opens int64
				for _, r := range first {
					c := int(r.Off / x.Chunks[0].Len)
					if err := x.Fill(t.Context(), c, c, opener(blob, &opens, &n), func(got int, p []byte) error {
						if want := data[x.Chunks[got].Off:][:len(p)]; !bytes.Equal(p, want) {
							t.Errorf("chunk %d is wrong", got)
						}
						return nil
					}); err != nil {
						t.Fatal(err)
					}
				}
				return n
			}
			var opens, n int64
			y, err := x.Refine(t.Context(), first, opener(blob, &opens, &n))
			if err != nil {
				t.Fatal(err)
			}
			if len(y.Points) <= len(x.Points) {
				t.Fatalf("%d points, before %d", len(y.Points), len(x.Points))
			}
			if before, after := read(x), read(y); after > before/2 {
				t.Errorf("%d bytes are read, before %d", after, before)
			}
			var b bytes.Buffer
			if err := Encode(&b, y); err != nil {
				t.Fatal(err)
			}
			z, err := Decode(&b)
			if err != nil || !sameIndex(y, z) {
				t.Errorf("the index changes when it is encoded and decoded: %v", err)
			}
			checkFill(t, z, blob, data, 100)
			// What is refined already stays.
			if again, err := y.Refine(t.Context(), first, opener(blob, &opens, &n)); err != nil || len(again.Points) > len(y.Points)+2 {
				t.Errorf("again: %d points after %d, %v", len(again.Points), len(y.Points), err)
			}
		})
	}
}

func TestRefineOfWhatCannotHaveMorePoints(t *testing.T) {
	stream := realTar(t, 4<<20)
	for form, blob := range map[string][]byte{"tar": stream, "zstd": zstdFrames(t, stream, 1<<20)} {
		x, _ := mustBuild(t, blob, Options{})
		y, err := x.Refine(t.Context(), []Range{{0, Align}, {x.DataSize / 2 / Align * Align, Align}}, func(int64) (io.ReadCloser, error) { return nil, errors.New("it is read") })
		if err != nil || len(y.Points) != len(x.Points) || len(y.First) != 2 {
			t.Errorf("%s: %v", form, err)
		}
	}
}

func TestRefineOfABlobThatIsGone(t *testing.T) {
	blob := gzipped(t, realTar(t, 8<<20))
	x, _ := mustBuild(t, blob, Options{Spacing: 4 << 20})
	gone := errors.New("gone")
	first := []Range{{x.DataSize / 3, 1}, {x.DataSize / 2, 1}}
	if _, err := x.Refine(t.Context(), first, func(int64) (io.ReadCloser, error) { return nil, gone }); !errors.Is(err, gone) {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var opens, n int64
	if _, err := x.Refine(ctx, first, opener(blob, &opens, &n)); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	other := gzipped(t, realTar(t, 8<<20)[1<<20:])
	if y, err := x.Refine(t.Context(), first, opener(other[:len(other)-1], &opens, &n)); err == nil && len(y.Points) > len(x.Points)+len(first) {
		t.Error("points of another blob")
	}
}

// The bounds hold against an order that names everything.
func TestRefineIsBounded(t *testing.T) {
	var b bytes.Buffer
	w, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(realTar(t, 24<<20)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	x, _ := mustBuild(t, b.Bytes(), Options{})
	var first []Range
	for off := int64(0); off < x.DataSize && len(first) < MaxFirst; off += Align {
		first = append(first, Range{off, Align})
	}
	var opens, n int64
	y, err := x.Refine(t.Context(), first, opener(b.Bytes(), &opens, &n))
	if err != nil {
		t.Fatal(err)
	}
	var windows int64
	for _, p := range y.Points {
		windows += nonZero(p.Window)
	}
	for _, p := range x.Points {
		windows -= nonZero(p.Window)
	}
	for _, r := range []Range{{-1, 1}, {0, 0}, {x.DataSize, 1}, {0, x.DataSize + 1}, {maxSize, maxSize}} {
		if _, err := x.Refine(t.Context(), []Range{r}, opener(b.Bytes(), &opens, &n)); err == nil {
			t.Errorf("an order with %v was taken", r)
		}
	}
	// The last place that points are made from may go over.
	if most := x.BlobSize/refineShare + 32*history; windows > most {
		t.Errorf("further windows have %d bytes, more than %d", windows, most)
	}
}
