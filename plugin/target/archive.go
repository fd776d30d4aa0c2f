package target

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// archiveTime is the time of every entry: the archive of an image is the same whenever it is made.
var archiveTime = time.Unix(0, 0)

// writeArchive streams the image as a tar that is both an OCI image layout and what `docker save` of old wrote
// (manifest.json), so that engines of any age load it. root is the manifest or index that the layout names; of an
// index only our manifest is there.
func writeArchive(ctx context.Context, w io.Writer, img Image, ref reference.Named, root ocispec.Descriptor) error {
	tw := tar.NewWriter(w)
	named := root
	named.Annotations = map[string]string{images.AnnotationImageName: ref.String()}
	if t, ok := ref.(reference.Tagged); ok {
		named.Annotations[ocispec.AnnotationRefName] = t.Tag()
	}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{named},
	}
	type saved struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	entry := saved{Config: blobPath(img.Config().Digest), RepoTags: []string{reference.FamiliarString(ref)}}
	for _, l := range img.Layers() {
		entry.Layers = append(entry.Layers, blobPath(l.Digest))
	}
	for _, doc := range []struct {
		name  string
		value any
	}{
		{ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}},
		{ocispec.ImageIndexFile, index},
		{"manifest.json", []saved{entry}},
	} {
		b, err := json.Marshal(doc.value)
		if err != nil {
			return err
		}
		if err := writeEntry(tw, doc.name, int64(len(b))); err != nil {
			return err
		}
		if _, err := tw.Write(b); err != nil {
			return err
		}
	}
	written := map[digest.Digest]bool{}
	for _, d := range append([]ocispec.Descriptor{root, img.Manifest(), img.Config()}, img.Layers()...) {
		if written[d.Digest] {
			continue
		}
		written[d.Digest] = true
		if err := writeBlob(ctx, tw, img, d); err != nil {
			return err
		}
	}
	return tw.Close()
}

func writeBlob(ctx context.Context, tw *tar.Writer, img Image, d ocispec.Descriptor) error {
	rc, err := img.Open(ctx, d)
	if err != nil {
		return err
	}
	defer rc.Close()
	if err := writeEntry(tw, blobPath(d.Digest), d.Size); err != nil {
		return err
	}
	n, err := io.Copy(tw, rc)
	if err != nil {
		return err
	}
	if n != d.Size {
		return fmt.Errorf("layer %s of %s has %d bytes instead of %d: %w", shortDigest(d.Digest), img.Ref(), n, d.Size, io.ErrUnexpectedEOF)
	}
	return nil
}

func writeEntry(tw *tar.Writer, name string, size int64) error {
	return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o444, ModTime: archiveTime})
}

func blobPath(d digest.Digest) string {
	return ocispec.ImageBlobsDir + "/" + d.Algorithm().String() + "/" + d.Encoded()
}
