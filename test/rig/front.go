package rig

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"sync"
	"time"
)

// signedPrefix begins the paths of signed URLs; the rest is the path they stand for.
const signedPrefix = "/signed/"

// Stats counts what a registry's front served. Bytes are those of successful responses' bodies handed to the network, also of
// responses that are still under way or were cut.
type Stats struct {
	Manifests int64 // bytes
	Blobs     int64 // bytes
	Requests  map[Kind]int64
	// BlobsTo are the blob bytes by client address.
	BlobsTo map[string]int64
}

// front is the reverse proxy before a registry: it counts, and it misbehaves when told so.
type front struct {
	upstream  *url.URL
	transport *http.Transport
	username  string // for signed URLs, whose clients send no credential
	password  string
	key       []byte // signs URLs
	server    *http.Server
	listener  net.Listener
	scheme    string

	mu      sync.Mutex // guards following
	faults  Faults
	changed chan struct{} // closed when faults change
	stats   Stats
}

func newFront(l net.Listener, config *tls.Config, upstream *url.URL, transport *http.Transport, username, password string) *front {
	f := &front{
		upstream: upstream, transport: transport, username: username, password: password,
		key: make([]byte, 32), listener: l, scheme: "http", changed: make(chan struct{}),
	}
	rand.Read(f.key)
	f.resetStats()
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(upstream)
			// The registry makes the Location of uploads from the host it was asked for, which must lead back here.
			r.Out.Host = r.In.Host
		},
		Transport: transport,
		// Bytes go out as they come: what a client waits for must not wait in a buffer here.
		FlushInterval: -1,
		BufferPool:    &buffers{},
		ErrorLog:      log.New(io.Discard, "", 0),
	}
	f.server = &http.Server{
		Handler:     http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { f.serve(proxy, w, r) }),
		ErrorLog:    log.New(io.Discard, "", 0),
		IdleTimeout: time.Minute,
	}
	if config != nil {
		f.scheme = "https"
		l = tls.NewListener(l, config)
	}
	go func() {
		// ErrServerClosed is how it ends; anything else shows as a refused connection in the test.
		_ = f.server.Serve(l)
	}()
	return f
}

// serve applies the faults, in the order of a real path: network, admission, access, storage.
func (f *front) serve(proxy http.Handler, w http.ResponseWriter, r *http.Request) {
	kind := kindOf(r.URL.Path)
	faults, changed := f.admit(kind)
	if !wait(r, faults.Delay) {
		return
	}
	if status := f.refuse(); status != 0 {
		if faults.RetryAfter > 0 {
			w.Header().Set("Retry-After", strconv.FormatInt(int64((faults.RetryAfter+time.Second-1)/time.Second), 10))
		}
		http.Error(w, http.StatusText(status), status)
		return
	}
	if kind == Blobs {
		if faults.Hang {
			select {
			case <-r.Context().Done():
			case <-changed:
			}
			panic(http.ErrAbortHandler)
		}
		if faults.Deny != nil && faults.Deny(r) {
			deny(w)
			return
		}
		if !f.sign(w, r, faults) {
			return
		}
		if faults.WholeOnly {
			r.Header.Del("Range")
		}
	}
	proxy.ServeHTTP(&countingWriter{ResponseWriter: w, front: f, request: r, kind: kind, faults: faults}, r)
}

// deny answers as a registry that knows the caller but does not let him.
func deny(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusForbidden)
	_, _ = io.WriteString(w, `{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`)
}

// sign redirects to a signed URL or, on one, checks it and restores the request it stands for. It reports whether the request
// goes on.
func (f *front) sign(w http.ResponseWriter, r *http.Request, faults Faults) bool {
	if signed, path := isSigned(r.URL.Path); signed {
		expires, err := strconv.ParseInt(r.URL.Query().Get("expires"), 10, 64)
		if err != nil || !hmac.Equal([]byte(f.signature(path, expires)), []byte(r.URL.Query().Get("signature"))) ||
			time.Now().UnixMilli() >= expires {
			http.Error(w, "the signature is wrong or has expired", http.StatusForbidden)
			return false
		}
		r.URL.Path, r.URL.RawPath, r.URL.RawQuery = path, "", ""
		if f.username != "" {
			r.SetBasicAuth(f.username, f.password)
		}
		return true
	}
	if faults.RedirectTTL <= 0 || r.Method != http.MethodGet {
		return true
	}
	if status := f.authorized(r); status != 0 {
		// The registry itself says what is missing, with the challenge that belongs to it.
		return true
	}
	expires := time.Now().Add(faults.RedirectTTL).UnixMilli()
	query := url.Values{"expires": {strconv.FormatInt(expires, 10)}, "signature": {f.signature(r.URL.Path, expires)}}
	location := url.URL{Scheme: f.scheme, Host: r.Host, Path: signedPrefix + r.URL.Path[1:], RawQuery: query.Encode()}
	http.Redirect(w, r, location.String(), http.StatusFound)
	return false
}

func isSigned(path string) (bool, string) {
	if len(path) > len(signedPrefix) && path[:len(signedPrefix)] == signedPrefix {
		return true, path[len(signedPrefix)-1:]
	}
	return false, ""
}

func (f *front) signature(path string, expires int64) string {
	mac := hmac.New(sha256.New, f.key)
	fmt.Fprintf(mac, "%d %s", expires, path)
	return hex.EncodeToString(mac.Sum(nil))
}

// authorized asks the registry whether the request may be served: 0, or the status it refuses with.
func (f *front) authorized(r *http.Request) int {
	if f.username == "" {
		return 0
	}
	username, password, ok := r.BasicAuth()
	if ok && username == f.username && password == f.password {
		return 0
	}
	return http.StatusUnauthorized
}

// admit counts a request and says under which faults it is.
func (f *front) admit(kind Kind) (Faults, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stats.Requests[kind]++
	return f.faults, f.changed
}

// refuse takes one of the refusals that are left: 503, 429 or 0.
func (f *front) refuse() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range []struct {
		left   *int
		status int
	}{{&f.faults.Unavailable, http.StatusServiceUnavailable}, {&f.faults.RateLimited, http.StatusTooManyRequests}} {
		if *r.left != 0 {
			if *r.left > 0 {
				*r.left--
			}
			return r.status
		}
	}
	return 0
}

func (f *front) setFaults(faults Faults) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.faults = faults
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *front) snapshot() Stats {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.stats
	s.Requests, s.BlobsTo = map[Kind]int64{}, map[string]int64{}
	for k, v := range f.stats.Requests {
		s.Requests[k] = v
	}
	for k, v := range f.stats.BlobsTo {
		s.BlobsTo[k] = v
	}
	return s
}

func (f *front) resetStats() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stats = Stats{Requests: map[Kind]int64{}, BlobsTo: map[string]int64{}}
}

func (f *front) count(kind Kind, r *http.Request, n int) {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		host = r.RemoteAddr
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch kind {
	case Manifests:
		f.stats.Manifests += int64(n)
	case Blobs:
		f.stats.Blobs += int64(n)
		f.stats.BlobsTo[host] += int64(n)
	}
}

func (f *front) close() error {
	err := f.server.Close()
	f.transport.CloseIdleConnections()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// wait waits for d or the end of the request and reports whether the request is still on.
func wait(r *http.Request, d time.Duration) bool {
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-r.Context().Done():
		return false
	}
}

// buffers hands ReverseProxy its copy buffers: 32 KiB fresh ones for every response would be most of the front's garbage.
type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, 128<<10)
}

func (b *buffers) Put(p []byte) { b.pool.Put(&p) }
