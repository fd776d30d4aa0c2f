package origin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxReferrers bounds the list of one image: signatures, attestations and the like are a few dozen.
	maxReferrers = 1024
	// maxPages bounds the pages that a list may come in; registries put hundreds on one.
	maxPages = 32
	// tagTries is how often the tag that lists referrers is written when somebody else writes it at the same time.
	tagTries = 5
)

// errNoReferrers: the registry does not know the referrers API.
var errNoReferrers = errors.New("no list of referrers came")

// Referrers lists the manifests that have the manifest subject as theirs and are of an artifact type, "" for any: at most 1024, as the
// registry orders them. It asks the referrers API, and where there is none the tag that stands for it. None is no error.
//
// The list is the registry's claim. Entries that say no type are in it: what they are shows when they are read.
func (r *Repository) Referrers(ctx context.Context, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	k := call{op: "list the referrers of", reference: r.name.String() + "@" + string(subject)}
	if err := subject.Validate(); err != nil {
		return nil, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	var found []ocispec.Descriptor
	err := r.each(ctx, docker.HostCapabilityPull|docker.HostCapabilityResolve, k, func(ep *endpoint, k call) error {
		var err error
		found, err = r.referrers(ctx, ep, k, subject, artifactType)
		if !hasNoReferrers(err) || !k.patient {
			return err // of a mirror without the API the next host knows more
		}
		index, err := r.referrersTag(ctx, ep, k, subject)
		if err != nil {
			return err
		}
		found = index.filter(artifactType)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return found, nil
}

// hasNoReferrers reports whether an error means that the host does not know the API. The specification has 404; the others were seen
// of proxies that let only known paths and methods pass.
func hasNoReferrers(err error) bool {
	var e *Error
	if errors.Is(err, errNoReferrers) {
		return true
	}
	if !errors.As(err, &e) {
		return false
	}
	switch e.Status {
	case http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusNotImplemented:
		return true
	}
	return false
}

// referrers asks the API of one host, page by page.
func (r *Repository) referrers(ctx context.Context, ep *endpoint, k call, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	k.url = ep.url(reference.Path(r.name), "referrers/"+string(subject))
	if artifactType != "" {
		q := k.url.Query()
		q.Set("artifactType", artifactType) // it may do the filtering; we do in any case
		k.url.RawQuery = q.Encode()
	}
	k.header = http.Header{"Accept": {ocispec.MediaTypeImageIndex}}
	var found []ocispec.Descriptor
	for range maxPages {
		index, next, err := r.referrersPage(ctx, ep, k)
		if err != nil {
			return nil, err
		}
		found = append(found, index.filter(artifactType)...)
		if next == nil || len(found) >= maxReferrers {
			break
		}
		k.url = next
	}
	return found[:min(len(found), maxReferrers)], nil
}

// referrersPage reads one page, and where the next one is.
func (r *Repository) referrersPage(ctx context.Context, ep *endpoint, k call) (referrerIndex, *url.URL, error) {
	var index referrerIndex
	a, err := r.send(ctx, ep, k)
	if err != nil {
		return index, nil, err
	}
	defer a.Body.Close()
	fail := func(kind, cause error) error {
		if err := ended(ctx); err != nil {
			return fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
		}
		return r.failed(ep, k, a.host, ticket{}, failure{kind: kind, cause: cause})
	}
	mediaType, _, err := mime.ParseMediaType(a.Header.Get("Content-Type"))
	if err != nil || mediaType != ocispec.MediaTypeImageIndex {
		return index, nil, fail(ErrUnexpected, errNoReferrers) // a page for people, of a host that answers all paths
	}
	text, err := io.ReadAll(io.LimitReader(a.Body, maxManifest+1))
	switch {
	case err != nil:
		return index, nil, fail(ErrUnavailable, bare(err))
	case len(text) > maxManifest:
		return index, nil, fail(ErrTooLarge, nil)
	}
	if err := index.parse(text); err != nil {
		return index, nil, fail(ErrMismatch, err)
	}
	next, err := nextPage(a.Header.Get("Link"), a.Request.URL)
	if err != nil {
		return index, nil, fail(ErrUnexpected, err)
	}
	return index, next, nil
}

var linkNext = regexp.MustCompile(`^\s*<([^<>]+)>\s*;\s*rel="?next"?\s*$`)

// nextPage reads a Link header (RFC 8288) as the distribution protocol has it; nil without one. The page must be on the same host:
// what authorizes us there goes along.
func nextPage(link string, from *url.URL) (*url.URL, error) {
	m := linkNext.FindStringSubmatch(link)
	if m == nil {
		return nil, nil
	}
	next, err := from.Parse(m[1])
	if err != nil || next.Scheme != from.Scheme || next.Host != from.Host || next.User != nil {
		return nil, errors.New("its next page is somewhere else")
	}
	return next, nil
}

// referrerIndex is a list of referrers. Entries are kept as they came: a tag is written back with all that others put there.
type referrerIndex struct {
	entries     []json.RawMessage
	annotations json.RawMessage
}

func (x *referrerIndex) parse(text []byte) error {
	var v struct {
		MediaType   string            `json:"mediaType"`
		Manifests   []json.RawMessage `json:"manifests"`
		Annotations json.RawMessage   `json:"annotations"`
	}
	if err := json.Unmarshal(text, &v); err != nil {
		return errors.New("the list of referrers is not JSON")
	}
	if v.MediaType != "" && kindOf(v.MediaType) != "index" {
		return fmt.Errorf("the list of referrers calls itself %q", oneLine(v.MediaType, maxMessage))
	}
	*x = referrerIndex{entries: v.Manifests, annotations: v.Annotations}
	return nil
}

// filter are the entries that make sense, and may be of the type.
func (x referrerIndex) filter(artifactType string) []ocispec.Descriptor {
	var found []ocispec.Descriptor
	for _, raw := range x.entries {
		var d ocispec.Descriptor
		if json.Unmarshal(raw, &d) != nil || d.Digest.Validate() != nil || d.Size < 0 || d.Size > maxManifest || len(found) >= maxReferrers {
			continue
		}
		// Some registries give the config's media type for the artifact's: that of an empty config says nothing.
		silent := d.ArtifactType == "" || d.ArtifactType == ocispec.MediaTypeEmptyJSON
		if artifactType == "" || d.ArtifactType == artifactType || silent {
			found = append(found, d)
		}
	}
	return found
}

// has reports whether an entry is of a digest.
func (x referrerIndex) has(d digest.Digest) bool {
	for _, raw := range x.entries {
		var e ocispec.Descriptor
		if json.Unmarshal(raw, &e) == nil && e.Digest == d {
			return true
		}
	}
	return false
}

// tagOf is the tag under which a registry without the API has the referrers of a manifest (OCI distribution, referrers tag
// schema).
func tagOf(subject digest.Digest) string {
	algorithm, hex := subject.Algorithm().String(), subject.Encoded()
	return algorithm[:min(len(algorithm), 32)] + "-" + hex[:min(len(hex), 64)]
}

// referrersTag reads the list behind the tag; without the tag it is empty.
func (r *Repository) referrersTag(ctx context.Context, ep *endpoint, k call, subject digest.Digest) (referrerIndex, error) {
	tag := tagOf(subject)
	var index referrerIndex
	k.url, k.path = nil, "manifests/"+tag
	k.reference = r.name.String() + ":" + tag
	// All kinds: asked for an index alone, some registries say of an image under the tag that nothing is there, and it would be overwritten.
	k.header = http.Header{"Accept": {strings.Join(acceptManifests, ", ")}}
	desc, text, err := r.manifest(ctx, ep, k, "")
	switch {
	case errors.Is(err, ErrNotFound):
		return index, nil
	case err != nil:
		return index, err
	case kindOf(desc.MediaType) != "index":
		return index, &Error{Op: k.op, Reference: k.reference, Host: ep.Host, Hint: "the tag is reserved for the list of an image's referrers: rename it",
			Err: fmt.Errorf("%w: it is an image", ErrUnsupported)}
	}
	return index, index.parse(text)
}

// tagReferrer adds an entry to the list behind the tag. Registries have no way to change a tag only if it is still the same, so it is
// read again afterwards: what another writer overwrote is written again.
func (r *Repository) tagReferrer(ctx context.Context, ep *endpoint, entry ocispec.Descriptor, subject digest.Digest) error {
	k := call{op: "add to the referrers in", reference: r.name.String() + ":" + tagOf(subject), push: true, patient: true}
	select {
	case r.client.tagging <- struct{}{}:
		defer func() { <-r.client.tagging }()
	case <-ctx.Done():
		return fmt.Errorf("cannot %s %s: %w", k.op, k.reference, ended(ctx))
	}
	for try := 0; ; try++ {
		index, err := r.referrersTag(ctx, ep, k, subject)
		switch {
		case err != nil:
			return err
		case index.has(entry.Digest):
			return nil
		case try == tagTries:
			return &Error{Op: k.op, Reference: k.reference, Host: ep.Host, Hint: "try again",
				Err: fmt.Errorf("%w: others change it at the same time", ErrUnavailable)}
		case len(index.entries) >= maxReferrers:
			return &Error{Op: k.op, Reference: k.reference, Host: ep.Host, Hint: "remove the tag, or what nobody needs of its entries",
				Err: fmt.Errorf("%w: it has %d entries", ErrUnsupported, len(index.entries))}
		}
		if try > 0 && sleep(ctx, r.client.limits.wait(r.client.limits.backoff, try)) != nil {
			return fmt.Errorf("cannot %s %s: %w", k.op, k.reference, ended(ctx))
		}
		text, err := index.with(entry)
		if err != nil {
			return err
		}
		if _, err := r.putManifest(ctx, ep, k, tagOf(subject), ocispec.MediaTypeImageIndex, text); err != nil {
			return err
		}
	}
}

// with is the list with one more entry, as a document.
func (x referrerIndex) with(entry ocispec.Descriptor) ([]byte, error) {
	raw, err := json.Marshal(entry)
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		specs.Versioned
		MediaType   string            `json:"mediaType"`
		Manifests   []json.RawMessage `json:"manifests"`
		Annotations json.RawMessage   `json:"annotations,omitempty"`
	}{specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageIndex, append(x.entries[:len(x.entries):len(x.entries)], raw), x.annotations})
}
