// Package mirror serves what a fetcher can get as an OCI registry that can only
// be read: the pull half of the OCI distribution specification, on loopback,
// for runtimes that know how to use a registry mirror (containerd's hosts.toml
// names the upstream in the ns parameter).
//
// Blobs are streamed as they arrive: the headers go out at once, because a
// runtime gives a mirror only seconds to send them, and the last bytes go out
// only after the digest was checked. A blob that turns out wrong ends with a
// cut connection, never with a complete wrong body.
//
// The mirror uses the node's own registry credentials. Who may use it is decided
// by Options.Allow for each request; LocalUsers is the policy for a loopback
// listener.
package mirror

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// maxRepositories bounds the repositories whose tokens are kept.
const maxRepositories = 1024

// maxDescriptors bounds the blob sizes remembered from manifests: some hundred
// images. Beyond it the registry is asked for a size again.
const maxDescriptors = 16384

// Options configures a Handler. Fetcher and Origin are required.
type Options struct {
	Fetcher *fetcher.Fetcher
	// Origin returns the registry client for images of a registry host.
	Origin func(host string) *origin.Client
	// Allow refuses a request by an error, which is told to the client; nil
	// allows all.
	Allow func(*http.Request) error
	// Offline has tags taken, when neither the registry nor a member that reaches
	// it answers, as members saw them last.
	Offline bool
	Log     *slog.Logger
}

// Handler serves /v2/. It is safe for concurrent use.
type Handler struct {
	o Options

	mu    sync.Mutex // guards following
	descs map[part]ocispec.Descriptor
	repos map[string]*origin.Repository // by name: tokens and signed URLs live with them
}

// part is a blob as one repository has it. What the manifest of one repository
// says of a blob is not to be believed for another.
type part struct {
	repository string
	digest     digest.Digest
}

// New returns a Handler.
func New(o Options) *Handler {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Handler{o: o, descs: map[part]ocispec.Descriptor{}, repos: map[string]*origin.Repository{}}
}

// repository returns the repository of an image, the same one each time.
func (h *Handler) repository(named reference.Named, host string) (*origin.Repository, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if r := h.repos[named.Name()]; r != nil {
		return r, nil
	}
	r, err := h.o.Origin(host).Repository(named)
	if err != nil {
		return nil, err
	}
	if len(h.repos) >= maxRepositories {
		clear(h.repos)
	}
	h.repos[named.Name()] = r
	return r, nil
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.o.Allow != nil {
		if err := h.o.Allow(r); err != nil {
			refuse(w, http.StatusForbidden, "DENIED", err.Error())
			return
		}
	}
	w.Header().Set("Docker-Distribution-Api-Version", "registry/2.0")
	if r.URL.Path == "/v2/" || r.URL.Path == "/v2" {
		w.Header().Set("Content-Length", "0")
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this mirror can only be read")
		return
	}
	name, kind, what, ok := split(r.URL.Path)
	if !ok {
		refuse(w, http.StatusNotFound, "NAME_UNKNOWN", "no such endpoint in a pull-only mirror")
		return
	}
	host := r.URL.Query().Get("ns")
	if host == "" {
		refuse(w, http.StatusBadRequest, "NAME_UNKNOWN", "the ns parameter must name the upstream registry")
		return
	}
	named, err := parseName(host, name)
	if err != nil {
		refuse(w, http.StatusBadRequest, "NAME_INVALID", err.Error())
		return
	}
	switch kind {
	case "manifests":
		err = h.manifest(w, r, named, host, what)
	case "blobs":
		err = h.blob(w, r, named, host, what)
	}
	if err != nil {
		h.o.Log.Info("mirror", "image", named, kind, what, "err", err)
		status, code := statusOf(err)
		refuse(w, status, code, err.Error())
	}
}

// split takes /v2/<name>/<kind>/<what> apart. Tags and digests have no slash,
// while a repository may well be called "manifests" or "blobs".
func split(path string) (name, kind, what string, ok bool) {
	path, ok = strings.CutPrefix(path, "/v2/")
	if !ok {
		return "", "", "", false
	}
	last := strings.LastIndexByte(path, '/')
	if last < 0 {
		return "", "", "", false
	}
	path, what = path[:last], path[last+1:]
	last = strings.LastIndexByte(path, '/')
	if last <= 0 {
		return "", "", "", false
	}
	name, kind = path[:last], path[last+1:]
	if kind != "manifests" && kind != "blobs" || what == "" {
		return "", "", "", false
	}
	return name, kind, what, true
}

// parseName makes the full name of a repository. It has to be one of the host:
// what does not look like a host ("team") would else become a part of a name on
// Docker Hub.
func parseName(host, name string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(host + "/" + name)
	if err != nil {
		return nil, err
	}
	if domain := reference.Domain(named); domain != host && (domain != "docker.io" || host != "index.docker.io") {
		return nil, fmt.Errorf("%q is not the host of a registry", host)
	}
	if !reference.IsNameOnly(named) {
		return nil, fmt.Errorf("%q is not the name of a repository", name)
	}
	return named, nil
}

func (h *Handler) manifest(w http.ResponseWriter, r *http.Request, named reference.Named, host, what string) error {
	ref, err := withWhat(named, what)
	if err != nil {
		return err
	}
	desc, body, err := h.o.Fetcher.Manifest(r.Context(), ref, fetcher.ImageOptions{Origin: h.o.Origin(host), Offline: h.o.Offline})
	if err != nil {
		return err
	}
	h.remember(named, desc, body)
	w.Header().Set("Content-Type", desc.MediaType)
	w.Header().Set("Docker-Content-Digest", desc.Digest.String())
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(body)
	}
	return nil
}

// withWhat adds a tag or digest to a name.
func withWhat(named reference.Named, what string) (reference.Named, error) {
	if d, err := digest.Parse(what); err == nil {
		return reference.WithDigest(named, d)
	}
	ref, err := reference.WithTag(named, what)
	if err != nil {
		return nil, fmt.Errorf("%q is neither a tag nor a digest: %w", what, origin.ErrNotFound)
	}
	return ref, nil
}

// remember keeps the sizes of the blobs that a manifest names.
func (h *Handler) remember(named reference.Named, desc ocispec.Descriptor, body []byte) {
	if !images.IsManifestType(desc.MediaType) {
		return
	}
	children, err := fetcher.BlobsOf(body)
	if err != nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.descs)+len(children) > maxDescriptors {
		clear(h.descs)
	}
	for _, c := range children {
		h.descs[part{named.Name(), c.Digest}] = c
	}
}

func (h *Handler) descriptor(ctx context.Context, named reference.Named, host string, d digest.Digest) (ocispec.Descriptor, error) {
	h.mu.Lock()
	desc, ok := h.descs[part{named.Name(), d}]
	h.mu.Unlock()
	if ok {
		return desc, nil
	}
	repo, err := h.repository(named, host)
	if err != nil {
		return desc, err
	}
	err = fmt.Errorf("the size of %s@%s: %w to this node", named, d, origin.ErrUnavailable)
	if !h.o.Fetcher.Away(named) {
		desc, err = repo.Stat(ctx, d)
	}
	if errors.Is(err, origin.ErrUnavailable) {
		if info, serr := h.o.Fetcher.Store().Stat(d); serr == nil {
			return ocispec.Descriptor{Digest: d, Size: info.Size}, nil
		}
	}
	return desc, err
}

func (h *Handler) blob(w http.ResponseWriter, r *http.Request, named reference.Named, host, what string) error {
	d, err := digest.Parse(what)
	if err != nil {
		return fmt.Errorf("%q: %v: %w", what, err, origin.ErrNotFound)
	}
	desc, err := h.descriptor(r.Context(), named, host, d)
	if err != nil {
		return err
	}
	repo, err := h.repository(named, host)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Etag", `"`+d.String()+`"`)
	off, n, partial, ok := parseRange(r.Header.Get("Range"), desc.Size)
	if !ok {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", desc.Size))
		refuse(w, http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "range outside the blob")
		return nil
	}
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	status := http.StatusOK
	if partial {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, desc.Size))
		status = http.StatusPartialContent
	}
	if r.Method == http.MethodHead {
		w.WriteHeader(status)
		return nil
	}
	b, err := h.o.Fetcher.Layer(r.Context(), named, desc, fetcher.Way{Repository: repo, Client: h.o.Origin(host), Remote: h.o.Fetcher.Away(named)})
	if err != nil {
		return err
	}
	defer b.Close()
	body := b.ReaderAt(r.Context(), off)
	defer body.Close()
	w.WriteHeader(status)
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
	if _, err := io.CopyN(w, body, n); err != nil {
		h.o.Log.Info("mirror stream cut", "image", named, "blob", d, "err", err)
		panic(http.ErrAbortHandler)
	}
	return nil
}

// parseRange reads a Range header of one range (RFC 9110 §14.1.2). What is no
// such range, or several, is served whole, as the RFC allows. ok is false for a
// range that lies outside.
func parseRange(s string, size int64) (off, n int64, partial, ok bool) {
	spec, isBytes := strings.CutPrefix(s, "bytes=")
	first, last, isRange := strings.Cut(spec, "-")
	a, hasFirst := position(first)
	b, hasLast := position(last)
	switch {
	case !isBytes, !isRange, first != "" && !hasFirst, last != "" && !hasLast, first == "" && last == "":
		return 0, size, false, true
	case first == "": // the last b bytes
		b = min(b, size)
		return size - b, b, b > 0, b > 0
	case hasLast && b < a:
		return 0, size, false, true
	case a >= size:
		return 0, 0, false, false
	case last == "":
		b = size - 1
	}
	b = min(b, size-1)
	return a, b - a + 1, true, true
}

// position reads the digits of a range; what is larger than any blob is the
// largest number.
func position(s string) (int64, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return math.MaxInt64, true
	}
	return n, true
}

func statusOf(err error) (int, string) {
	switch {
	case errors.Is(err, origin.ErrNotFound), errors.Is(err, fetcher.ErrNoPlatform):
		return http.StatusNotFound, "MANIFEST_UNKNOWN"
	case errors.Is(err, origin.ErrDenied):
		return http.StatusForbidden, "DENIED"
	case errors.Is(err, origin.ErrRateLimited):
		return http.StatusTooManyRequests, "TOOMANYREQUESTS"
	default:
		// A runtime goes on to the registry itself after this.
		return http.StatusBadGateway, "UNAVAILABLE"
	}
}
