package lazy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/stargz-snapshotter/estargz"
	digest "github.com/opencontainers/go-digest"
)

// Labels of stargz-snapshotter's own clients (ctr-remote, nerdctl and k3s before
// they moved to containerd's cri.* labels). They carry no manifest digest.
const (
	oldRefLabel    = "containerd.io/snapshot/remote/stargz.reference"
	oldDigestLabel = "containerd.io/snapshot/remote/stargz.digest"
	oldLayersLabel = "containerd.io/snapshot/remote/stargz.layers"
)

// diffIDLabel is that of containerd 2.4 and later.
const diffIDLabel = "containerd.io/snapshot/diff-id"

// errNoSource says that the labels do not tell which layer is meant.
var errNoSource = errors.New("containerd did not say which image the layer belongs to; " +
	"set enable_remote_snapshot_annotations = \"true\" in the exports of its proxy plugin, and pull without --local")

// Target is what the labels of a snapshot say about its layer.
type Target struct {
	Ref        string          // name of the image
	Manifest   digest.Digest   // of the image; "" when not told
	Layer      digest.Digest   // of the compressed blob
	DiffID     digest.Digest   // of its tar; "" when not told
	TOC        digest.Digest   // of the table of contents; "" when not told
	Neighbours []digest.Digest // the layers above this one that will be asked for next
}

// ParseLabels reads the labels of containerd 1.6 to 2.x and of stargz-snapshotter's
// clients. Digests are checked for their form.
func ParseLabels(labels map[string]string) (Target, error) {
	var t Target
	t.Ref = first(labels, snapshotters.TargetRefLabel, oldRefLabel)
	layer := first(labels, snapshotters.TargetLayerDigestLabel, oldDigestLabel)
	if t.Ref == "" || layer == "" {
		return Target{}, errNoSource
	}
	for _, d := range []struct {
		to   *digest.Digest
		what string
		text string
	}{
		{&t.Layer, "layer digest", layer},
		{&t.Manifest, "manifest digest", labels[snapshotters.TargetManifestDigestLabel]},
		{&t.DiffID, "diff ID", labels[diffIDLabel]},
		{&t.TOC, "digest of the table of contents", labels[estargz.TOCJSONDigestAnnotation]},
	} {
		if d.text == "" {
			continue
		}
		parsed, err := digest.Parse(d.text)
		if err != nil {
			return Target{}, fmt.Errorf("the %s %q in the snapshot's labels is malformed: %w", d.what, d.text, err)
		}
		*d.to = parsed
	}
	for s := range strings.SplitSeq(first(labels, snapshotters.TargetImageLayersLabel, oldLayersLabel), ",") {
		if d, err := digest.Parse(s); err == nil && d != t.Layer {
			t.Neighbours = append(t.Neighbours, d)
		}
	}
	return t, nil
}

func first(labels map[string]string, keys ...string) string {
	for _, k := range keys {
		if v := labels[k]; v != "" {
			return v
		}
	}
	return ""
}
