package published

import ocispec "github.com/opencontainers/image-spec/specs-go/v1"

// OwnTable names the table of contents that a layer brings along, as the image's manifest vouches
// for it: "eStargz", "zstd:chunked", or "" for none. Such a layer needs no published index.
func OwnTable(layer ocispec.Descriptor) string {
	for _, t := range []struct{ annotation, format string }{
		{"containerd.io/snapshot/stargz/toc.digest", "eStargz"},
		// Both spellings are in use, the first by podman, buildah and skopeo, the second by
		// stargz-snapshotter's converter.
		{"io.github.containers.zstd-chunked.manifest-checksum", "zstd:chunked"},
		{"io.containers.zstd-chunked.manifest-checksum", "zstd:chunked"},
	} {
		if layer.Annotations[t.annotation] != "" {
			return t.format
		}
	}
	return ""
}
