package published

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// ArtifactType of the referrer that holds the indexes of an image's layers.
	ArtifactType = "application/vnd.docker-quay.index.v1"
	// MediaType of each of its entries: what index.Encode writes.
	MediaType = "application/vnd.docker-quay.layer.index.v1"
	// LayerAnnotation is on each entry: the digest of the layer that the index is of.
	LayerAnnotation = "com.github.docker-quay.index.layer"
)

const (
	// MaxIndex bounds one published index, in bytes: at the usual 0.3 % that of a layer of 10 GiB.
	// It is held in memory, here and while it is pushed.
	MaxIndex = 32 << 20
	// maxFootprint bounds what an index takes of memory while it is decoded, in bytes, see index.Footprint: that
	// of a layer with half a million files, or of 10 GiB. A hostile one needs a thousandth to ask for it.
	maxFootprint = 192 << 20
	// maxEntries bounds the entries of a referrer. The kernel stacks 500 layers at most.
	maxEntries = 512
	// maxManifest bounds a referrer, in bytes: 512 entries have 250 KiB.
	maxManifest = 1 << 20
	// slack is how many bytes an index may have more than its layer. One of a tiny layer is
	// larger than that, one larger than a layer of some size is of no use.
	slack = 64 << 10
)

// Errors of Find; all others are the registry's.
var (
	// ErrNone: no index is published for the layer. It is the ordinary case.
	ErrNone = errors.New("no index is published")
	// ErrInvalid: what is published is no index of the layer.
	ErrInvalid = errors.New("the published index is not usable")
)

// entry is the blob of an index.
type entry struct {
	layer  digest.Digest // that it is said to be of
	digest digest.Digest
	size   int64 // bytes, 1 to MaxIndex
}

func (e entry) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: MediaType, Digest: e.digest, Size: e.size}
}

// encodeManifest is the referrer. It has no date: who publishes the same indexes has the same digest.
func encodeManifest(subject ocispec.Descriptor, entries []entry) ([]byte, error) {
	empty := ocispec.DescriptorEmptyJSON
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: ArtifactType,
		Config:  ocispec.Descriptor{MediaType: empty.MediaType, Digest: empty.Digest, Size: empty.Size},
		Subject: &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	}
	for _, e := range entries {
		d := e.descriptor()
		d.Annotations = map[string]string{
			LayerAnnotation:         e.layer.String(),
			ocispec.AnnotationTitle: fileName(e.layer),
		}
		m.Layers = append(m.Layers, d)
	}
	return json.Marshal(m)
}

func fileName(layer digest.Digest) string {
	return layer.Algorithm().String() + "-" + layer.Encoded() + ".index"
}

// parseManifest reads a manifest that a registry listed among the referrers of subject. Its entries
// are of different layers; a layer's first one counts, and what is of another kind is left out, so
// that there can be more in it one day. Nothing without an error is an artifact of another type.
func parseManifest(text []byte, subject digest.Digest) ([]entry, error) {
	if len(text) > maxManifest {
		return nil, fmt.Errorf("%w: the list of indexes has %d bytes", ErrInvalid, len(text))
	}
	var m struct {
		ArtifactType string                          `json:"artifactType"`
		Subject      *struct{ Digest digest.Digest } `json:"subject"`
		Layers       []json.RawMessage               `json:"layers"` // not parsed before they were counted: "{}" would become fifty times as large
	}
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("%w: the list of indexes: %w", ErrInvalid, err)
	}
	switch {
	case m.ArtifactType != ArtifactType:
		return nil, nil
	case m.Subject == nil || m.Subject.Digest != subject:
		return nil, fmt.Errorf("%w: the list of indexes is of another image", ErrInvalid)
	case len(m.Layers) > maxEntries:
		return nil, fmt.Errorf("%w: the list of indexes has %d entries", ErrInvalid, len(m.Layers))
	}
	var entries []entry
	seen := map[digest.Digest]bool{}
	for _, raw := range m.Layers {
		var d ocispec.Descriptor
		if err := json.Unmarshal(raw, &d); err != nil {
			return nil, fmt.Errorf("%w: the list of indexes: %w", ErrInvalid, err)
		}
		e := entry{layer: digest.Digest(d.Annotations[LayerAnnotation]), digest: d.Digest, size: d.Size}
		usable := d.MediaType == MediaType && e.size > 0 && e.size <= MaxIndex && e.digest.Validate() == nil && e.layer.Validate() == nil
		if usable && !seen[e.layer] {
			seen[e.layer] = true
			entries = append(entries, e)
		}
	}
	return entries, nil
}
