package target

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/docker-quay/docker-quay/plugin/progress"
)

// tiny is an image of one layer; it cannot be targettest's, which imports this package.
type tiny struct {
	ref   reference.Named
	descs [3]ocispec.Descriptor // manifest, config, layer
	blobs map[digest.Digest][]byte
	fail  error
}

func newTiny(t *testing.T) *tiny {
	ref, err := reference.ParseNormalizedNamed("example.test/secret/team/app:1")
	if err != nil {
		t.Fatal(err)
	}
	i := &tiny{ref: ref, blobs: map[digest.Digest][]byte{}}
	for n, mediaType := range []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig, ocispec.MediaTypeImageLayer} {
		b := []byte("{\"n\":\"" + mediaType + "\"}")
		i.descs[n] = ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		i.blobs[i.descs[n].Digest] = b
	}
	return i
}

func (i *tiny) Ref() reference.Named         { return i.ref }
func (i *tiny) Target() ocispec.Descriptor   { return i.descs[0] }
func (i *tiny) Manifest() ocispec.Descriptor { return i.descs[0] }
func (i *tiny) Config() ocispec.Descriptor   { return i.descs[1] }
func (i *tiny) Layers() []ocispec.Descriptor { return i.descs[2:] }
func (i *tiny) Fetch(context.Context) error  { return i.fail }
func (i *tiny) Progress() []progress.Blob    { return nil }
func (i *tiny) Close() error                 { return nil }
func (i *tiny) Open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	if i.fail != nil {
		return io.NopCloser(io.MultiReader(bytes.NewReader(i.blobs[d.Digest][:3]), failing{i.fail})), nil
	}
	return io.NopCloser(bytes.NewReader(i.blobs[d.Digest])), nil
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestMirror: who knows the name gets the image, anybody else learns nothing, and a blob that breaks off never looks
// whole.
func TestMirror(t *testing.T) {
	defer goleak.VerifyNone(t)
	img := newTiny(t)
	m, ctx, err := newMirror(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	defer http.DefaultClient.CloseIdleConnections()
	base := "http://" + m.listener.Addr().String() + "/v2/"
	get := func(method, path string) (int, string, http.Header, error) {
		req, err := http.NewRequest(method, base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, "", nil, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b), resp.Header, err
	}
	layer, manifest := img.descs[2].Digest.String(), img.descs[0].Digest.String()
	for _, c := range []struct {
		method, path string
		want         int
	}{
		{"GET", "", 200},
		{"GET", m.repo + "/manifests/" + manifest, 200},
		{"HEAD", m.repo + "/manifests/" + manifest, 200},
		{"GET", m.repo + "/blobs/" + layer, 200},
		{"HEAD", m.repo + "/blobs/" + layer, 200},
		{"PUT", m.repo + "/manifests/" + manifest, 405},
		{"GET", m.repo + "/blobs/" + digest.FromString("other").String(), 404},
		{"GET", m.repo + "/manifests/1", 404},
		{"GET", m.repo + "/tags/list", 404},
		{"GET", "secret/team/app/manifests/" + manifest, 404},
		{"GET", "app/blobs/" + layer, 404},
		{"GET", "../v2/" + strings.Repeat("0", 32) + "/app/blobs/" + layer, 404},
		{"GET", "_catalog", 404},
	} {
		code, body, header, err := get(c.method, c.path)
		if err != nil || code != c.want {
			t.Errorf("%s %s: %d, %v, want %d", c.method, c.path, code, err, c.want)
		}
		if code == 404 && (strings.Contains(body, "app") || strings.Contains(body, "secret")) {
			t.Errorf("%s %s tells %s", c.method, c.path, body)
		}
		if d := header.Get("Docker-Content-Digest"); code == 200 && c.path != "" && !strings.HasSuffix(c.path, d) {
			t.Errorf("%s %s: digest %s", c.method, c.path, d)
		}
	}
	if ctx.Err() != nil {
		t.Fatalf("the pull was ended: %v", context.Cause(ctx))
	}
	img.fail = errors.New("every peer is away")
	if _, body, _, err := get("GET", m.repo+"/blobs/"+layer); err == nil {
		t.Errorf("a blob that broke off looked whole: %q", body)
	}
	<-ctx.Done()
	if cause := context.Cause(ctx); cause != img.fail {
		t.Errorf("the pull ended with %v", cause)
	}
}
