package origin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxPush bounds what is pushed, in bytes. It is held in memory: all that is pushed here is metadata of an image, the largest a
	// .torrent file of 16 MiB.
	maxPush = 32 << 20
	// uploads is how often a blob's upload is begun: a registry that was restarted in between has forgotten the first.
	uploads = 2
)

// Push stores a blob or a manifest of this repository, whichever desc's media type says, in the registry itself. desc must describe
// body, of at most 32 MiB. A blob that is there is not sent again; a manifest always is.
//
// A manifest that has a subject is a referrer from then on. To a registry without the referrers API, which is one that does not
// acknowledge the subject, the tag that stands for it is kept (OCI distribution, referrers tag schema): read, added to, written; what
// others have put there stays.
func (r *Repository) Push(ctx context.Context, desc ocispec.Descriptor, body []byte) error {
	k := call{op: "push", reference: r.name.String() + "@" + string(desc.Digest), push: true, patient: true}
	err := desc.Digest.Validate()
	switch {
	case err != nil:
	case int64(len(body)) != desc.Size || desc.Digest.Algorithm().FromBytes(body) != desc.Digest:
		err = errors.New("the descriptor is of something else")
	case len(body) > maxPush, kindOf(desc.MediaType) != "" && len(body) > maxManifest:
		err = fmt.Errorf("%d bytes are too many", len(body))
	}
	if err != nil {
		return fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	ep, err := r.writable(k)
	if err != nil {
		return err
	}
	if kindOf(desc.MediaType) == "" {
		return r.pushBlob(ctx, ep, k, desc.Digest, body)
	}
	acknowledged, err := r.putManifest(ctx, ep, k, string(desc.Digest), desc.MediaType, body)
	if err != nil {
		return err
	}
	var m referrer
	if err := json.Unmarshal(body, &m); err != nil {
		return fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	if m.Subject == nil || acknowledged {
		return nil
	}
	return r.tagReferrer(ctx, ep, m.describe(desc), m.Subject.Digest)
}

// referrer is what of a manifest tells that it is one, and how it is listed.
type referrer struct {
	ArtifactType string              `json:"artifactType"`
	Config       *ocispec.Descriptor `json:"config"`
	Subject      *ocispec.Descriptor `json:"subject"`
	Annotations  map[string]string   `json:"annotations"`
}

// describe is the manifest's entry in a list of referrers (OCI distribution, listing referrers).
func (m referrer) describe(desc ocispec.Descriptor) ocispec.Descriptor {
	d := ocispec.Descriptor{
		MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size,
		ArtifactType: m.ArtifactType, Annotations: m.Annotations,
	}
	if d.ArtifactType == "" && m.Config != nil {
		d.ArtifactType = m.Config.MediaType
	}
	return d
}

// writable is the host to push to: the last one that may be, which is the registry itself.
func (r *Repository) writable(k call) (*endpoint, error) {
	for i := len(r.endpoints) - 1; i >= 0; i-- {
		if ep := r.endpoints[i]; ep.Capabilities.Has(docker.HostCapabilityPush) {
			return ep, nil
		}
	}
	return nil, &Error{Op: k.op, Reference: k.reference, Hint: "its hosts.toml lists no host with the capability push for it",
		Err: fmt.Errorf("%w: no host may be pushed to", ErrUnavailable)}
}

// pushBlob sends a blob in one piece (OCI distribution, POST then PUT) unless it is there.
func (r *Repository) pushBlob(ctx context.Context, ep *endpoint, k call, d digest.Digest, body []byte) error {
	for try := 1; ; try++ {
		// Asking first also gets the right to push before megabytes are sent in vain.
		head := k
		head.method, head.path = http.MethodHead, "blobs/"+string(d)
		a, err := r.send(ctx, ep, head)
		switch {
		case err == nil:
			a.Body.Close()
			return nil
		case !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrUnexpected):
			return err
		}
		to, err := r.beginUpload(ctx, ep, k, d)
		if err != nil {
			return err
		}
		put := k
		put.method, put.url, put.payload = http.MethodPut, to, body
		put.header = http.Header{"Content-Type": {"application/octet-stream"}}
		a, err = r.send(ctx, ep, put)
		if err == nil {
			discard(a.Response)
			return nil
		}
		if try == uploads || !errors.Is(err, ErrNotFound) {
			return err
		}
	}
}

// beginUpload asks where to put a blob.
func (r *Repository) beginUpload(ctx context.Context, ep *endpoint, k call, d digest.Digest) (*url.URL, error) {
	k.method, k.path = http.MethodPost, "blobs/uploads/"
	a, err := r.send(ctx, ep, k)
	if err != nil {
		return nil, err
	}
	defer discard(a.Response)
	to, f := r.client.follow(ep, a.Response, 0)
	if f != nil {
		return nil, r.failed(ep, k, a.host, ticket{}, *f)
	}
	q := to.Query()
	q.Set("digest", string(d))
	to.RawQuery = q.Encode()
	return to, nil
}

// putManifest stores a manifest under a tag or its digest. acknowledged says that the registry keeps a list of its subject's
// referrers itself.
func (r *Repository) putManifest(ctx context.Context, ep *endpoint, k call, name, mediaType string, body []byte) (acknowledged bool, err error) {
	k.method, k.payload = http.MethodPut, body
	k.url = ep.url(reference.Path(r.name), "manifests/"+name)
	k.header = http.Header{"Content-Type": {mediaType}}
	a, err := r.send(ctx, ep, k)
	if err != nil {
		return false, err
	}
	discard(a.Response)
	return a.Header.Get("OCI-Subject") != "", nil
}
