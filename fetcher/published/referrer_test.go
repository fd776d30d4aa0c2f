package published

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/origin/origintest"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// A thread of the rig's, for all processes it starts, that lasts as long as the test binary.
		goleak.IgnoreAnyFunction("github.com/docker-quay/docker-quay/test/rig.startOnLastingThread.func1.1"),
		goleak.IgnoreAnyFunction("github.com/docker-quay/docker-quay/test/rig.closeOnSignal"))
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestStoreAndFind on the real registry: what a publisher stores another finds, and nothing that others put beside it does harm.
func TestStoreAndFind(t *testing.T) {
	g, err := rig.ForTest(t).StartRegistry(testContext(t), rig.RegistryOptions{})
	if errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	repo := origintest.Repository(t, g.Addr())
	var layers []ocispec.Descriptor
	var torrents []*Torrent
	for _, n := range []int{300_000, 70_000} {
		_, b := layer(n)
		layers = append(layers, origintest.Push(t, repo, ocispec.MediaTypeImageLayerGzip, b))
		torrents = append(torrents, makeOf(t, n, full))
	}
	image := origintest.PushManifest(t, repo, ocispec.Manifest{Layers: layers})
	query := Query{Subject: image.Digest, Layers: layers}
	find := func(q Query, want ...*Torrent) {
		t.Helper()
		found, err := Find(testContext(t), origintest.Repository(t, g.Addr()), q)
		if len(want) == 0 && !errors.Is(err, ErrNone) || len(want) > 0 && err != nil || !reflect.DeepEqual(found, want) {
			t.Errorf("found %v, %v, want %v", found, err, want)
		}
	}
	find(query)
	for range 2 {
		if err := Store(testContext(t), repo, image, torrents); err != nil {
			t.Fatal(err)
		}
		find(query, torrents...)
	}
	find(Query{Subject: image.Digest, Layers: layers[1:]}, torrents[1])
	find(Query{Subject: digest.FromString("another image"), Layers: layers})

	// Another publisher's trackers come along; the torrents are the same.
	other := makeOf(t, 70_000, func(o *MakeOptions) { full(o); o.Trackers, o.WebSeeds = []string{"http://t9.example/announce"}, nil })
	if err := Store(testContext(t), repo, image, []*Torrent{other}); err != nil {
		t.Fatal(err)
	}
	merged := torrents[1].With([]string{"http://t9.example/announce"}, nil)
	find(query, torrents[0], merged)

	// Entries that lie: another layer's torrent, no torrent, one of another size, one of nothing. And the same in an artifact of another kind.
	lie := func(e ocispec.Descriptor, layer digest.Digest) ocispec.Descriptor {
		e.MediaType, e.Annotations = MediaType, map[string]string{LayerAnnotation: string(layer)}
		return e
	}
	first := origintest.Push(t, repo, MediaType, torrents[0].Encode())
	short := origintest.Push(t, repo, MediaType, makeOf(t, 1000, func(o *MakeOptions) { o.Name = LayerName(layers[0].Digest) }).Encode())
	lies := ocispec.Manifest{ArtifactType: ArtifactType, Subject: &image, Layers: []ocispec.Descriptor{
		lie(first, layers[1].Digest), lie(origintest.Push(t, repo, MediaType, []byte("d4:infodee")), layers[0].Digest), lie(short, layers[0].Digest),
		lie(first, "nonsense"),
	}}
	origintest.PushManifest(t, repo, lies)
	origintest.PushManifest(t, repo, ocispec.Manifest{ArtifactType: "application/vnd.example.other", Subject: &image, Layers: lies.Layers})
	find(query, torrents[0], merged)

	// A fifth torrent of one layer is not taken.
	var many []*Torrent
	for i := range maxPerLayer + 1 {
		many = append(many, makeOf(t, 300_000, func(o *MakeOptions) { o.PieceLength = 16 << 10 << i }))
	}
	if err := Store(testContext(t), repo, image, many); err != nil {
		t.Fatal(err)
	}
	find(query, torrents[0], merged, many[0], many[1], many[2])
}

// TestFindNothingUsable: what is there and of no use is an error that says why.
func TestFindNothingUsable(t *testing.T) {
	desc, _ := layer(1000)
	subject := digest.FromString("image")
	manifest, _ := json.Marshal(ocispec.Manifest{ArtifactType: ArtifactType, Config: ocispec.DescriptorEmptyJSON, Subject: &ocispec.Descriptor{Digest: digest.FromString("other")}, Layers: []ocispec.Descriptor{}})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/referrers/") {
			w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
			d := describe(ocispec.MediaTypeImageManifest, manifest)
			d.ArtifactType = ArtifactType
			json.NewEncoder(w).Encode(ocispec.Index{Manifests: []ocispec.Descriptor{d}})
			return
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Write(manifest)
	}))
	defer s.Close()
	found, err := Find(testContext(t), origintest.Repository(t, s.Listener.Addr().String()), Query{Subject: subject, Layers: []ocispec.Descriptor{desc}})
	if !errors.Is(err, ErrInvalid) || found != nil || !strings.Contains(err.Error(), "another image") {
		t.Errorf("%v, %v", found, err)
	}
}

func TestStoreRefuses(t *testing.T) {
	repo := origintest.Repository(t, "127.0.0.1:1")
	nameless := makeOf(t, 1000, nil)
	nameless.Layer.Digest = ""
	for name, torrents := range map[string][]*Torrent{"none": nil, "no digest": {nameless}, "too many": make([]*Torrent, maxEntries+1)} {
		if err := Store(t.Context(), repo, ocispec.Descriptor{Digest: digest.FromString("x")}, torrents); err == nil || errors.Is(err, origin.ErrUnavailable) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestFromQuay with the answer that a Quay up to 3.3 gives: its own name for the blob, its tracker with a token, private.
func TestFromQuay(t *testing.T) {
	desc, _ := layer(1_000_000)
	made := makeOf(t, 1_000_000, func(o *MakeOptions) { o.Name, o.Private, o.PieceLength = "9f3b1c2e-blob", true, 512<<10 })
	answer := []byte(dict("info", made.MetaInfo.InfoBytes, "announce", "https://quay.test/tracker/announce?jwt=a.b.c", "url-list", "https://storage.test/x?Signature=s",
		"encoding", "UTF-8", "created by", "Quay", "creation date", 1_500_000_000))
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/c1/torrent/team/app/blobs/"+string(desc.Digest) {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", MediaType)
		io.Copy(w, bytes.NewReader(answer))
	}))
	defer s.Close()
	repo := origintest.Repository(t, s.Listener.Addr().String())
	tor, err := FromQuay(testContext(t), repo, desc)
	if err != nil {
		t.Fatal(err)
	}
	if tor.Layer.Digest != desc.Digest || tor.InfoHash != made.InfoHash || !tor.Private || len(tor.Trackers) != 1 || len(tor.WebSeeds) != 1 || tor.Info.PieceLength != 512<<10 {
		t.Errorf("%+v", tor)
	}
	longer := desc
	longer.Size++
	if _, err := FromQuay(testContext(t), repo, longer); !errors.Is(err, ErrInvalid) {
		t.Errorf("another size: %v", err)
	}
	if _, err := FromQuay(testContext(t), repo, ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}); !errors.Is(err, ErrNone) {
		t.Errorf("no torrent: %v", err)
	}
	answer = []byte("<html>")
	if _, err := FromQuay(testContext(t), repo, desc); !errors.Is(err, ErrInvalid) {
		t.Errorf("no torrent in it: %v", err)
	}
}

// FuzzReferrer: a manifest that a registry says holds torrents.
func FuzzReferrer(f *testing.F) {
	d, _ := layer(10)
	m, err := manifest(describe(ocispec.MediaTypeImageManifest, nil), []*Torrent{makeOf(f, 10, full)})
	if err != nil {
		f.Fatal(err)
	}
	text, _ := json.Marshal(m)
	f.Add(text, string(m.Subject.Digest))
	f.Add([]byte(`{"artifactType":"`+ArtifactType+`","subject":{"digest":"`+string(d.Digest)+`"},"layers":[{}]}`), string(d.Digest))
	f.Fuzz(func(t *testing.T, text []byte, subject string) {
		entries, err := parseReferrer(text, digest.Digest(subject))
		if err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatal(err)
		}
		for _, e := range entries {
			if e.Digest.Validate() != nil || e.Size <= 0 || e.Size > MaxSize || len(entries) > maxEntries {
				t.Errorf("%+v", e)
			}
		}
	})
}
