// Package origin reads images from a registry: the source of last resort, and the first to ask for what nobody near has. It also keeps
// there the small things that belong to an image and point to it, OCI referrers.
//
// A [Client] knows hosts, certificates and credentials; a [Repository] is one repository seen through it; a [Stream] is a
// range of one blob. The hosts are containerd's: hosts.toml and docker's ca.crt/client.cert below certs.d, mirrors in their
// order with the registry itself last, credentials from docker's config file and its helpers, tokens fetched and renewed by
// containerd's authorizer with nothing but the pull scope of the repository, and its push scope for what is pushed.
//
// # What is promised
//
// A manifest comes back only when its bytes agree with their digest and its kind with its media type. A stream delivers
// exactly the bytes of the range it announces, in order and each once, whatever the registry does below it: cut connections,
// silence, signed URLs that expire, tokens that run out, "come back later". It never delivers a byte outside the range, and
// it ends with io.EOF only after the last one. It does not check the blob's digest: ranges have none, the store does that.
//
// Every wait and every number of attempts is bounded (limits.go holds the bounds and their reasons), all waits end with the
// context, and a pause that a host asks for is kept by all streams of the client to that host.
//
// What is pushed goes to the registry itself, never to a mirror. Pushing is repeatable: what is there already is left as it is.
//
// A credential goes to the host it belongs to and to the token service that host names, never along a redirect.
// A URL that was signed for us is a credential too: errors and logs name its host, not its query.
//
// # Errors
//
// Failures are [*Error]: a sentence with the image, the host, what it answered and what to try, and one of the sentinels
// below for errors.Is. Only a cancelled context comes back as itself.
//
// The package knows nothing of stores, peers or pieces.
package origin

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Options say how registries are found and who asks.
type Options struct {
	// DockerConfigDir holds docker's config.json with logins and credential helpers; "" is docker's own default
	// ($DOCKER_CONFIG, ~/.docker). It is read again at each login, so `docker login` needs no restart.
	DockerConfigDir string
	// HostDirs are certs.d-style folders, searched in order for one of the host: the first that has it is used, alone. A
	// folder "_default" counts only when no root names the host. nil is DefaultHostDirs().
	HostDirs []string
	// Credentials replaces docker's config when it is set. host is the registry's host[:port] ("registry-1.docker.io" for
	// Docker Hub); empty strings mean no credential, an empty username that secret is an identity token.
	Credentials func(host string) (username, secret string, err error)
	// Insecure allows plain HTTP and unverified TLS with the registry that a reference names (not with its mirrors,
	// which have their own setting in hosts.toml). Loopback registries may always be plain HTTP.
	Insecure bool
	// OnBehalf is for a client that asks for somebody on another machine, with that one's Credentials. What lets this node in
	// (headers and client certificates of hosts.toml) stays out of it, and addresses of this machine and its link are not
	// connected to, but for registries that Own or a folder of HostDirs names.
	OnBehalf bool
	// Own are the registries, as host or host:port, that OnBehalf may ask by any address, plain HTTP and unverified TLS.
	Own []string
	// UserAgent is sent with every request; "" is "docker-quay".
	UserAgent string
	// Log is told of retries, mirrors that failed and credential helpers that do not work; nil is silence.
	Log *slog.Logger
	// MaxRetries is how often one request is sent again after a failure that may pass; 0 is 4, below 0 is never.
	MaxRetries int
	// StallTimeout is how long a body may be silent before its connection is given up and the rest asked for
	// anew; 0 is 30 s.
	StallTimeout time.Duration
}

// Client asks registries. It is safe for use from many goroutines. What it learns about hosts (pauses they ask for, mirrors
// that are down) and its connections are shared by all its repositories; tokens are each repository's own.
type Client struct {
	options Options // immutable
	limits  limits  // immutable
	log     *slog.Logger
	counts  counts
	pauses  pauses
	tagging chan struct{} // holds one: who has taken it may change the tags that list referrers

	mu    sync.Mutex // guards hosts
	hosts map[string]hostSet
}

// hostSet is the configuration of one registry as it was read at a time.
type hostSet struct {
	hosts []*host
	read  time.Time
}

// Stats counts what a client did since it was made. All but the bytes count HTTP requests.
type Stats struct {
	Requests  int64 `json:"requests"`  // sent, tokens, redirects and retries among them
	Bytes     int64 `json:"bytes"`     // of bodies received from registries and storage, errors and wasted ones among them
	Retries   int64 `json:"retries"`   // sent again after a failure that might pass
	Resumes   int64 `json:"resumes"`   // sent to go on with a stream that was cut
	Redirects int64 `json:"redirects"` // of blobs that were resolved; less than the ranges asked when signed URLs are reused
}

type counts struct{ requests, bytes, retries, resumes, redirects atomic.Int64 }

// New returns a client. It reads nothing yet: hosts are read at the first use of a registry, credentials when one asks.
func New(o Options) (*Client, error) {
	if o.HostDirs == nil {
		o.HostDirs = DefaultHostDirs()
	}
	for _, dir := range o.HostDirs {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("the folder of registry hosts %q must be an absolute path", dir)
		}
	}
	if o.UserAgent == "" {
		o.UserAgent = "docker-quay"
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := &Client{options: o, limits: defaultLimits, log: o.Log, hosts: map[string]hostSet{}, tagging: make(chan struct{}, 1)}
	if o.MaxRetries != 0 {
		c.limits.retries = max(o.MaxRetries, 0)
	}
	if o.StallTimeout > 0 {
		c.limits.stall = o.StallTimeout
	}
	if o.Credentials == nil {
		c.options.Credentials = dockerCredentials(o.DockerConfigDir)
	}
	return c, nil
}

// DefaultHostDirs are the folders where hosts and certificates of registries are looked up: our own, then containerd's,
// then docker's, then the user's for daemons that run without root.
func DefaultHostDirs() []string {
	dirs := []string{"/etc/quay/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d"}
	if config, err := os.UserConfigDir(); err == nil {
		for _, dir := range []string{"quay", "containerd", "docker"} {
			dirs = append(dirs, filepath.Join(config, dir, "certs.d"))
		}
	}
	return dirs
}

// Close drops idle connections. Streams that are open go on, and the client may be used again.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, set := range c.hosts {
		set.close()
	}
	clear(c.hosts)
	return nil
}

func (s hostSet) close() {
	for _, h := range s.hosts {
		h.transport.CloseIdleConnections()
	}
}

// Stats tells what was done so far.
func (c *Client) Stats() Stats {
	return Stats{
		Requests:  c.counts.requests.Load(),
		Bytes:     c.counts.bytes.Load(),
		Retries:   c.counts.retries.Load(),
		Resumes:   c.counts.resumes.Load(),
		Redirects: c.counts.redirects.Load(),
	}
}

// Repository returns the repository that ref names; its tag or digest does not matter. It asks nothing of the registry: an
// error is one of the configuration (a certificate that cannot be read, say).
func (c *Client) Repository(ref reference.Named) (*Repository, error) {
	if ref == nil {
		return nil, errors.New("a reference is needed")
	}
	name := reference.TrimNamed(ref)
	hosts, err := c.hostsOf(reference.Domain(name))
	if err != nil {
		return nil, err
	}
	r := &Repository{client: c, name: name}
	for _, h := range hosts {
		r.endpoints = append(r.endpoints, &endpoint{
			host:      h,
			auth:      newAuth(c, h, reference.Path(name), "pull"),
			pushAuth:  newAuth(c, h, reference.Path(name), "pull,push"),
			redirects: redirects{m: map[digest.Digest]redirect{}},
		})
	}
	return r, nil
}

// Repository is one repository. It is safe for use from many goroutines, and worth keeping: tokens and signed URLs that
// were resolved live with it.
type Repository struct {
	client    *Client
	name      reference.Named
	endpoints []*endpoint // mirrors first, the registry itself last

	mu     sync.Mutex // guards access
	access string
}

// endpoint is one host as one repository uses it.
type endpoint struct {
	*host
	auth      *auth // to read
	pushAuth  *auth // to write: a token of its own, so that reading never needs more than the right to read
	redirects redirects
}

// Name is the repository's name with its registry.
func (r *Repository) Name() reference.Named { return r.name }

// Access tells what the registry let us in with: "public" when it gave what was asked without any credential, else an opaque
// name of the credential that it accepted (the hex SHA-256 of host, user and secret), and "" before it gave anything.
//
// A credential that was sent counts, needed or not: who is logged in to a registry sees the credential's name also for
// public repositories there. And it sticks: after one answer that took a credential this never says "public" again.
func (r *Repository) Access() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.access
}

// Public is what Access says when no credential took part.
const Public = "public"

func (r *Repository) granted(access string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if access != Public || r.access == "" {
		r.access = access
	}
}

// header is what goes to every host.
func (c *Client) header() http.Header {
	return http.Header{
		"User-Agent": {c.options.UserAgent},
		// Blobs are addressed by the bytes as they are stored: a transfer coding by some proxy would break ranges and sizes.
		"Accept-Encoding": {"identity"},
	}
}
