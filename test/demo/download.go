package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/test/image"
)

// download copies an image of a real registry into an OCI layout, with this machine's own credentials and network: the
// demo's nodes have no way out of theirs.
func download(ctx context.Context, name, dir string) (*image.Image, error) {
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, fmt.Errorf("image %q: %w", name, err)
	}
	st, err := store.Open(store.Options{Dir: filepath.Join(dir, "store")})
	if err != nil {
		return nil, err
	}
	defer st.Close()
	f, err := fetcher.New(ctx, fetcher.Options{Store: st})
	if err != nil {
		return nil, err
	}
	defer f.Close()
	o, err := origin.New(origin.Options{})
	if err != nil {
		return nil, err
	}
	defer o.Close()
	img, err := f.Image(ctx, ref, fetcher.ImageOptions{Origin: o})
	if err != nil {
		return nil, err
	}
	defer img.Close()
	layout := filepath.Join(dir, "layout")
	for _, d := range append([]ocispec.Descriptor{img.Manifest, img.Config}, img.Layers...) {
		if err := save(ctx, img, d, layout); err != nil {
			return nil, err
		}
	}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{img.Manifest}})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(layout, ocispec.ImageIndexFile), index, 0o644); err != nil {
		return nil, err
	}
	return image.Load(layout)
}

// save writes one blob into the layout.
func save(ctx context.Context, img *fetcher.Image, d ocispec.Descriptor, layout string) error {
	blobs := filepath.Join(layout, ocispec.ImageBlobsDir, d.Digest.Algorithm().String())
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		return err
	}
	in, err := img.Open(ctx, d)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(filepath.Join(blobs, d.Digest.Encoded()))
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}
