package origin

import (
	"context"
	_ "crypto/sha512" // registries may address by sha512: go-digest only knows what is linked in
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Docker's names for what OCI calls manifest and index, and the format before both.
const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerSchema1  = "application/vnd.docker.distribution.manifest.v1+json"
)

// acceptManifests asks for all we understand, indexes first: a registry must not choose a platform for us.
var acceptManifests = []string{ocispec.MediaTypeImageIndex, dockerList, ocispec.MediaTypeImageManifest, dockerManifest}

// Manifest reads the manifest or index that a tag or a digest names. The body is at most 8 MiB and agrees with the descriptor
// returned (media type, digest, size); asked for by digest it has that digest.
func (r *Repository) Manifest(ctx context.Context, tagOrDigest string) (ocispec.Descriptor, []byte, error) {
	k := call{op: "read the manifest of", path: "manifests/" + tagOrDigest, header: http.Header{"Accept": {strings.Join(acceptManifests, ", ")}}}
	need := docker.HostCapabilityPull
	var want digest.Digest
	if strings.Contains(tagOrDigest, ":") {
		want = digest.Digest(tagOrDigest)
		k.reference = r.name.String() + "@" + tagOrDigest
		if err := want.Validate(); err != nil {
			return ocispec.Descriptor{}, nil, fmt.Errorf("cannot read the manifest of %s: %w", k.reference, err)
		}
	} else {
		need |= docker.HostCapabilityResolve
		k.reference = r.name.String() + ":" + tagOrDigest
		if _, err := reference.WithTag(r.name, tagOrDigest); err != nil {
			return ocispec.Descriptor{}, nil, fmt.Errorf("cannot read the manifest of %s: %w", k.reference, err)
		}
	}
	var (
		desc ocispec.Descriptor
		text []byte
	)
	err := r.each(ctx, need, k, func(ep *endpoint, k call) error {
		var err error
		desc, text, err = r.manifest(ctx, ep, k, want)
		return err
	})
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	return desc, text, nil
}

// manifest reads it from one host.
func (r *Repository) manifest(ctx context.Context, ep *endpoint, k call, want digest.Digest) (ocispec.Descriptor, []byte, error) {
	fail := func(host string, kind error, format string, args ...any) error {
		return r.failed(ep, k, host, ticket{}, failure{kind: kind, cause: fmt.Errorf(format, args...)})
	}
	for try := 0; ; try++ {
		a, err := r.send(ctx, ep, k)
		if err != nil {
			return ocispec.Descriptor{}, nil, err
		}
		var text []byte
		if a.ContentLength <= maxManifest {
			text, err = io.ReadAll(io.LimitReader(a.Body, maxManifest+1))
		}
		a.Body.Close()
		switch {
		case ended(ctx) != nil:
			return ocispec.Descriptor{}, nil, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, ended(ctx))
		case a.ContentLength > maxManifest, len(text) > maxManifest:
			return ocispec.Descriptor{}, nil, r.failed(ep, k, a.host, ticket{}, failure{kind: ErrTooLarge})
		case err != nil:
			if !k.patient || try >= r.client.limits.retries {
				return ocispec.Descriptor{}, nil, r.failed(ep, k, a.host, ticket{}, wireFailure(err))
			}
			r.client.counts.retries.Add(1)
			_ = sleep(ctx, r.client.limits.wait(r.client.limits.backoff, try)) // its end shows in send
			continue
		case a.StatusCode != http.StatusOK:
			return ocispec.Descriptor{}, nil, fail(a.host, ErrMismatch, "a part came (status %d) of what must come whole", a.StatusCode)
		case a.Header.Get("Content-Encoding") != "" && a.Header.Get("Content-Encoding") != "identity":
			return ocispec.Descriptor{}, nil, fail(a.host, ErrMismatch, "it came encoded as %q", oneLine(a.Header.Get("Content-Encoding"), maxCode))
		}
		d, err := manifestDigest(text, want, a.Header.Get("Docker-Content-Digest"))
		if err != nil {
			return ocispec.Descriptor{}, nil, fail(a.host, ErrMismatch, "%w", err)
		}
		mediaType, err := manifestType(a.Header.Get("Content-Type"), text)
		if err != nil {
			kind := ErrMismatch
			if errors.Is(err, ErrUnsupported) {
				kind = ErrUnsupported
			}
			return ocispec.Descriptor{}, nil, fail(a.host, kind, "%w", err)
		}
		return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(text))}, text, nil
	}
}

// manifestDigest checks text against the digest asked for, or against what the registry says it is, when a tag was asked for
// and it says so in an algorithm that we have. Without either it is the SHA-256.
func manifestDigest(text []byte, want digest.Digest, header string) (digest.Digest, error) {
	claim := want
	if claim == "" {
		if d, err := digest.Parse(header); err == nil {
			claim = d // Parse refuses algorithms that are not linked in
		}
	}
	if claim == "" {
		return digest.FromBytes(text), nil
	}
	if got := claim.Algorithm().FromBytes(text); got != claim {
		return "", fmt.Errorf("its digest is %s instead of %s", got, claim)
	}
	return claim, nil
}

// shape is what tells an image from an index whatever its label.
type shape struct {
	SchemaVersion int             `json:"schemaVersion"`
	MediaType     string          `json:"mediaType"`
	Config        json.RawMessage `json:"config"`
	Layers        json.RawMessage `json:"layers"`
	Manifests     json.RawMessage `json:"manifests"`
	FSLayers      json.RawMessage `json:"fsLayers"`
}

// manifestType finds the media type of a manifest. The Content-Type header says it, the body's own field, which the digest
// covers, has the last word between OCI's and docker's name of the same thing, and what the body holds must fit: a document that
// one client reads as an image and another as an index is refused (CVE-2021-41190).
func manifestType(contentType string, text []byte) (string, error) {
	var s shape
	if err := json.Unmarshal(text, &s); err != nil {
		return "", errors.New("it is not JSON")
	}
	header, _, err := mime.ParseMediaType(contentType)
	if err != nil || kindOf(header) == "" && !strings.HasPrefix(header, "application/vnd.") {
		header = "" // application/json, text/plain: says nothing
	}
	if s.FSLayers != nil || s.SchemaVersion == 1 || strings.HasPrefix(header, dockerSchema1[:len(dockerSchema1)-len("+json")]) {
		return "", fmt.Errorf("%w: it is docker's schema 1, which no engine reads any more; push the image again with a current one", ErrUnsupported)
	}
	index, image := s.Manifests != nil, s.Config != nil || s.Layers != nil
	switch {
	case index && image:
		return "", errors.New("it claims to be an image and an index at once")
	case s.MediaType != "" && kindOf(s.MediaType) == "":
		return "", fmt.Errorf("%w: it is a %s", ErrUnsupported, oneLine(s.MediaType, maxMessage))
	case header != "" && kindOf(header) == "":
		return "", fmt.Errorf("%w: it came as %s", ErrUnsupported, oneLine(header, maxMessage))
	case header != "" && s.MediaType != "" && kindOf(header) != kindOf(s.MediaType):
		return "", fmt.Errorf("it came as %s and calls itself %s", oneLine(header, maxMessage), oneLine(s.MediaType, maxMessage))
	}
	mediaType := s.MediaType
	if mediaType == "" {
		mediaType = header
	}
	if mediaType == "" {
		switch {
		case index:
			mediaType = ocispec.MediaTypeImageIndex
		case image:
			mediaType = ocispec.MediaTypeImageManifest
		default:
			return "", errors.New("it is neither an image nor an index")
		}
	}
	switch kind := kindOf(mediaType); {
	case kind == "index" && image, kind == "image" && index:
		return "", fmt.Errorf("it calls itself %s, but holds the other kind", mediaType)
	case kind == "image" && s.Config == nil:
		return "", fmt.Errorf("it calls itself %s, but has no config", mediaType)
	case kind == "index" && s.Manifests == nil:
		return "", fmt.Errorf("it calls itself %s, but lists no manifests", mediaType)
	}
	return mediaType, nil
}

// kindOf is "image", "index", or "" for a media type we do not know.
func kindOf(mediaType string) string {
	switch mediaType {
	case ocispec.MediaTypeImageManifest, dockerManifest:
		return "image"
	case ocispec.MediaTypeImageIndex, dockerList:
		return "index"
	}
	return ""
}
