package index

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"

	"github.com/opencontainers/go-digest"
)

// greedy is a valid index, of a few hundred KiB when it is encoded, that takes much memory.
func greedy(entries, points int) *Index {
	x := &Index{
		Blob: digest.FromString("blob"), BlobSize: 1 << 30, DiffID: digest.FromString("diff"), Compression: Gzip,
		DataSize: Align, Chunks: []Chunk{{Len: Align}}, Extents: []Extent{{Len: 1}},
		Entries: []Entry{{Mode: 0o40755, HardLink: -1}},
	}
	for i := range entries {
		x.Entries = append(x.Entries, Entry{Path: fmt.Sprintf("%07d", i), Mode: 0o100644, HardLink: -1})
	}
	for i := range points {
		p := Point{Blob: int64(i) * 100, Stream: int64(i) * history}
		if i > 0 {
			p.Raw, p.Window = true, make([]byte, history)
		}
		x.Points = append(x.Points, p)
	}
	return x
}

// TestFootprint: what Decode takes was told before.
func TestFootprint(t *testing.T) {
	real, _ := mustBuild(t, gzipped(t, realTar(t, 4<<20)), Options{Spacing: 64 << 10})
	for name, x := range map[string]*Index{
		"real": real, "many entries": greedy(100_000, 1), "many windows": greedy(1, 1000), "small": greedy(1, 1),
	} {
		var b bytes.Buffer
		if err := Encode(&b, x); err != nil {
			t.Fatal(err)
		}
		told, err := Footprint(b.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		var names int64
		for i := range x.Entries {
			names += 4 * int64(len(x.Entries[i].Path)) // a string and its place among the directories
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := Decode(bytes.NewReader(b.Bytes())); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		took := int64(after.TotalAlloc - before.TotalAlloc)
		const zstds, reading = 2 << 20, 6 // the decoder, and what ReadAll leaves behind as it grows
		if most := told + names + zstds + reading*int64(b.Len()); took > most {
			t.Errorf("%s: it took %d bytes, %d were told", name, took, told)
		}
		if told < took/4-zstds {
			t.Errorf("%s: %d bytes were told, it took %d", name, told, took)
		}
		t.Logf("%s: encoded %d, told %d, took %d", name, b.Len(), told, took)
		for _, n := range []int{0, 10, b.Len() - 1} {
			if _, err := Footprint(b.Bytes()[:n]); err == nil {
				t.Errorf("%s: cut off at %d it is one still", name, n)
			}
		}
	}
}
