package origin

import (
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestManifestType(t *testing.T) {
	const image, index = `"config":{},"layers":[]`, `"manifests":[]`
	for _, tc := range []struct{ header, body, want string }{
		{ocispec.MediaTypeImageManifest, `{` + image + `}`, ocispec.MediaTypeImageManifest},
		{ocispec.MediaTypeImageManifest + "; charset=utf-8", `{` + image + `}`, ocispec.MediaTypeImageManifest},
		{dockerList, `{` + index + `}`, dockerList},
		{dockerManifest, `{"mediaType":"` + ocispec.MediaTypeImageManifest + `",` + image + `}`, ocispec.MediaTypeImageManifest},
		{"application/json", `{"mediaType":"` + dockerManifest + `",` + image + `}`, dockerManifest},
		{"", `{` + image + `}`, ocispec.MediaTypeImageManifest},
		{"text/plain", `{` + index + `}`, ocispec.MediaTypeImageIndex},
		{ocispec.MediaTypeImageManifest, `{` + index + `}`, "!"},
		{ocispec.MediaTypeImageIndex, `{` + image + `}`, "!"},
		{ocispec.MediaTypeImageIndex, `{"mediaType":"` + ocispec.MediaTypeImageManifest + `",` + image + `}`, "!"},
		{ocispec.MediaTypeImageManifest, `{` + image + `,` + index + `}`, "!"},
		{ocispec.MediaTypeImageManifest, `{}`, "!"},
		{"", `{}`, "!"},
		{"", `[]`, "!"},
		{dockerSchema1, `{"schemaVersion":1,"fsLayers":[]}`, "?"},
		{"application/vnd.docker.distribution.manifest.v1+prettyjws", `{}`, "?"},
		{"application/vnd.oci.artifact.manifest.v1+json", `{}`, "?"},
		{ocispec.MediaTypeImageManifest, `{"mediaType":"application/x",` + image + `}`, "?"},
	} {
		got, err := manifestType(tc.header, []byte(tc.body))
		switch {
		case tc.want == "?" && !errors.Is(err, ErrUnsupported), tc.want == "!" && (err == nil || errors.Is(err, ErrUnsupported)):
			t.Errorf("%s %s: got %q, %v", tc.header, tc.body, got, err)
		case tc.want != "?" && tc.want != "!" && (err != nil || got != tc.want):
			t.Errorf("%s %s: got %q, %v, want %q", tc.header, tc.body, got, err, tc.want)
		}
	}
}

func TestLifetime(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	for query, want := range map[string]time.Duration{
		"":                            45 * time.Second,
		"X-Amz-Expires=60":            45 * time.Second,
		"X-Amz-Expires=1200":          1185 * time.Second,
		"X-Amz-Expires=604800":        time.Hour,
		"X-Amz-Expires=-5":            45 * time.Second,
		"X-Amz-Expires=0":             0,
		"X-Goog-Expires=20":           15 * time.Second,
		"Expires=1700000060&Sig=x":    45 * time.Second,
		"Expires=1600000000":          0,
		"expires=99999999999":         time.Hour,
		"Expires=soon":                45 * time.Second,
		"se=2023-11-14T22%3A23%3A20Z": 585 * time.Second,
	} {
		if got := lifetime(&url.URL{RawQuery: query}, now); got != want {
			t.Errorf("%q: %v, want %v", query, got, want)
		}
	}
}

func TestParseErrorBody(t *testing.T) {
	for body, want := range map[string]string{
		`{"errors":[{"code":"DENIED","message":"requested access to\nthe resource is denied","detail":[1]}]}`: "DENIED: requested access to the resource is denied",
		`{"errors":[{"code":"DENIED","message":{}}]}`:                                                         "DENIED",
		`{"error_message":"Quay is read-only","status":503}`:                                                  "Quay is read-only",
		`<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>gone</Message></Error>`:                   "NoSuchKey: gone",
		`<html><body>502</body></html>`:                                                                       "",
		`slow down`:                                                                                           "slow down",
		`{"errors":`:                                                                                          "",
		"":                                                                                                    "",
	} {
		code, message := parseErrorBody([]byte(body))
		if got := join(code, message); got != want {
			t.Errorf("%s: got %q, want %q", body, got, want)
		}
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-1/2", "bytes 5-4/*", "bytes */7", "bytes 0-999999999999999999/999999999999999999", "bytes 0-1/1", "BYTES 0-0/1", "bytes 00-01/02"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, total, err := parseContentRange(s)
		if err == nil && (first < 0 || last < first || total >= 0 && last >= total || total < -1) {
			t.Fatalf("%q: %d-%d/%d", s, first, last, total)
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"0", "120", " 5 ", "-1", "1e9", "99999999999999999999", "Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 GMT"} {
		f.Add(s)
	}
	now := time.Unix(1_000_000_000, 0)
	f.Fuzz(func(t *testing.T, s string) {
		d, ok := parseRetryAfter(s, now)
		if d < 0 || ok != (d > 0) {
			t.Fatalf("%q: %v, %v", s, d, ok)
		}
	})
}

func FuzzErrorBody(f *testing.F) {
	for _, s := range []string{`{"errors":[{"code":"A","message":"b"}]}`, "<Error><Code>x</Code></Error>", "\x1b]0;title\a", strings.Repeat("é", 1000), "\xff\xfe", `{"error":"\u202e"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		code, message := parseErrorBody(b)
		for _, s := range []string{code, message} {
			if !utf8.ValidString(s) || utf8.RuneCountInString(s) > 2*maxMessage+2 {
				t.Fatalf("%q", s)
			}
			for _, r := range s {
				if !unicode.IsPrint(r) {
					t.Fatalf("%q holds %U", s, r)
				}
			}
		}
	})
}

func FuzzLifetime(f *testing.F) {
	f.Add("X-Amz-Expires=60")
	f.Add("Expires=1700000000")
	f.Add("se=2030-01-01T00:00:00Z")
	f.Fuzz(func(t *testing.T, q string) {
		if d := lifetime(&url.URL{RawQuery: q}, time.Unix(1_700_000_000, 0)); d < 0 || d > redirectMax {
			t.Fatalf("%q: %v", q, d)
		}
	})
}

func FuzzManifestType(f *testing.F) {
	f.Add(ocispec.MediaTypeImageIndex, []byte(`{"manifests":[]}`))
	f.Add("", []byte(`{"config":{},"layers":[],"mediaType":"x"}`))
	f.Fuzz(func(t *testing.T, header string, body []byte) {
		if got, err := manifestType(header, body); (err == nil) != (kindOf(got) != "") {
			t.Fatalf("%q %q: %q, %v", header, body, got, err)
		}
	})
}
