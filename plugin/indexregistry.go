package plugin

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	indexes "github.com/docker-quay/docker-quay/snapshotter/index/published"
)

// maxPlatforms bounds the manifests of an image that are indexed one after another. The images with the most have some twenty.
const maxPlatforms = 128

// attestation is the annotation by which build tools list what they say of an image among its platforms.
const attestation = "vnd.docker.reference.type"

// ImageManifests asks an image's registry which manifests its name stands for: one, or one for each platform.
func ImageManifests(ctx context.Context, r Request) (_ []ocispec.Descriptor, err error) {
	repo, c, err := repositoryOf(r)
	if err != nil {
		return nil, err
	}
	defer closing(c, &err)
	name := ""
	switch ref := r.Ref.(type) {
	case reference.Digested:
		name = ref.Digest().String()
	case reference.Tagged:
		name = ref.Tag()
	}
	desc, text, err := repo.Manifest(ctx, name)
	if err != nil {
		return nil, err
	}
	if !images.IsIndexType(desc.MediaType) {
		return []ocispec.Descriptor{desc}, nil
	}
	var list ocispec.Index
	if err := json.Unmarshal(text, &list); err != nil {
		return nil, fmt.Errorf("%s: its index: %w: %w", r.Ref, fetcher.ErrUnsupported, err)
	}
	found := platformManifests(list.Manifests)
	if len(found) > maxPlatforms {
		return nil, fmt.Errorf("%s is there for %d platforms: choose one with --platform: %w", r.Ref, len(found), fetcher.ErrUnsupported)
	}
	return found, nil
}

// platformManifests are the entries of an index that are images, each once.
func platformManifests(all []ocispec.Descriptor) []ocispec.Descriptor {
	seen := map[digest.Digest]bool{}
	var found []ocispec.Descriptor
	for _, m := range all {
		switch {
		case !images.IsManifestType(m.MediaType), m.Digest.Validate() != nil, seen[m.Digest]:
		case m.ArtifactType != "", m.Annotations[attestation] != "":
		case m.Platform != nil && m.Platform.OS == "unknown":
		default:
			seen[m.Digest] = true
			found = append(found, m)
		}
	}
	return found
}

// StoreIndexes puts indexes of layers beside an image, into its registry, with the user's own login. It says which referrer they are in,
// and whether that had to be pushed. Without layers it only finds out whether it may.
func StoreIndexes(ctx context.Context, r Request, subject ocispec.Descriptor, layers []indexes.Layer) (referrer digest.Digest, pushed bool, err error) {
	repo, c, err := repositoryOf(r)
	if err != nil {
		return "", false, err
	}
	defer closing(c, &err)
	if len(layers) == 0 {
		return "", false, indexes.Try(ctx, repo)
	}
	return indexes.Store(ctx, repo, subject, layers)
}

// repositoryOf opens an image's repository with the user's own login. Close the client afterwards.
func repositoryOf(r Request) (*origin.Repository, *origin.Client, error) {
	c, err := origin.New(origin.Options{
		DockerConfigDir: r.DockerConfigDir, Insecure: r.Insecure, UserAgent: "docker-quay/" + fetcher.Version, Log: r.Log,
	})
	if err != nil {
		return nil, nil, err
	}
	repo, err := c.Repository(r.Ref)
	if err != nil {
		_ = c.Close()
		return nil, nil, err
	}
	return repo, c, nil
}
