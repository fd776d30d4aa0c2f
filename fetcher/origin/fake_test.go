package origin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/rand"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// content is what a registry under test serves: one image of one layer.
type content struct {
	layer, manifest []byte
	layerDesc, desc ocispec.Descriptor
}

// newContent makes it from a fixed seed: all tests see the same bytes.
func newContent() content {
	var c content
	c.layer = make([]byte, 300_000)
	rand.New(rand.NewSource(1)).Read(c.layer)
	c.layerDesc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(c.layer), Size: int64(len(c.layer))}
	c.manifest, _ = json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{c.layerDesc},
	})
	c.desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(c.manifest), Size: int64(len(c.manifest))}
	return c
}

// fake is a registry whose every vice can be had alone. The zero value of a field is virtue.
type fake struct {
	content
	server *httptest.Server
	repo   string // "test/image"

	cut         int64                                         // bytes of a blob's body after which the connection is cut
	noRanges    bool                                          // 200 to all
	chunked     bool                                          // no Content-Length
	redirect    bool                                          // blobs by a signed URL
	serves      int                                           // how many requests a signed URL serves; 0 is all
	storage     *httptest.Server                              // where signed URLs lead; nil is the registry itself
	token       string                                        // the bearer token that is valid now; "" is no authentication
	tokenStatus int                                           // what the token service answers when not 0
	intercept   func(http.ResponseWriter, *http.Request) bool // true: it has answered

	mu     sync.Mutex
	seen   []*http.Request
	signed map[string]int // signature → requests left
}

func newFake(t *testing.T, tls bool, vices func(*fake)) *fake {
	t.Helper()
	f := &fake{content: newContent(), repo: "test/image", signed: map[string]int{}}
	if vices != nil {
		vices(f)
	}
	f.server = httptest.NewUnstartedServer(f)
	f.server.Config.ErrorLog = quiet
	if tls {
		f.server.StartTLS()
	} else {
		f.server.Start()
	}
	t.Cleanup(f.server.Close)
	return f
}

func (f *fake) host() string { return f.server.Listener.Addr().String() }

func (f *fake) requests() []*http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*http.Request(nil), f.seen...)
}

func (f *fake) count(part string) (n int) {
	for _, r := range f.requests() {
		if strings.Contains(r.URL.Path, part) {
			n++
		}
	}
	return n
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.seen = append(f.seen, r)
	token := f.token
	f.mu.Unlock()
	if f.intercept != nil && f.intercept(w, r) {
		return
	}
	base := "/v2/" + f.repo + "/"
	switch {
	case r.URL.Path == "/token":
		if f.tokenStatus != 0 {
			w.WriteHeader(f.tokenStatus)
			fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"who\nare you"}]}`)
			return
		}
		json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token})
	case strings.HasPrefix(r.URL.Path, "/storage/"):
		f.store(w, r)
	case token != "" && r.Header.Get("Authorization") != "Bearer "+token:
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="fake",scope="repository:%s:pull"`, f.host(), f.repo))
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`)
	case r.URL.Path == base+"manifests/latest", r.URL.Path == base+"manifests/"+string(f.desc.Digest):
		w.Header().Set("Content-Type", f.desc.MediaType)
		w.Header().Set("Docker-Content-Digest", string(f.desc.Digest))
		w.Write(f.manifest)
	case r.URL.Path == base+"blobs/"+string(f.layerDesc.Digest):
		if !f.redirect {
			f.blob(w, r)
			return
		}
		f.mu.Lock()
		signature := fmt.Sprintf("s%d", len(f.signed))
		f.signed[signature] = f.serves
		f.mu.Unlock()
		target := "/storage/layer?X-Amz-Expires=60&sig=" + signature
		if f.storage != nil {
			target = f.storage.URL + target
		}
		http.Redirect(w, r, target, http.StatusTemporaryRedirect)
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)
	}
}

// store is the object store behind signed URLs.
func (f *fake) store(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	left, ok := f.signed[r.URL.Query().Get("sig")]
	if f.serves > 0 {
		if left == 0 {
			ok = false
		}
		f.signed[r.URL.Query().Get("sig")] = left - 1
	}
	f.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
		return
	}
	f.blob(w, r)
}

func (f *fake) blob(w http.ResponseWriter, r *http.Request) {
	if f.noRanges {
		r.Header.Del("Range")
	}
	if f.cut > 0 {
		w = &cutter{ResponseWriter: w, left: f.cut}
	}
	if f.chunked {
		w = chunker{w}
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(f.layer))
}

// cutter hangs up after some bytes.
type cutter struct {
	http.ResponseWriter
	left int64
}

func (c *cutter) Write(p []byte) (int, error) {
	if int64(len(p)) > c.left {
		c.ResponseWriter.Write(p[:c.left])
		c.ResponseWriter.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	c.left -= int64(len(p))
	return c.ResponseWriter.Write(p)
}

// chunker hides the length.
type chunker struct{ http.ResponseWriter }

func (c chunker) WriteHeader(status int) {
	c.Header().Del("Content-Length")
	c.ResponseWriter.WriteHeader(status)
}

func (c chunker) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	if f, ok := c.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
	return n, err
}

// newClient is a client with an empty world around it, and short waits. options may change it.
func newClient(t *testing.T, o Options, change func(*limits)) *Client {
	t.Helper()
	if o.HostDirs == nil {
		o.HostDirs = []string{t.TempDir()}
	}
	if o.DockerConfigDir == "" {
		o.DockerConfigDir = t.TempDir()
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	c.limits.backoff, c.limits.backoffRefused = 2*time.Millisecond, 5*time.Millisecond
	if change != nil {
		change(&c.limits)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func open(t *testing.T, c *Client, name string) *Repository {
	t.Helper()
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Repository(ref)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (f *fake) open(t *testing.T, o Options, change func(*limits)) *Repository {
	t.Helper()
	return open(t, newClient(t, o, change), f.host()+"/"+f.repo)
}

// certs makes a certs.d root with one file for a host.
func certs(t *testing.T, host, name string, text []byte) string {
	t.Helper()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, host), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, host, name), text, 0o644); err != nil {
		t.Fatal(err)
	}
	return root
}

func certPEM(s *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return strconv.Quote(string(s[:4])) + fmt.Sprint(len(b))
}

func query(t *testing.T, r *http.Request) url.Values { t.Helper(); return r.URL.Query() }
