package published

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// TestVerify: when all of a layer is there, it shows whether an index told the truth.
func TestVerify(t *testing.T) {
	l := layerOf(t, 1, "a", "b")
	ctx := context.Background()
	for name, o := range map[string]index.Options{
		"as it is published": {},
		"of other options":   {ChunkSize: 64 << 10, Spacing: 100 << 10},
		"of one chunk":       {ChunkSize: 4 << 20},
	} {
		x, err := index.Build(ctx, bytes.NewReader(l.blob), l.desc, nil, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := Verify(ctx, bytes.NewReader(l.blob), x); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	empty := layerOf(t, 1)
	if err := Verify(ctx, bytes.NewReader(empty.blob), empty.x); err != nil {
		t.Errorf("of nothing: %v", err)
	}

	for name, lie := range map[string]func(x *index.Index){
		"another owner": func(x *index.Index) { x.Entries[1].UID = 0xffff },
		"set-user-ID":   func(x *index.Index) { x.Entries[1].Mode |= 0o4000 },
		"an attribute": func(x *index.Index) {
			x.Entries[1].Xattrs = []index.Xattr{{Name: "security.capability", Value: "x"}}
		},
		"another name": func(x *index.Index) { x.Entries[2].Path = "c" },
		"a file less":  func(x *index.Index) { x.Entries = x.Entries[:2] },
		"a file more": func(x *index.Index) {
			x.Entries = append(x.Entries, index.Entry{Path: "c", Mode: 0o100755, HardLink: -1})
		},
		"a shorter file":  func(x *index.Index) { x.Entries[1].Size-- },
		"files exchanged": func(x *index.Index) { x.Entries[1].Data, x.Entries[2].Data = x.Entries[2].Data, x.Entries[1].Data },
		"a link for a file": func(x *index.Index) {
			x.Entries[2] = index.Entry{Path: "b", HardLink: 1}
		},
		"other contents":      func(x *index.Index) { x.Chunks[0].Sum[0] ^= 1 },
		"contents elsewhere":  func(x *index.Index) { x.Extents[0].Stream++; x.Extents[0].Len-- },
		"another diff ID":     func(x *index.Index) { x.DiffID = digest.FromString("x") },
		"another compression": func(x *index.Index) { x.Compression = index.Zstd; x.Points = x.Points[:1] },
		"chunks of no size": func(x *index.Index) {
			x.Chunks[0].Len--
			x.Chunks[1].Off--
			x.Chunks[1].Len++
		},
	} {
		x := *l.x
		x.Entries, x.Extents, x.Chunks, x.Points = slices.Clone(x.Entries), slices.Clone(x.Extents), slices.Clone(x.Chunks), slices.Clone(x.Points)
		lie(&x)
		if err := Verify(ctx, bytes.NewReader(l.blob), &x); !errors.Is(err, ErrForged) {
			t.Errorf("%s: %v", name, err)
		}
	}

	// That the layer cannot be read, or is another one, says nothing of its index.
	other := layerOf(t, 2, "a", "b")
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	for name, err := range map[string]error{
		"cut off":  Verify(ctx, bytes.NewReader(l.blob[:100]), l.x),
		"another":  Verify(ctx, bytes.NewReader(other.blob), l.x),
		"canceled": Verify(canceled, bytes.NewReader(l.blob), l.x),
	} {
		if err == nil || errors.Is(err, ErrForged) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
