package lazy

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	digest "github.com/opencontainers/go-digest"
)

func TestParseLabels(t *testing.T) {
	a, b, m, toc := digest.FromString("a"), digest.FromString("b"), digest.FromString("m"), digest.FromString("toc")
	for _, c := range []struct {
		name   string
		labels map[string]string
		want   Target
		err    string
	}{
		{
			name: "containerd 2",
			labels: map[string]string{
				"containerd.io/snapshot.ref":                 "sha256:chain",
				"containerd.io/snapshot/cri.image-ref":       "quay.io/a/b:1",
				"containerd.io/snapshot/cri.manifest-digest": m.String(),
				"containerd.io/snapshot/cri.layer-digest":    a.String(),
				"containerd.io/snapshot/cri.image-layers":    a.String() + "," + b.String(),
				"containerd.io/snapshot/stargz/toc.digest":   toc.String(),
			},
			want: Target{Ref: "quay.io/a/b:1", Manifest: m, Layer: a, TOC: toc, Neighbours: []digest.Digest{b}},
		},
		{
			name: "containerd 1.6: no manifest digest",
			labels: map[string]string{
				"containerd.io/snapshot/cri.image-ref":    "quay.io/a/b:1",
				"containerd.io/snapshot/cri.layer-digest": a.String(),
			},
			want: Target{Ref: "quay.io/a/b:1", Layer: a},
		},
		{
			name: "stargz clients",
			labels: map[string]string{
				"containerd.io/snapshot/remote/stargz.reference": "quay.io/a/b:1",
				"containerd.io/snapshot/remote/stargz.digest":    a.String(),
				"containerd.io/snapshot/remote/stargz.layers":    a.String() + "," + b.String(),
			},
			want: Target{Ref: "quay.io/a/b:1", Layer: a, Neighbours: []digest.Digest{b}},
		},
		{
			name:   "a cut list of layers",
			labels: map[string]string{"containerd.io/snapshot/cri.image-ref": "r", "containerd.io/snapshot/cri.layer-digest": a.String(), "containerd.io/snapshot/cri.image-layers": b.String() + ",sha256:12"},
			want:   Target{Ref: "r", Layer: a, Neighbours: []digest.Digest{b}},
		},
		{name: "none", labels: map[string]string{"containerd.io/snapshot.ref": "sha256:chain"}, err: "enable_remote_snapshot_annotations"},
		{
			name:   "malformed",
			labels: map[string]string{"containerd.io/snapshot/cri.image-ref": "r", "containerd.io/snapshot/cri.layer-digest": "sha256:zz"},
			err:    `the layer digest "sha256:zz" in the snapshot's labels is malformed`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseLabels(c.labels)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("got error %v, want one with %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}
