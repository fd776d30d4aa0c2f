package published

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxReferrers bounds how many referrers are read for one image: each is a round trip that a container
// waits for. A second one is there when a newer program made other indexes of the same layers.
const maxReferrers = 4

// Repository is where an image is; origin.Repository is one. Both methods check what they return
// against the digest asked for, and bound it.
type Repository interface {
	Name() reference.Named
	// Referrers lists the manifests whose subject is subject, of an artifact type or of none that
	// the registry would tell.
	Referrers(ctx context.Context, subject digest.Digest, artifactType string) ([]ocispec.Descriptor, error)
	Manifest(ctx context.Context, tagOrDigest string) (ocispec.Descriptor, []byte, error)
}

// artifact is a referrer that holds indexes.
type artifact struct {
	digest  digest.Digest
	entries []entry
}

// referrers reads what is published for an image. What cannot be used is left out:
// trouble is the first reason. err is of the list; or of a deadline that passed before anything
// was read.
func referrers(ctx context.Context, repo Repository, subject digest.Digest, log *slog.Logger) (found []artifact, trouble, err error) {
	list, err := repo.Referrers(ctx, subject, ArtifactType)
	if err != nil {
		return nil, nil, err
	}
	for _, d := range worthReading(list) {
		a, err := readReferrer(ctx, repo, d.Digest, subject)
		switch {
		case err != nil && ctx.Err() != nil:
			if len(found) > 0 {
				err = nil // what was read will do
			}
			return found, trouble, err
		case err != nil:
			log.Warn("what is published for an image is not used", "image", repo.Name(), "manifest", subject, "referrer", d.Digest, "error", err)
			if trouble == nil {
				trouble = err
			}
		case len(a.entries) > 0:
			found = append(found, a)
		}
	}
	return found, trouble, nil
}

func readReferrer(ctx context.Context, repo Repository, d, subject digest.Digest) (artifact, error) {
	_, text, err := repo.Manifest(ctx, d.String())
	if err != nil {
		return artifact{}, err
	}
	entries, err := parseManifest(text, subject)
	if err != nil {
		return artifact{}, fmt.Errorf("%s@%s: %w", repo.Name(), d, err)
	}
	return artifact{digest: d, entries: entries}, nil
}

// worthReading are the entries of a list that are read, in the order in which they are: those that say that
// they hold indexes before those that say nothing, and of each the last in the list first, because
// registries without the referrers API have them in the order in which they came.
func worthReading(list []ocispec.Descriptor) []ocispec.Descriptor {
	var telling, silent []ocispec.Descriptor
	for _, d := range slices.Backward(list) {
		switch {
		case d.MediaType != ocispec.MediaTypeImageManifest || d.Size > maxManifest:
		case d.ArtifactType == ArtifactType:
			telling = append(telling, d)
		default:
			silent = append(silent, d)
		}
	}
	all := append(telling, silent...)
	return all[:min(len(all), maxReferrers)]
}
