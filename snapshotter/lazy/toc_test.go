package lazy_test

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/lazy"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// quiet is a logger for tests that look at results only.
func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// TestUnpackReasons: every layer that cannot be mounted is refused before anything is mounted, with
// its reason, and leaves no handle open. None of it needs root.
func TestUnpackReasons(t *testing.T) {
	archive := lazytest.Tar(t, lazytest.Entry{Header: tar.Header{Name: "a", Mode: 0o644}, Body: strings.Repeat("hello\n", 9000)})
	good, zstd := lazytest.EStargz(t, archive), lazytest.ZstdChunked(t, archive)
	change := func(l lazytest.Layer, f func(*lazytest.Layer)) lazytest.Layer {
		l.Data = append([]byte(nil), l.Data...)
		m := map[string]string{}
		for k, v := range l.Desc.Annotations {
			m[k] = v
		}
		l.Desc.Annotations = m
		f(&l)
		return l
	}
	other := digest.FromString("other")
	for _, c := range []struct {
		name  string
		layer lazytest.Layer
		down  error
		want  string
	}{
		{name: "plain gzip", layer: lazytest.Gzip(t, archive), want: "the layer has no table of contents (application/vnd.oci.image.layer.v1.tar+gzip)"},
		{name: "registry away", layer: good, down: errors.New("connection refused"), want: "manifest could not be looked up: connection refused"},
		{
			name:  "eStargz that the manifest does not vouch for",
			layer: change(good, func(l *lazytest.Layer) { l.Desc.Annotations = nil }),
			want:  "no table of contents",
		},
		{
			name:  "another table than the manifest's",
			layer: change(good, func(l *lazytest.Layer) { l.Desc.Annotations[estargz.TOCJSONDigestAnnotation] = other.String() }),
			want:  "not " + other.String(),
		},
		{
			name: "another compressed table than the manifest's",
			layer: change(zstd, func(l *lazytest.Layer) {
				l.Desc.Annotations["io.github.containers.zstd-chunked.manifest-checksum"] = other.String()
			}),
			want: "not " + other.String(),
		},
		{
			name:  "annotated, but plain",
			layer: change(lazytest.Gzip(t, archive), func(l *lazytest.Layer) { l.Desc.Annotations[estargz.TOCJSONDigestAnnotation] = other.String() }),
			want:  "neither an eStargz nor a zstd:chunked footer",
		},
		{
			name:  "short",
			layer: change(good, func(l *lazytest.Layer) { l.Desc.Size = 12 }),
			want:  "12 bytes is too short",
		},
		{
			name: "footer points nowhere",
			layer: change(zstd, func(l *lazytest.Layer) {
				copy(l.Data[len(l.Data)-40:], "\xff\xff\xff\xff\xff\xff\xff\x7f")
			}),
			want: "outside the layer",
		},
		{
			name:  "table damaged",
			layer: change(good, func(l *lazytest.Layer) { l.Data[len(l.Data)-80] ^= 1 }),
			want:  "table of contents",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := lazytest.NewImage()
			img.Add(c.layer)
			img.Down(c.down)
			fs, err := lazy.New(lazy.Options{Dir: filepath.Join(t.TempDir(), "chunks"), Layers: img, Log: quiet()})
			if err != nil {
				t.Fatal(err)
			}
			defer fs.Close()
			labels := lazytest.Labels(c.layer)
			err = fs.Mount(context.Background(), t.TempDir(), labels)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got error %v, want one with %q", err, c.want)
			}
			if open, _, _ := img.Counts(""); open != 0 {
				t.Errorf("%d handles are left open", open)
			}
		})
	}
}
