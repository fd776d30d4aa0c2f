package index

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
)

func opener(blob []byte, opens, read *int64) func(int64) (io.ReadCloser, error) {
	return func(off int64) (io.ReadCloser, error) {
		*opens++
		return io.NopCloser(&counter{bytes.NewReader(blob[off:]), read}), nil
	}
}

type counter struct {
	r io.Reader
	n *int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	*c.n += int64(n)
	return n, err
}

// checkFill fills random ranges of chunks and compares them with the data.
func checkFill(t *testing.T, x *Index, blob, data []byte, times int) {
	t.Helper()
	if len(x.Chunks) == 0 {
		return
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	ranges := [][2]int{{0, len(x.Chunks) - 1}}
	for range times {
		first := rnd.IntN(len(x.Chunks))
		ranges = append(ranges, [2]int{first, min(len(x.Chunks)-1, first+rnd.IntN(4))})
	}
	for _, r := range ranges {
		var opens, read int64
		got := make(map[int]bool)
		err := x.Fill(context.Background(), r[0], r[1], opener(blob, &opens, &read), func(i int, p []byte) error {
			c := x.Chunks[i]
			if got[i] || !bytes.Equal(p, data[c.Off:c.Off+c.Len]) {
				t.Errorf("chunk %d is handed out twice or differs", i)
			}
			got[i] = true
			return nil
		})
		if err != nil {
			t.Fatalf("chunks %v: %v", r, err)
		}
		for i := r[0]; i <= r[1]; i++ {
			if !got[i] {
				t.Errorf("chunk %d is missing from %v", i, r)
			}
		}
		if from, to := x.Span(r[0], r[1]); read > to-from || opens > 1 && !x.partial() {
			t.Errorf("chunks %v took %d bytes in %d reads of the span %d to %d", r, read, opens, from, to)
		}
		if i := x.ChunkPoint(r[0]); i >= 0 && x.Compression != Tar && !x.partial() {
			first, last := x.PointChunks(i)
			for c := first; c <= min(last, r[1]); c++ {
				if !got[c] {
					t.Errorf("chunk %d of point %d did not come with %v", c, i, r)
				}
			}
		}
	}
}

// A changed byte of the blob is noticed: by the chunk that has it, or one that refers to it.
func TestFillCorrupt(t *testing.T) {
	stream := realTar(t, 2<<20)
	for form, blob := range map[string][]byte{"tar": stream, "gzip": gzipped(t, stream), "zstd": zstdFrames(t, stream, 100_000)} {
		x, data := mustBuild(t, blob, Options{Spacing: 300_000})
		rnd := rand.New(rand.NewPCG(1, 2))
		noticed := 0
		for range 50 {
			bad := bytes.Clone(blob)
			bad[rnd.IntN(len(bad))] ^= 1 << rnd.IntN(8)
			var opens, read int64
			err := x.Fill(context.Background(), 0, len(x.Chunks)-1, opener(bad, &opens, &read), func(i int, p []byte) error {
				if c := x.Chunks[i]; !bytes.Equal(p, data[c.Off:c.Off+c.Len]) {
					t.Fatalf("%s: chunk %d is handed out with wrong bytes", form, i)
				}
				return nil
			})
			var chunk ErrChunk
			if errors.As(err, &chunk) {
				noticed++
			} else if err != nil {
				t.Errorf("%s: %v is no ErrChunk", form, err)
			}
		}
		if noticed < 25 {
			t.Errorf("%s: only %d of 50 faults were noticed", form, noticed)
		}
	}
}

// What is not the blob's fault is told as it is.
func TestFillErrors(t *testing.T) {
	blob := gzipped(t, realTar(t, 2<<20))
	x, _ := mustBuild(t, blob, Options{})
	gone := errors.New("the registry is gone")
	put := func(int, []byte) error { return nil }
	var chunk ErrChunk
	if err := x.Fill(context.Background(), 0, 0, func(int64) (io.ReadCloser, error) { return nil, gone }, put); !errors.Is(err, gone) || errors.As(err, &chunk) {
		t.Errorf("open: %v", err)
	}
	short := func(off int64) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(blob[off : off+100])), nil }
	if err := x.Fill(context.Background(), 0, 0, short, put); !errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &chunk) {
		t.Errorf("short: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	var opens, read int64
	if err := x.Fill(ctx, 0, 0, opener(blob, &opens, &read), put); !errors.Is(err, context.Canceled) {
		t.Errorf("context: %v", err)
	}
	if err := x.Fill(context.Background(), 0, 0, opener(blob, &opens, &read), func(int, []byte) error { return gone }); !errors.Is(err, gone) {
		t.Errorf("put: %v", err)
	}
}

// PointChunks must be what a look at every chunk finds.
func TestPointChunks(t *testing.T) {
	stream := realTar(t, 4<<20)
	for _, chunk := range []int64{4 << 10, 64 << 10, 512 << 10} {
		x, _ := mustBuild(t, gzipped(t, stream), Options{Spacing: 100_000, ChunkSize: chunk})
		for i, p := range x.Points {
			to := int64(maxSize)
			if i+1 < len(x.Points) {
				to = x.Points[i+1].Stream
			}
			first, last := x.PointChunks(i)
			for c := range x.Chunks {
				from, end := x.streamOf(x.Chunks[c].Off, x.Chunks[c].Off+x.Chunks[c].Len)
				if from == end {
					continue // zeros are nowhere
				}
				if whole := from >= p.Stream && end <= to; whole != (c >= first && c <= last) {
					t.Errorf("chunk %d, in the stream from %d to %d, and point %d, from %d to %d, of which the chunks %d to %d come", c, from, end, i, p.Stream, to, first, last)
				}
			}
		}
	}
}
