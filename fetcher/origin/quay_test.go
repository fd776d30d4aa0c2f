package origin

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

// TestQuayTorrent: the endpoint of a Quay that still makes torrents, and of registries that do not have it.
func TestQuayTorrent(t *testing.T) {
	layer := newContent().layerDesc.Digest
	answer := func(code int, mediaType, body string) func(*fake) {
		return func(f *fake) {
			f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if r.URL.Path != "/c1/torrent/"+f.repo+"/blobs/"+string(layer) {
					return false
				}
				if user, secret, _ := r.BasicAuth(); user != "user" || secret != "secret-of-user" {
					w.WriteHeader(http.StatusForbidden)
					return true
				}
				w.Header().Set("Content-Type", mediaType)
				w.WriteHeader(code)
				io.WriteString(w, body)
				return true
			}
		}
	}
	for _, tc := range []struct {
		name  string
		vices func(*fake)
		o     Options
		want  error
	}{
		{"there", answer(200, "application/x-bittorrent", "d4:infodee"), Options{Credentials: login}, nil},
		{"without a login", answer(200, "application/x-bittorrent", "d4:infodee"), Options{}, ErrDenied},
		{"a later Quay", answer(406, "text/plain", ""), Options{Credentials: login}, ErrNotFound},
		{"a front page", answer(200, "text/html; charset=utf-8", "<html>"), Options{Credentials: login}, ErrNotFound},
		{"too large", answer(200, "application/x-bittorrent", strings.Repeat("x", 101)), Options{Credentials: login}, ErrMismatch},
		{"another registry", nil, Options{Credentials: login}, ErrNotFound},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake(t, false, tc.vices)
			r := f.open(t, tc.o, nil)
			text, err := r.QuayTorrent(testContext(t), layer, 100)
			if !errors.Is(err, tc.want) || tc.want == nil && (err != nil || string(text) != "d4:infodee") {
				t.Errorf("%q, %v", text, err)
			}
			if r.Access() != "" {
				t.Errorf("it says of the image that it is %q", r.Access())
			}
		})
	}
}

// TestWebSeed: only what anybody gets without a token is one.
func TestWebSeed(t *testing.T) {
	for _, tc := range []struct {
		name  string
		vices func(*fake)
		want  bool
	}{
		{"open", nil, true},
		{"signed redirects", func(f *fake) { f.redirect = true }, true},
		{"a token for everybody", func(f *fake) { f.token = "t" }, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake(t, false, tc.vices)
			r := f.open(t, Options{Credentials: login}, nil)
			u, err := r.WebSeed(testContext(t), f.layerDesc.Digest)
			want := ""
			if tc.want {
				want = "http://" + f.host() + "/v2/" + f.repo + "/blobs/" + string(f.layerDesc.Digest)
			}
			if err != nil || u != want {
				t.Errorf("%q, %v", u, err)
			}
			for _, req := range f.requests() {
				if req.Header.Get("Authorization") != "" {
					t.Error("it was asked with a login")
				}
			}
		})
	}
}
