// Package api is the node's local API: HTTP and JSON over a unix socket, as
// between docker and its engine. The node daemon serves it; `docker quay` is its
// client. With it a pull uses the node's store, its place in the swarm and its
// snapshotter, and what was fetched outlives the command.
//
// # Sessions
//
// A client resolves an image with its own registry credentials and gets a
// session: the right to read that image from the node. The registry decides:
// the node asks it with those credentials before it serves anything, whatever
// its store holds. The credentials stay in memory with the session. A session
// ends by Close, when its client's connection to the resolve is long gone
// (sessionIdle), or with the daemon.
//
// # Who may connect
//
// The socket belongs to root and a group; the kernel names the user at the
// other end, for the log and for one rule: an image whose registry cannot be
// reached is served from what the node saw only to root, to whom the node
// belongs, when the image is public, or when the same credential was accepted
// for it before.
package api

import (
	"errors"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// DefaultSocket is where the node daemon listens.
const DefaultSocket = "/run/quay/quay.sock"

const (
	// sessionIdle is how long a session lives after its last request.
	sessionIdle = 15 * time.Minute
	// maxSessions bounds the sessions of a node; beyond it resolving fails.
	maxSessions = 256
	// maxRequest bounds a request's body in bytes.
	maxRequest = 1 << 20
)

// Status is what the node says of itself.
type Status struct {
	Version string `json:"version"`
	NodeID  string `json:"node_id,omitempty"`
	// Addr is where other nodes reach it; empty without a cluster secret.
	Addr  string           `json:"addr,omitempty"`
	Peers []cluster.Member `json:"peers,omitempty"`
	// Snapshotter is the socket of its snapshotter, Mirror the address of its
	// registry mirror; empty when off.
	Snapshotter string      `json:"snapshotter,omitempty"`
	Mirror      string      `json:"mirror,omitempty"`
	Store       store.Usage `json:"store"`
	// Fetcher is what it fetches and shares, and has since it was started.
	Fetcher Fetching `json:"fetcher"`
	// Layers says how the snapshotter mounts layers; nil before it runs.
	Layers *Layers `json:"layers,omitempty"`
}

// Fetching is what a node's fetcher does, and did since it was started. Sizes are bytes.
type Fetching struct {
	// Fetches are the blobs on their way here, Shared those that other nodes can have, the former among them.
	Fetches int `json:"fetches"`
	Shared  int `json:"shared"`
	// What was fetched from registries and other nodes, what was here already when somebody asked for it, and
	// what other nodes were given.
	FromOrigin int64 `json:"from_origin"`
	FromPeers  int64 `json:"from_peers"`
	FromCache  int64 `json:"from_cache"`
	Uploaded   int64 `json:"uploaded"`
	// FailedReads are reads that somebody waited for and that failed; RegistriesPaused are left alone for now, as they asked.
	FailedReads      int64 `json:"failed_reads"`
	RegistriesPaused int   `json:"registries_paused"`
}

// Layers is how a node's snapshotter mounts layers, and how it is doing.
type Layers struct {
	// Mount is erofs, loop, fuse or unpack, and Why the reason in words.
	Mount string `json:"mount"`
	Why   string `json:"why"`
	// Mounts are those of layers; Direct is how many of them read plain files, without the daemon.
	Mounts int `json:"mounts,omitempty"`
	Direct int `json:"direct,omitempty"`
	// Stored are the layers on disk, Complete how many of them are all there, Bytes what they take.
	Stored   int   `json:"stored,omitempty"`
	Complete int   `json:"complete,omitempty"`
	Bytes    int64 `json:"bytes,omitempty"`
	Quota    int64 `json:"quota,omitempty"` // of Bytes; 0: no bound
	// Reads were answered by the daemon, ReadErrors failed, ReadsWaiting wait now.
	Reads        uint64 `json:"reads,omitempty"`
	ReadErrors   uint64 `json:"read_errors,omitempty"`
	ReadsWaiting int    `json:"reads_waiting,omitempty"`
	// List has each layer, when it was asked for.
	List []Layer `json:"list,omitempty"`
}

// Layer is a layer that a node has mounted, or keeps to be mounted.
type Layer struct {
	Digest digest.Digest `json:"digest"`
	// Image is the one that it was mounted for first; empty when it is not mounted.
	Image string `json:"image,omitempty"`
	// State is lazy (bytes are missing, and come when they are read), unchecked (all is there, and its index has still to be
	// compared with it), complete, or forged (its index was false: no container starts from it).
	State string `json:"state"`
	// Size is that of its files' contents and Present how much of that is here; 0 where that is not known (fuse).
	Size    int64 `json:"size,omitempty"`
	Present int64 `json:"present,omitempty"`
	// Bytes is what it takes on disk.
	Bytes int64 `json:"bytes,omitempty"`
	// Mounts are its mounts; Direct is how many of them read a plain file, without the daemon.
	Mounts int `json:"mounts"`
	Direct int `json:"direct"`
	// Readers are the mounts and running containers that read by way of the daemon, also of images that were removed.
	Readers int    `json:"readers,omitempty"`
	Why     string `json:"why,omitempty"` // it is not complete
}

// Credential is a registry login of the client's.
type Credential struct {
	// Username is empty when Secret is an identity token.
	Username string `json:"username,omitempty"`
	Secret   string `json:"secret,omitempty"`
}

// ImageRequest asks for a session.
type ImageRequest struct {
	// Ref is the reference in its full form.
	Ref string `json:"ref"`
	// Platform is OS/ARCH[/VARIANT]; the zero value is the node's.
	Platform ocispec.Platform `json:"platform,omitzero"`
	// Insecure allows plain HTTP and unverified TLS to the image's registry.
	Insecure bool `json:"insecure,omitempty"`
	// SkipWebSeed takes the layers from peers only.
	SkipWebSeed bool `json:"skip_web_seed,omitempty"`
	// Offline accepts what members saw when nobody reaches the registry.
	Offline bool `json:"offline,omitempty"`
	// Torrents says whether published torrents are used: auto (or empty), always or never. Auto is what the node's configuration says.
	Torrents string `json:"torrents,omitempty"`
	// Trackers replace those of published torrents.
	Trackers []string `json:"trackers,omitempty"`
	// Credentials are by registry host, as the docker configuration names it.
	Credentials map[string]Credential `json:"credentials,omitempty"`
}

// Credential returns the login for a registry's host, as origin.Options wants
// it: Docker Hub, which has several names, is under "docker.io".
func (r *ImageRequest) Credential(host string) (username, secret string, err error) {
	switch host {
	case "registry-1.docker.io", "index.docker.io":
		host = "docker.io"
	}
	c := r.Credentials[host]
	return c.Username, c.Secret, nil
}

// Image is a resolved image as a session tells it.
type Image struct {
	Session  string               `json:"session"`
	Ref      string               `json:"ref"`
	Target   ocispec.Descriptor   `json:"target"`
	Manifest ocispec.Descriptor   `json:"manifest"`
	Config   ocispec.Descriptor   `json:"config"`
	Layers   []ocispec.Descriptor `json:"layers"`
	Note     string               `json:"note,omitempty"`
}

// fault is an error on the wire: what it says, and which of kinds it is.
type fault struct {
	Kinds   []string `json:"kinds,omitempty"`
	Message string   `json:"message"`
}

// kinds are the errors that keep their identity across the socket. An error can
// be several of them.
var kinds = []struct {
	kind string
	err  error
}{
	{"not_found", origin.ErrNotFound},
	{"denied", origin.ErrDenied},
	{"tls", origin.ErrTLS},
	{"rate_limited", origin.ErrRateLimited},
	{"unavailable", origin.ErrUnavailable},
	{"foreign", trust.ErrForeign},
	{"no_source", fetcher.ErrNoSource},
	{"no_platform", fetcher.ErrNoPlatform},
	{"unsupported", fetcher.ErrUnsupported},
	{"unsupported_manifest", origin.ErrUnsupported},
	{"too_large", origin.ErrTooLarge},
	{"unexpected", origin.ErrUnexpected},
	{"mismatch", fetcher.ErrMismatch},
	{"origin_mismatch", origin.ErrMismatch},
	{"store_mismatch", store.ErrMismatch},
	{"quota", store.ErrQuota},
	{"no_space", store.ErrNoSpace},
}

func faultOf(err error) fault {
	f := fault{Message: err.Error()}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			f.Kinds = append(f.Kinds, k.kind)
		}
	}
	return f
}

// remoteError is a node's error at the client.
type remoteError struct {
	message string
	kinds   []error
}

func (e *remoteError) Error() string   { return e.message }
func (e *remoteError) Unwrap() []error { return e.kinds }

// err is the error at the client. Kinds of a newer node are passed over.
func (f fault) err() error {
	e := &remoteError{message: f.Message}
	for _, k := range kinds {
		if slices.Contains(f.Kinds, k.kind) {
			e.kinds = append(e.kinds, k.err)
		}
	}
	return e
}
