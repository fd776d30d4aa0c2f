// Package origintest has what tests do with a repository of a registry before docker quay finds things in it.
package origintest

import (
	"context"
	"encoding/json"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// pushWithin bounds one request to a registry on this machine.
const pushWithin = 20 * time.Second

// Repository opens one at a registry, as somebody with no login.
func Repository(t *testing.T, host string) *origin.Repository {
	t.Helper()
	c, err := origin.New(origin.Options{HostDirs: []string{t.TempDir()}, DockerConfigDir: t.TempDir(), MaxRetries: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	ref, err := reference.ParseNormalizedNamed(host + "/team/app")
	if err != nil {
		t.Fatal(err)
	}
	r, err := c.Repository(ref)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Push stores a blob or manifest in a repository.
func Push(t *testing.T, r *origin.Repository, mediaType string, text []byte) ocispec.Descriptor {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), pushWithin)
	defer cancel()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(text), Size: int64(len(text))}
	if err := r.Push(ctx, d, text); err != nil {
		t.Fatal(err)
	}
	return d
}

// PushManifest stores a manifest with its empty config.
func PushManifest(t *testing.T, r *origin.Repository, m ocispec.Manifest) ocispec.Descriptor {
	t.Helper()
	m.Versioned, m.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageManifest
	m.Config = Push(t, r, ocispec.MediaTypeEmptyJSON, []byte("{}"))
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return Push(t, r, m.MediaType, text)
}
