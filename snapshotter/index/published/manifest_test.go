package published

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

var (
	subject = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("image"), Size: 5}
	one     = entry{layer: digest.FromString("layer 1"), digest: digest.FromString("index 1"), size: 1}
	two     = entry{layer: digest.FromString("layer 2"), digest: digest.FromString("index 2"), size: MaxIndex}
)

// TestManifest is what lies in a registry, to the byte: other programs read it, and its digest must not change.
func TestManifest(t *testing.T) {
	text, err := encodeManifest(subject, []entry{one, two})
	if err != nil {
		t.Fatal(err)
	}
	const layer = `{"mediaType":"application/vnd.docker-quay.layer.index.v1","digest":"%s","size":%d,"annotations":{` +
		`"com.github.docker-quay.index.layer":"%s","org.opencontainers.image.title":"%s.index"}}`
	title := func(e entry) string { return strings.Replace(e.layer.String(), ":", "-", 1) }
	want := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",` +
		`"artifactType":"application/vnd.docker-quay.index.v1",` +
		`"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},` +
		`"layers":[` + fmt.Sprintf(layer, one.digest, one.size, one.layer, title(one)) + `,` + fmt.Sprintf(layer, two.digest, two.size, two.layer, title(two)) + `],` +
		`"subject":{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + subject.Digest.String() + `","size":5}}`
	if string(text) != want {
		t.Errorf("got  %s\nwant %s", text, want)
	}
	if got, err := parseManifest(text, subject.Digest); err != nil || !slices.Equal(got, []entry{one, two}) {
		t.Errorf("it is read as %v, %v", got, err)
	}
}

// TestParse is what is believed of the manifest of a referrer.
func TestParse(t *testing.T) {
	type change func(m *ocispec.Manifest)
	entryOf := func(f func(d *ocispec.Descriptor)) change {
		return func(m *ocispec.Manifest) { f(&m.Layers[0]) }
	}
	both, second := []entry{one, two}, []entry{two}
	for _, c := range []struct {
		name   string
		change change
		want   []entry
		err    error
	}{
		{"as it should be", func(*ocispec.Manifest) {}, both, nil},
		{"of another type", func(m *ocispec.Manifest) { m.ArtifactType = "application/vnd.example" }, nil, nil},
		{"of no type", func(m *ocispec.Manifest) { m.ArtifactType = "" }, nil, nil},
		{"of another image", func(m *ocispec.Manifest) { m.Subject.Digest = digest.FromString("other") }, nil, ErrInvalid},
		{"of no image", func(m *ocispec.Manifest) { m.Subject = nil }, nil, ErrInvalid},
		{"too many entries", func(m *ocispec.Manifest) {
			for range maxEntries {
				m.Layers = append(m.Layers, m.Layers[0])
			}
		}, nil, ErrInvalid},
		{"no entries", func(m *ocispec.Manifest) { m.Layers = nil }, nil, nil},
		{"a layer twice: the first counts", func(m *ocispec.Manifest) {
			m.Layers = append(m.Layers, m.Layers[0])
			m.Layers[2].Digest = digest.FromString("other")
		}, both, nil},
		{"an entry of another kind", entryOf(func(d *ocispec.Descriptor) { d.MediaType = "text/plain" }), second, nil},
		{"an entry of no layer", entryOf(func(d *ocispec.Descriptor) { d.Annotations = nil }), second, nil},
		{"an entry of nonsense", entryOf(func(d *ocispec.Descriptor) { d.Annotations[LayerAnnotation] = "sha256:../../etc" }), second, nil},
		{"an entry without a digest", entryOf(func(d *ocispec.Descriptor) { d.Digest = "" }), second, nil},
		{"an empty entry", entryOf(func(d *ocispec.Descriptor) { d.Size = 0 }), second, nil},
		{"an entry of less than nothing", entryOf(func(d *ocispec.Descriptor) { d.Size = -1 }), second, nil},
		{"an entry that is too large", entryOf(func(d *ocispec.Descriptor) { d.Size = MaxIndex + 1 }), second, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			text, err := encodeManifest(subject, both)
			if err != nil {
				t.Fatal(err)
			}
			var m ocispec.Manifest
			if err := json.Unmarshal(text, &m); err != nil {
				t.Fatal(err)
			}
			c.change(&m)
			if text, err = json.Marshal(m); err != nil {
				t.Fatal(err)
			}
			got, err := parseManifest(text, subject.Digest)
			if !errors.Is(err, c.err) || c.err == nil && err != nil || !slices.Equal(got, c.want) {
				t.Errorf("%v, %v, want %v, %v", got, err, c.want, c.err)
			}
		})
	}
	for _, text := range []string{"", "{", "[]", `{"artifactType":1}`, `{"artifactType":"` + ArtifactType + `","layers":{}}`, strings.Repeat(" ", maxManifest+1)} {
		if got, err := parseManifest([]byte(text), subject.Digest); !errors.Is(err, ErrInvalid) {
			t.Errorf("%.80q: %v, %v", text, got, err)
		}
	}
}

// TestWorthReading: how much of a list is read, and in which order.
func TestWorthReading(t *testing.T) {
	d := func(n int, artifactType string) ocispec.Descriptor {
		return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType, Digest: digest.FromString(fmt.Sprint(n)), Size: 1000}
	}
	index := d(3, ArtifactType)
	index.MediaType = ocispec.MediaTypeImageIndex
	large := d(4, ArtifactType)
	large.Size = maxManifest + 1
	for _, c := range []struct {
		name       string
		list, want []ocispec.Descriptor
	}{
		{"the last first", []ocispec.Descriptor{d(1, ArtifactType), d(2, ArtifactType)}, []ocispec.Descriptor{d(2, ArtifactType), d(1, ArtifactType)}},
		{"who says nothing at the end", []ocispec.Descriptor{d(1, ArtifactType), d(2, "")}, []ocispec.Descriptor{d(1, ArtifactType), d(2, "")}},
		{"no indexes of images, nothing large", []ocispec.Descriptor{index, large}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := worthReading(c.list)
			if !slices.EqualFunc(got, c.want, func(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest }) {
				t.Errorf("%v, want %v", got, c.want)
			}
		})
	}
	var many []ocispec.Descriptor
	for n := range 100 {
		many = append(many, d(n, ArtifactType))
	}
	if got := worthReading(many); len(got) != maxReferrers || got[0].Digest != many[99].Digest {
		t.Errorf("%d of many", len(got))
	}
}

// TestEncode: what nobody would use is not published.
func TestEncode(t *testing.T) {
	l := layerOf(t, 1, "a")
	p := l.published(t)
	if p.Digest != l.desc.Digest || p.Descriptor().Digest != digest.FromBytes(p.Text) || p.Descriptor().MediaType != MediaType {
		t.Errorf("%+v", p.Descriptor())
	}
	again := layerOf(t, 1, "a").published(t)
	if again.Descriptor().Digest != p.Descriptor().Digest {
		t.Error("the same layer gives another index")
	}
	for name, change := range map[string]func(x *index.Index){
		"no diff ID":            func(x *index.Index) { x.DiffID = "" },
		"larger than the layer": func(x *index.Index) { x.BlobSize = 10; x.Points = x.Points[:1]; x.Entries = manyEntries(x) },
	} {
		x := *l.x
		change(&x)
		if _, err := Encode(&x); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// manyEntries are an index's with enough more for it to be larger than a layer of no size may have.
func manyEntries(x *index.Index) []index.Entry {
	all := slices.Clone(x.Entries)
	for i := range 10_000 {
		e := index.Entry{Path: fmt.Sprintf("z%05d-%s", i, digest.FromString(fmt.Sprint(i)).Encoded()), Mode: 0o100644, HardLink: -1}
		all = append(all, e)
	}
	return all
}

// TestOwnTable: both formats are told by the manifest, in all spellings.
func TestOwnTable(t *testing.T) {
	for annotation, want := range map[string]string{
		"containerd.io/snapshot/stargz/toc.digest":            "eStargz",
		"io.github.containers.zstd-chunked.manifest-checksum": "zstd:chunked",
		"io.containers.zstd-chunked.manifest-checksum":        "zstd:chunked",
		"org.opencontainers.image.title":                      "",
	} {
		if got := OwnTable(ocispec.Descriptor{Annotations: map[string]string{annotation: "sha256:…"}}); got != want {
			t.Errorf("%s: %q, want %q", annotation, got, want)
		}
	}
}

// FuzzManifest: a manifest from anybody. What is read of it is within bounds, and comes back as it is.
func FuzzManifest(f *testing.F) {
	good, err := encodeManifest(subject, []entry{one, two})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"artifactType":"` + ArtifactType + `","subject":{"digest":"` + subject.Digest.String() + `"},"layers":[{},null,[],1]}`))
	f.Add([]byte(`{"ARTIFACTTYPE":"` + ArtifactType + `","subject":null}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		entries, err := parseManifest(text, subject.Digest)
		if err != nil {
			if entries != nil || !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v, %v", entries, err)
			}
			return
		}
		if len(entries) == 0 {
			return
		}
		if len(entries) > maxEntries {
			t.Fatalf("%d entries", len(entries))
		}
		for _, e := range entries {
			if e.size <= 0 || e.size > MaxIndex || e.digest.Validate() != nil || e.layer.Validate() != nil {
				t.Fatalf("%+v", e)
			}
		}
		again, err := encodeManifest(subject, entries)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := parseManifest(again, subject.Digest); err != nil || !slices.Equal(got, entries) {
			t.Fatalf("%v became %v, %v", entries, got, err)
		}
	})
}
