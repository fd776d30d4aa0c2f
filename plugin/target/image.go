// Package target puts an image where containers can be started from it.
//
// The bytes of the image come from somewhere else (registry, peers, cache) and are known here only as an Image: a set of
// descriptors and a way to read each of them. Where they go is a Target:
//
//   - Docker with the containerd image store on this machine: our own pull, through containerd, into Docker's namespace.
//     The image has the name and the digest that `docker pull` would have given it, and its layers may be mounted before
//     they are complete when the snapshotter is a remote one;
//   - any other Docker Engine on this machine: the engine pulls by digest from a mirror on loopback, then the image is
//     tagged with its real name and the temporary name is taken away;
//   - a Docker Engine elsewhere: the image is streamed to it as an archive (`docker load`);
//   - a containerd namespace: as the first, with the labels that CRI wants for Kubernetes' namespace;
//   - the store only: everything is fetched and checked, and no engine is told.
//
// Find chooses by looking and says why. No target trusts what it reads: containerd and the engines check digests again.
package target

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/plugin/progress"
)

// Image is an image of one platform, its bytes to be had by descriptor. It must be safe for concurrent use.
type Image interface {
	// Ref is the name the user gave, normalized, with a tag or a digest.
	Ref() reference.Named
	// Target is what Ref points to: an index, or a manifest.
	Target() ocispec.Descriptor
	// Manifest is the manifest of the wanted platform: Target itself when that is a manifest.
	Manifest() ocispec.Descriptor
	Config() ocispec.Descriptor
	// Layers come in the manifest's order, the lowest first.
	Layers() []ocispec.Descriptor
	// Open streams a blob or manifest of the image. The stream ends with an error unless it delivered every byte of
	// desc.Size and the digest was right.
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	// Fetch returns when every blob of the image is complete in the store.
	Fetch(ctx context.Context) error
	// Progress has an element for each blob, in an order that does not change.
	Progress() []progress.Blob
	Close() error
}

// Target takes one image at a time.
type Target interface {
	// String says where images go, for the user: "Docker (containerd image store, snapshotter overlayfs) at unix:///…".
	String() string
	// Platform is the engine's, nil when it runs on this machine or there is none.
	Platform() *ocispec.Platform
	// Pull returns when containers can be started from the image, and, unless lazy layers were asked to stay so, when
	// it can be pushed and saved. It holds no lock and may be cancelled at any time; a later Pull goes on from there.
	Pull(ctx context.Context, img Image) (Result, error)
	Close() error
}

// Result says what Pull did.
type Result struct {
	Reference string          // by which the engine knows the image, as it can be given to `docker run`
	UpToDate  bool            // nothing had to be changed
	Lazy      []digest.Digest // layers that were mounted before they were complete
	Notes     []string        // what a user should know besides, each a sentence
}

// What Find and Pull may end with, for errors.Is.
var (
	// ErrNoTarget: no engine was found, or not the one asked for.
	ErrNoTarget = errors.New("nothing to pull into")
	// ErrUnknown: there is no such kind of target.
	ErrUnknown = errors.New("no such target")
	// ErrRefused: an engine was found and did not take the image.
	ErrRefused = errors.New("refused the image")
)

// name is the name the image gets: "docker.io/library/x:tag", or with a digest and no tag, as the engine itself does it.
func name(ref reference.Named) string {
	if d, ok := ref.(reference.Digested); ok {
		return reference.TrimNamed(ref).Name() + "@" + d.Digest().String()
	}
	return reference.TagNameOnly(ref).String()
}

// familiar is the name as docker shows it: "x:tag".
func familiar(ref reference.Named) string {
	if d, ok := ref.(reference.Digested); ok {
		return reference.FamiliarName(ref) + "@" + d.Digest().String()
	}
	return reference.FamiliarString(reference.TagNameOnly(ref))
}

// readAll reads a small blob of the image: an index, a manifest, a config.
func readAll(ctx context.Context, img Image, desc ocispec.Descriptor) ([]byte, error) {
	if desc.Size > maxDocument {
		return nil, fmt.Errorf("%s of %s has %d bytes, more than the %d that a manifest may have", desc.Digest, img.Ref(), desc.Size, int64(maxDocument))
	}
	rc, err := img.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, desc.Size+1))
	if err != nil {
		return nil, fmt.Errorf("read %s of %s: %w", desc.Digest, img.Ref(), err)
	}
	if int64(len(b)) != desc.Size {
		return nil, fmt.Errorf("%s of %s has %d bytes instead of %d: %w", desc.Digest, img.Ref(), len(b), desc.Size, io.ErrUnexpectedEOF)
	}
	return b, nil
}

// maxDocument is the size up to which registries must accept manifests (4 MiB, OCI distribution), doubled as
// containerd does.
const maxDocument = 8 << 20

// shortDigest is how docker prints layer IDs.
func shortDigest(d digest.Digest) string {
	_, hex, _ := strings.Cut(d.String(), ":")
	return hex[:min(12, len(hex))]
}
