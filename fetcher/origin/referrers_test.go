package origin

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const testType = "application/vnd.example.test.v1"

// referrersFront gives a registry the referrers API that it lacks.
type referrersFront struct {
	*httputil.ReverseProxy
	page   int  // entries on a page, 0 for all on one
	filter bool // by artifactType, else all come

	mu   sync.Mutex
	list map[digest.Digest][]ocispec.Descriptor
}

func startFront(t *testing.T, host string, page int, filter bool) string {
	f := &referrersFront{
		ReverseProxy: httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: host}),
		page:         page, filter: filter, list: map[digest.Digest][]ocispec.Descriptor{},
	}
	f.ErrorLog = quiet
	// The registry makes its Location from the Host that it sees.
	director := f.Director
	f.Director = func(r *http.Request) { director(r); r.Header.Set("X-Forwarded-Host", r.Host) }
	s := httptest.NewServer(f)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func (f *referrersFront) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, subject, ok := strings.Cut(r.URL.Path, "/referrers/"); ok {
		f.serveList(w, r, digest.Digest(subject))
		return
	}
	if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		var m referrer
		if json.Unmarshal(body, &m) == nil && m.Subject != nil {
			f.mu.Lock()
			desc := ocispec.Descriptor{MediaType: r.Header.Get("Content-Type"), Digest: digest.FromBytes(body), Size: int64(len(body))}
			f.list[m.Subject.Digest] = append(f.list[m.Subject.Digest], m.describe(desc))
			f.mu.Unlock()
			w.Header().Set("OCI-Subject", string(m.Subject.Digest))
		}
	}
	f.ReverseProxy.ServeHTTP(w, r)
}

func (f *referrersFront) serveList(w http.ResponseWriter, r *http.Request, subject digest.Digest) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := slices.Clone(f.list[subject])
	want := r.URL.Query().Get("artifactType")
	if f.filter && want != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
		all = slices.DeleteFunc(all, func(d ocispec.Descriptor) bool { return d.ArtifactType != want })
	}
	var at int
	fmt.Sscan(r.URL.Query().Get("at"), &at)
	all = all[min(at, len(all)):]
	if f.page > 0 && len(all) > f.page {
		all = all[:f.page]
		w.Header().Set("Link", fmt.Sprintf(`<%s?artifactType=%s&at=%d>; rel="next"`, r.URL.Path, url.QueryEscape(want), at+f.page))
	}
	if all == nil {
		all = []ocispec.Descriptor{}
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	json.NewEncoder(w).Encode(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: all})
}

// TestReferrersHostile: lists that lie, and hosts that answer all paths.
func TestReferrersHostile(t *testing.T) {
	subject := newContent().desc.Digest
	index := func(entries ...string) string {
		return `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[` + strings.Join(entries, ",") + `]}`
	}
	entry := func(n int) string {
		return fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"%s","size":5,"artifactType":%q}`, digest.FromString(fmt.Sprint(n)), testType)
	}
	many := make([]string, 2000)
	for n := range many {
		many[n] = entry(n)
	}
	oci := http.Header{"Content-Type": {ocispec.MediaTypeImageIndex}}
	for _, tc := range []struct {
		name   string
		status int
		header http.Header
		body   string
		want   int
		err    error
	}{
		{"a page of HTML", 200, http.Header{"Content-Type": {"text/html"}}, "<html>", 0, nil},
		{"405", 405, nil, "", 0, nil},
		{"too many", 200, oci, index(many...), maxReferrers, nil},
		{"not JSON", 200, oci, "{", 0, ErrMismatch},
		{"an image", 200, oci, `{"mediaType":"application/vnd.oci.image.manifest.v1+json"}`, 0, ErrMismatch},
		{"entries that are none", 200, oci, index(`5`, `{}`, `{"digest":"x"}`, `{"digest":"`+string(subject)+`","size":-1}`, entry(1)), 1, nil},
		{"without types", 200, oci, index(`{"digest":"`+string(subject)+`","size":1}`, `{"digest":"`+string(subject)+`","size":1,"artifactType":"application/vnd.oci.empty.v1+json"}`), 2, nil},
		{"larger than allowed", 200, oci, index() + strings.Repeat(" ", maxManifest), 0, ErrTooLarge},
		{"next page elsewhere", 200, http.Header{"Content-Type": oci["Content-Type"], "Link": {`<http://203.0.113.1/v2/>; rel="next"`}}, index(entry(1)), 0, ErrUnexpected},
		{"next page forever", 200, http.Header{"Content-Type": oci["Content-Type"], "Link": {`<?again>; rel="next"`}}, index(entry(1)), maxPages, nil},
		{"denied", 403, nil, "", 0, ErrDenied},
		{"gone", 500, nil, "", 0, ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake(t, false, status("/referrers/", tc.status, tc.header, tc.body))
			list, err := f.open(t, Options{}, nil).Referrers(testContext(t), subject, testType)
			if !errors.Is(err, tc.err) || tc.err == nil && err != nil || len(list) != tc.want {
				t.Errorf("%d, %v", len(list), err)
			}
		})
	}
}

func TestTagOf(t *testing.T) {
	for d, want := range map[digest.Digest]string{
		digest.FromString("x"):        "sha256-" + digest.FromString("x").Encoded(),
		digest.SHA512.FromString("x"): "sha512-" + digest.SHA512.FromString("x").Encoded()[:64],
	} {
		if got := tagOf(d); got != want {
			t.Errorf("%s: %s", d, got)
		}
	}
}

// FuzzReferrers: a list and a Link header of a registry.
func FuzzReferrers(f *testing.F) {
	f.Add([]byte(`{"manifests":[{"digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":1}],"annotations":{}}`), `<x?y>; rel="next"`)
	f.Add([]byte(`{"manifests":[1,null,{}]}`), `<http://h/x>; rel=next`)
	from := &url.URL{Scheme: "https", Host: "example.com", Path: "/v2/"}
	f.Fuzz(func(t *testing.T, text []byte, link string) {
		if next, err := nextPage(link, from); err == nil && next != nil && (next.Host != from.Host || next.Scheme != from.Scheme) {
			t.Errorf("%q leads to %s", link, next)
		}
		var x referrerIndex
		if x.parse(text) != nil {
			return
		}
		for _, d := range x.filter(testType) {
			if d.Digest.Validate() != nil || d.Size < 0 {
				t.Errorf("%+v", d)
			}
		}
		// What is written has all that was read, and the new entry.
		d := ocispec.Descriptor{Digest: digest.FromString("new"), Size: 1}
		out, err := x.with(d)
		if err != nil {
			t.Fatal(err)
		}
		var y referrerIndex
		if err := y.parse(out); err != nil || len(y.entries) != len(x.entries)+1 || !y.has(d.Digest) {
			t.Errorf("%s: %v", out, err)
		}
	})
}
