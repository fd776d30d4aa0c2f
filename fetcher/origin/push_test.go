package origin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func blobOf(mediaType string, text []byte) (ocispec.Descriptor, []byte) {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}, text
}

// referrerOf makes a manifest that refers to subject.
func referrerOf(subject ocispec.Descriptor, artifactType string, n int) (ocispec.Descriptor, []byte) {
	text, _ := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: artifactType,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{ocispec.DescriptorEmptyJSON}, Subject: &subject,
		Annotations: map[string]string{"n": fmt.Sprint(n)},
	})
	return blobOf(ocispec.MediaTypeImageManifest, text)
}

// referrerSuite is what holds for every registry, with the API and without. api says which it is.
func referrerSuite(t *testing.T, open func(t *testing.T) *Repository, subject ocispec.Descriptor, api bool) {
	r := open(t)
	ctx := testContext(t)
	push := func(d ocispec.Descriptor, text []byte) {
		t.Helper()
		if err := r.Push(ctx, d, text); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time it is there
		d, text := blobOf("application/octet-stream", bytes.Repeat([]byte("pushed"), 50_000))
		push(d, text)
		s, err := r.Open(ctx, d, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(s)
		s.Close()
		if err != nil || !bytes.Equal(got, text) {
			t.Fatalf("it reads back as %s: %v", sum(got), err)
		}
	}
	if list, err := r.Referrers(ctx, subject.Digest, testType); err != nil || len(list) != 0 {
		t.Fatalf("before: %v, %v", list, err)
	}
	push(blobOf(ocispec.MediaTypeEmptyJSON, ocispec.DescriptorEmptyJSON.Data))
	var want []digest.Digest
	for n := range 5 {
		artifactType := testType
		if n == 2 {
			artifactType = "application/vnd.example.other"
		}
		d, text := referrerOf(subject, artifactType, n)
		push(d, text)
		if artifactType == testType {
			want = append(want, d.Digest)
		}
	}
	if !api {
		push(referrerOf(subject, testType, 4)) // again
	}
	list, err := r.Referrers(ctx, subject.Digest, testType)
	if err != nil {
		t.Fatal(err)
	}
	var got []digest.Digest
	for _, d := range list {
		got = append(got, d.Digest)
		if d.ArtifactType != testType || d.Annotations["n"] == "" || d.MediaType != ocispec.MediaTypeImageManifest {
			t.Errorf("%+v", d)
		}
		if _, _, err := r.Manifest(ctx, string(d.Digest)); err != nil {
			t.Error(err)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if list, err := r.Referrers(ctx, subject.Digest, ""); err != nil || len(list) != 5 {
		t.Errorf("of any type: %d, %v", len(list), err)
	}
	_, _, err = r.Manifest(ctx, tagOf(subject.Digest))
	if api != errors.Is(err, ErrNotFound) {
		t.Errorf("the tag: %v", err)
	}
}

// TestPush on the real registry, which has no referrers API, and on one that has it, as different registries do.
func TestPush(t *testing.T) {
	plain := startRegistry(t, false)
	subjectOf := func(n int) ocispec.Descriptor {
		d := plain.desc
		d.Digest = digest.FromString(fmt.Sprint("subject", n)) // a subject need not exist
		return d
	}
	at := func(host string, o Options) func(t *testing.T) *Repository {
		return func(t *testing.T) *Repository { return open(t, newClient(t, o, nil), host+"/test/image") }
	}
	t.Run("tag", func(t *testing.T) { referrerSuite(t, at(plain.host, Options{}), plain.desc, false) })
	t.Run("API", func(t *testing.T) {
		referrerSuite(t, at(startFront(t, plain.host, 0, true), Options{}), subjectOf(1), true)
	})
	t.Run("API, paged, unfiltered", func(t *testing.T) {
		referrerSuite(t, at(startFront(t, plain.host, 2, false), Options{}), subjectOf(2), true)
	})
	t.Run("TLS and a login", func(t *testing.T) {
		secure := startRegistry(t, true)
		certs := []string{certs(t, secure.host, "ca.crt", secure.ca)}
		referrerSuite(t, at(secure.host, Options{HostDirs: certs, DockerConfigDir: dockerConfig(t, secure.host, "u", "p")}), secure.desc, false)
		r := at(secure.host, Options{HostDirs: certs})(t)
		d, text := blobOf("application/octet-stream", []byte("not without a login"))
		if err := r.Push(testContext(t), d, text); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "docker login") {
			t.Errorf("without: %v", err)
		}
	})
	t.Run("what others put into the tag stays", func(t *testing.T) {
		r, subject := at(plain.host, Options{})(t), subjectOf(3)
		foreign := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","annotations":{"a":"b"},"manifests":[` +
			`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + string(plain.desc.Digest) + `","size":` + fmt.Sprint(plain.desc.Size) + `,"artifactType":"application/foreign","x":{"y":1}}]}`
		ep, _ := r.writable(call{})
		if _, err := r.putManifest(testContext(t), ep, call{push: true, patient: true}, tagOf(subject.Digest), ocispec.MediaTypeImageIndex, []byte(foreign)); err != nil {
			t.Fatal(err)
		}
		d, text := referrerOf(subject, testType, 0)
		if err := r.Push(testContext(t), d, text); err != nil {
			t.Fatal(err)
		}
		_, got, err := r.Manifest(testContext(t), tagOf(subject.Digest))
		if err != nil || !bytes.Contains(got, []byte(`"x":{"y":1}`)) || !bytes.Contains(got, []byte(`"annotations":{"a":"b"}`)) || !bytes.Contains(got, []byte(d.Digest)) {
			t.Errorf("%s, %v", got, err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		subject := subjectOf(4)
		r := at(plain.host, Options{})(t)
		var wg sync.WaitGroup
		for n := range 6 {
			wg.Go(func() {
				d, text := referrerOf(subject, testType, n)
				if err := r.Push(testContext(t), d, text); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if list, err := r.Referrers(testContext(t), subject.Digest, testType); err != nil || len(list) != 6 {
			t.Errorf("%d, %v", len(list), err)
		}
	})
	t.Run("an image under the tag", func(t *testing.T) {
		r, subject := at(plain.host, Options{})(t), subjectOf(5)
		ep, _ := r.writable(call{})
		if _, err := r.putManifest(testContext(t), ep, call{push: true, patient: true}, tagOf(subject.Digest), plain.desc.MediaType, plain.manifest); err != nil {
			t.Fatal(err)
		}
		d, text := referrerOf(subject, testType, 0)
		if err := r.Push(testContext(t), d, text); !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another body", func(t *testing.T) {
		d, _ := blobOf("application/octet-stream", []byte("a"))
		if err := at(plain.host, Options{})(t).Push(testContext(t), d, []byte("b")); err == nil {
			t.Error("it was pushed")
		}
	})
}

// TestPushHosts: what is pushed goes to the registry, and there only as hosts.toml lets it.
func TestPushHosts(t *testing.T) {
	plain := startRegistry(t, false)
	mirror := newFake(t, false, nil)
	toml := func(text string) Options {
		return Options{HostDirs: []string{certs(t, plain.host, "hosts.toml", []byte(text))}}
	}
	d, text := blobOf("application/octet-stream", []byte("x"))
	with := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", plain.host, mirror.host())
	if err := open(t, newClient(t, toml(with), nil), plain.host+"/test/image").Push(testContext(t), d, text); err != nil {
		t.Error(err)
	}
	for _, r := range mirror.requests() {
		if r.Method != http.MethodGet {
			t.Errorf("the mirror got %s %s", r.Method, r.URL)
		}
	}
	twice := fmt.Sprintf("server = \"http://%[1]s\"\n[host.\"http://%[1]s\"]\n  capabilities = [\"pull\", \"resolve\"]\n", plain.host)
	if err := open(t, newClient(t, toml(twice), nil), plain.host+"/test/image").Push(testContext(t), d, text); err != nil {
		t.Error(err)
	}
}

// TestPushHostile: registries that lead astray, forget, and fail.
func TestPushHostile(t *testing.T) {
	stolen := make(chan *http.Request, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		stolen <- r
		w.WriteHeader(http.StatusCreated)
	}))
	defer other.Close()
	d, text := blobOf("application/octet-stream", []byte("x"))
	for _, tc := range []struct {
		name     string
		location string // of the upload; "" is a good one
		puts     []int  // what PUT answers, in turn; 201 then
		want     error
	}{
		{"well", "", nil, nil},
		{"upload elsewhere", other.URL + "/up", nil, nil},
		{"upload to a file", "file:///etc/passwd", nil, ErrUnexpected},
		{"no upload", "-", nil, ErrUnexpected},
		{"forgotten once", "", []int{404}, nil},
		{"forgotten always", "", []int{404, 404}, ErrNotFound},
		{"busy", "", []int{503, 502}, nil},
		{"refused", "", []int{403}, ErrDenied},
		{"redirected without its body", "", []int{302}, ErrUnexpected},
	} {
		t.Run(tc.name, func(t *testing.T) {
			puts := tc.puts
			f := newFake(t, false, func(f *fake) {
				f.token = "t1"
				f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
					if scope := r.FormValue("scope"); r.URL.Path == "/token" && !strings.HasSuffix(scope, "repository:test/image:pull,push") {
						t.Errorf("the token is for %q", scope)
					}
					if !strings.Contains(r.URL.Path, "/blobs/uploads/") || r.Header.Get("Authorization") != "Bearer t1" {
						return false
					}
					switch r.Method {
					case http.MethodPost:
						if location := tc.location; location == "" {
							w.Header().Set("Location", r.URL.Path+"5?state=s")
						} else if location != "-" {
							w.Header().Set("Location", location)
						}
						w.WriteHeader(http.StatusAccepted)
					case http.MethodPut:
						body, _ := io.ReadAll(r.Body)
						if string(body) != "x" || r.URL.Query().Get("digest") != string(d.Digest) || r.URL.Query().Get("state") != "s" {
							t.Errorf("%s %q", r.URL, body)
						}
						code := http.StatusCreated
						if len(puts) > 0 {
							code, puts = puts[0], puts[1:]
						}
						w.Header().Set("Location", "/elsewhere")
						w.WriteHeader(code)
					}
					return true
				}
			})
			err := f.open(t, Options{Credentials: login}, nil).Push(testContext(t), d, text)
			if !errors.Is(err, tc.want) || tc.want == nil && err != nil {
				t.Errorf("got %v", err)
			}
		})
	}
	select {
	case r := <-stolen:
		if r.Header.Get("Authorization") != "" {
			t.Error("the credential went elsewhere")
		}
	default:
		t.Error("the other host got nothing")
	}
}
