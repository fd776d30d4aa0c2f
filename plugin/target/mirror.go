package target

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// headerTimeout bounds how long a connection may take to ask: only an engine on this machine ever does.
	headerTimeout = 10 * time.Second
	// secretBytes of randomness in the repository's name keep other local users from finding it.
	secretBytes = 16
)

// mirror serves one image to an engine on this machine: the read endpoints of the OCI distribution API, on a loopback
// port, for as long as the pull takes. Engines treat 127.0.0.0/8 as a registry that may be plain HTTP. The repository's
// name has an unguessable part: whoever does not know it learns nothing, not even that the image is there.
type mirror struct {
	img      Image
	repo     string // path below /v2/, without slashes at the ends
	listener net.Listener
	server   *http.Server
	ctx      context.Context
	fail     context.CancelCauseFunc
	requests atomic.Int64
	served   sync.WaitGroup

	mu    sync.Mutex
	known map[digest.Digest]ocispec.Descriptor // guarded by mu: what may be asked for
}

// newMirror starts to serve. The returned context is cancelled, with the reason as its cause, when a blob cannot be
// read: the engine would ask for it again and again.
func newMirror(ctx context.Context, img Image) (*mirror, context.Context, error) {
	secret := make([]byte, secretBytes)
	rand.Read(secret) // never fails
	path := reference.Path(img.Ref())
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, nil, fmt.Errorf("open a port on loopback for the Docker Engine to pull from: %w", err)
	}
	m := &mirror{
		img: img, listener: l, known: map[digest.Digest]ocispec.Descriptor{},
		repo: hex.EncodeToString(secret) + "/" + path[strings.LastIndex(path, "/")+1:],
	}
	m.ctx, m.fail = context.WithCancelCause(ctx)
	m.learn(append([]ocispec.Descriptor{img.Target(), img.Manifest(), img.Config()}, img.Layers()...)...)
	m.server = &http.Server{
		Handler: m, ReadHeaderTimeout: headerTimeout,
		BaseContext: func(net.Listener) context.Context { return m.ctx },
	}
	m.served.Go(func() { _ = m.server.Serve(l) })
	return m, m.ctx, nil
}

// reference is what the engine is told to pull.
func (m *mirror) reference(d digest.Digest) string {
	return m.listener.Addr().String() + "/" + m.repo + "@" + d.String()
}

// Close stops serving at once; a request that is being served is cut.
func (m *mirror) Close() {
	m.fail(nil)
	_ = m.server.Close()
	m.served.Wait()
}

func (m *mirror) learn(descs ...ocispec.Descriptor) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, d := range descs {
		if _, ok := m.known[d.Digest]; !ok {
			m.known[d.Digest] = d
		}
	}
}

// ServeHTTP answers GET and HEAD of /v2/, manifests and blobs (OCI distribution, end-1 to end-3).
func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.requests.Add(1)
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "read only")
		return
	}
	if r.URL.Path == "/v2/" || r.URL.Path == "/v2" {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, "{}")
		return
	}
	dgst, kind, ok := m.parse(r.URL.Path)
	if !ok {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "no such repository")
		return
	}
	m.mu.Lock()
	desc, ok := m.known[dgst]
	m.mu.Unlock()
	if !ok {
		refuse(w, http.StatusNotFound, strings.ToUpper(kind[:len(kind)-1])+"_UNKNOWN", "not of this image")
		return
	}
	w.Header().Set("Docker-Content-Digest", dgst.String())
	w.Header().Set("Content-Length", strconv.FormatInt(desc.Size, 10))
	w.Header().Set("Etag", `"`+dgst.String()+`"`)
	contentType := "application/octet-stream"
	if kind == "manifests" {
		contentType = desc.MediaType
	}
	w.Header().Set("Content-Type", contentType)
	if r.Method == http.MethodHead {
		return
	}
	if kind == "manifests" {
		m.manifest(w, r, desc)
		return
	}
	rc, err := m.img.Open(r.Context(), desc)
	if err != nil {
		m.give(w, r, desc, err)
		return
	}
	defer rc.Close()
	if _, err := io.Copy(w, rc); err != nil && r.Context().Err() == nil {
		var network net.Error
		if !errors.As(err, &network) { // else the engine went away
			m.fail(err)
		}
		panic(http.ErrAbortHandler) // never a short body that looks whole
	}
}

func (m *mirror) manifest(w http.ResponseWriter, r *http.Request, desc ocispec.Descriptor) {
	body, err := readAll(r.Context(), m.img, desc)
	if err != nil {
		m.give(w, r, desc, err)
		return
	}
	// An engine with a containerd store walks from the index: what it finds there may be asked for.
	if images.IsIndexType(desc.MediaType) {
		var index ocispec.Index
		if err := json.Unmarshal(body, &index); err == nil {
			m.learn(index.Manifests...)
		}
	} else {
		var manifest ocispec.Manifest
		if err := json.Unmarshal(body, &manifest); err == nil {
			m.learn(append(manifest.Layers, manifest.Config)...)
		}
	}
	_, _ = w.Write(body)
}

// give answers for what cannot be read. What belongs to the image ends the pull; what only hangs on its index
// (attestations) the engine can do without.
func (m *mirror) give(w http.ResponseWriter, r *http.Request, desc ocispec.Descriptor, err error) {
	w.Header().Del("Content-Length")
	if r.Context().Err() != nil {
		panic(http.ErrAbortHandler)
	}
	if m.essential(desc.Digest) {
		m.fail(err)
		refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
		return
	}
	status := http.StatusBadGateway
	if errdefs.IsNotFound(err) {
		status = http.StatusNotFound
	}
	refuse(w, status, "MANIFEST_UNKNOWN", err.Error())
}

func (m *mirror) essential(d digest.Digest) bool {
	for _, l := range m.img.Layers() {
		if l.Digest == d {
			return true
		}
	}
	return d == m.img.Target().Digest || d == m.img.Manifest().Digest || d == m.img.Config().Digest
}

// parse takes "/v2/<repo>/{manifests,blobs}/<digest>" apart. The repository is compared in constant time, for its name
// is a secret.
func (m *mirror) parse(path string) (d digest.Digest, kind string, ok bool) {
	rest, last := cutLast(path)
	repo, kind := cutLast(rest)
	if kind != "manifests" && kind != "blobs" {
		return "", "", false
	}
	d, err := digest.Parse(last)
	if err != nil || subtle.ConstantTimeCompare([]byte(repo), []byte("/v2/"+m.repo)) != 1 {
		return "", "", false
	}
	return d, kind, true
}

func cutLast(s string) (before, after string) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s
	}
	return s[:i], s[i+1:]
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	type entry struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	_ = json.NewEncoder(w).Encode(map[string][]entry{"errors": {{code, message}}})
}
