package snapshotter

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// TestEROFSTreesAreEqual: what a container sees of layers of any kind is what it would see of them unpacked.
func TestEROFSTreesAreEqual(t *testing.T) {
	lower, upper := trees(t)
	type maker func(testing.TB, []byte) lazytest.Layer
	for _, c := range []struct {
		name         string
		lower, upper maker
		served       [2]string
	}{
		{"eStargz on eStargz", lazytest.EStargz, lazytest.EStargz, [2]string{"lazy", "lazy"}},
		{"zstd chunked on zstd chunked", lazytest.ZstdChunked, lazytest.ZstdChunked, [2]string{"lazy", "lazy"}},
		{"plain on eStargz", lazytest.EStargz, lazytest.Gzip, [2]string{"lazy", "eager"}},
		{"plain on plain", lazytest.Gzip, lazytest.Gzip, [2]string{"eager", "eager"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := lazytest.NewImage()
			l, u := c.lower(t, lower), c.upper(t, upper)
			img.Add(l)
			img.Add(u)
			let := img.Hold()
			if c.served[1] == "eager" {
				let()
			}
			r := newEROFS(t, img)
			chain, lazily := r.pull(l, u)
			if d := cmp.Diff([]bool{true, true}, lazily); d != "" {
				t.Error("which layers are ours:", d)
			}
			want := describe(t, unpacked(t, l, u))
			see := func(when string) {
				r.in(chain[1], func(dir string) {
					if d := cmp.Diff(want, describe(t, dir)); d != "" {
						t.Error(when, d)
					}
				})
			}
			see("at first:")
			if c.served[1] != "eager" {
				let()
			}
			eventually(t, func() bool { st := r.layers.Status(); return st.Mounts == 2 && st.Data == 2 })
			see("when complete:")
			for i, layer := range []lazytest.Layer{l, u} {
				if n := countLines(r.log.String(), "served="+c.served[i], layer.Desc.Digest.String()); n != 1 {
					t.Errorf("layer %d has %d lines in the log with %s, want 1", i, n, c.served[i])
				}
			}
		})
	}
}
