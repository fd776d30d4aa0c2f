package api

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// TestPeers: the report of a node without neighbours passes the socket whole, with the
// blobs of a session in it.
func TestPeers(t *testing.T) {
	w := newWorld(t)
	s := w.open()
	if err := s.Fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	all, err := w.client.Peers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(all.Blobs) != len(s.Image.Layers)+1 || all.Node.ID != "" { // the configuration is a blob, too
		t.Errorf("%+v", all)
	}
	layer := s.Image.Layers[0]
	named, err := w.client.Peers(t.Context(), layer.Digest, digest.FromString("none"))
	if err != nil || len(named.Blobs) != 1 {
		t.Fatalf("%+v, %v", named, err)
	}
	if b := named.Blobs[0]; b.Digest != layer.Digest || b.Size != layer.Size || b.Have != layer.Size || b.State != fetcher.Complete ||
		b.FromOrigin != layer.Size || !strings.Contains(b.Image, "team/app") {
		t.Errorf("%+v", b)
	}
}

// TestPeersRefuses: what is no digest, and too many of them.
func TestPeersRefuses(t *testing.T) {
	st, err := store.Open(store.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	f, err := fetcher.New(t.Context(), fetcher.Options{Store: st})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := NewServer(ServerOptions{Fetcher: f})
	defer s.Close()
	ask := func(query string) (int, string) {
		w := httptest.NewRecorder()
		s.mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/quay/v1/peers"+query, nil))
		return w.Code, w.Body.String()
	}
	one := "digest=" + digest.FromString("x").String()
	for query, want := range map[string]struct {
		code int
		says string
	}{
		"":                      {http.StatusOK, `"blobs":[]`},
		"?" + one:               {http.StatusOK, `"blobs":[]`},
		"?digest=sha256:zz":     {http.StatusBadRequest, "is no digest"},
		"?digest=../etc/passwd": {http.StatusBadRequest, "is no digest"},
		"?" + strings.Repeat(one+"&", fetcher.MaxReportDigests+1): {http.StatusBadRequest, "513 blobs at once"},
	} {
		if code, body := ask(query); code != want.code || !strings.Contains(body, want.says) {
			t.Errorf("%.40s: %d %s", query, code, body)
		}
	}
}
