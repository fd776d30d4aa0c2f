package main

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestMain is the reader as well, as main is.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == readerArgument {
		if err := reader(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	m.Run()
}

// TestMeasure plays every load on a layer of a few pieces, for the sake of the benchmark: all pieces are read, from the holder.
func TestMeasure(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a whole node")
	}
	rig.RequireRoot(t)
	r := rig.ForTest(t)
	const size = 8 * mib
	pieces := int(size / store.PieceSize(size))
	w, err := newWorld(t.Context(), r, link{name: "loopback"}, size)
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range loads {
		t.Run(l.name+" "+l.bulkOf, func(t *testing.T) {
			row, err := w.measure(t.Context(), l, 1)
			if err != nil {
				t.Fatal(err)
			}
			// A download may be over before the second read.
			if !row.OK && row.Reads > 0 || row.First <= 0 || row.P99 < row.P50 || row.Max < row.P99 {
				t.Errorf("figures that cannot be: %+v", row)
			}
			if l.name == "idle" && (row.Reads != pieces-1 || row.Bulk != 0) {
				t.Errorf("%d reads of %d pieces after the first: %+v", row.Reads, pieces-1, row)
			}
			if l.name == "bulk" && row.Bulk <= 0 {
				t.Errorf("the download got nothing: %+v", row)
			}
			if row.FromPeer < 50 {
				t.Errorf("most came from the registry instead of the holder: %+v", row)
			}
		})
	}
	// A reader that got other bytes than the layer's says so.
	w.config.File = w.image.Path(w.image.Layers[1].Digest)
	row, err := w.measure(t.Context(), loads[0], 1)
	if err != nil || row.OK {
		t.Errorf("wrong bytes: %+v, %v", row, err)
	}
}
