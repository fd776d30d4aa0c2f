package image

import (
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Format is how the layers of an image are compressed.
type Format int

// The formats.
const (
	Gzip        Format = iota // one plain gzip stream
	EStargz                   // gzip by file with a table of contents; any gzip reader can read it
	ZstdChunked               // zstd by file with a table of contents
	Zstd                      // one plain zstd stream
	Tar                       // not compressed
)

// Formats are all of them.
var Formats = []Format{Gzip, EStargz, ZstdChunked, Zstd, Tar}

func (f Format) String() string {
	return [...]string{"gzip", "estargz", "zstdchunked", "zstd", "tar"}[f]
}

// ParseFormat is the inverse of Format.String.
func ParseFormat(s string) (Format, error) {
	for _, f := range Formats {
		if f.String() == s {
			return f, nil
		}
	}
	return 0, fmt.Errorf("no layer format %q: one of %v", s, Formats)
}

// parallelism of the eStargz builder. It cuts the layer in so many parts: a fixed number gives the same bytes on every machine.
const parallelism = 2

// addLayer adds the tar in the file as a layer of this format.
func (l *layout) addLayer(tarPath string, f Format, comment string) error {
	in, err := os.Open(tarPath)
	if err != nil {
		return err
	}
	defer in.Close()
	var desc ocispec.Descriptor
	var diffID digest.Digest
	switch f {
	case EStargz, ZstdChunked:
		desc, diffID, err = l.indexed(in, f)
	default:
		desc, diffID, err = l.stream(in, f)
	}
	if err != nil {
		return fmt.Errorf("make the %s layer %q: %w", f, comment, err)
	}
	epoch := Epoch
	l.layers = append(l.layers, desc)
	l.diffIDs = append(l.diffIDs, diffID)
	l.history = append(l.history, ocispec.History{Created: &epoch, CreatedBy: comment})
	return nil
}

// stream compresses a tar as a whole.
func (l *layout) stream(in io.Reader, f Format) (ocispec.Descriptor, digest.Digest, error) {
	mediaType := ocispec.MediaTypeImageLayer
	digester := digest.Canonical.Digester()
	d, n, err := l.addBlob(func(w io.Writer) error {
		out := io.WriteCloser(nopCloser{w})
		var err error
		switch f {
		case Gzip:
			mediaType = ocispec.MediaTypeImageLayerGzip
			out, err = gzip.NewWriterLevel(w, 6)
		case Zstd:
			mediaType = ocispec.MediaTypeImageLayerZstd
			// One goroutine: blocks are then cut at the same places every time.
			out, err = zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
		}
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.MultiWriter(out, digester.Hash()), in); err != nil {
			return err
		}
		return out.Close()
	})
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: n}, digester.Digest(), err
}

// indexed compresses a tar file by file and adds its table of contents, whose digest and place the descriptor names.
func (l *layout) indexed(in *os.File, f Format) (ocispec.Descriptor, digest.Digest, error) {
	info, err := in.Stat()
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	mediaType, annotations := ocispec.MediaTypeImageLayerGzip, map[string]string{}
	options := []estargz.Option{estargz.WithParallelism(parallelism), estargz.WithCompressionLevel(6)}
	if f == ZstdChunked {
		mediaType = ocispec.MediaTypeImageLayerZstd
		options = append(options, estargz.WithCompression(&zstdCompression{
			new(zstdchunked.Decompressor),
			&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations},
		}))
	}
	blob, err := estargz.Build(io.NewSectionReader(in, 0, info.Size()), options...)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	defer blob.Close()
	d, n, err := l.addBlob(func(w io.Writer) error {
		if _, err := io.Copy(w, blob); err != nil {
			return err
		}
		return blob.Close() // the digests of contents and table are known from here on
	})
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	annotations[estargz.TOCJSONDigestAnnotation] = blob.TOCDigest().String()
	annotations[estargz.StoreUncompressedSizeAnnotation] = strconv.FormatInt(size, 10)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: n, Annotations: annotations}, blob.DiffID(), nil
}

// zstdCompression is both halves of estargz's Compression.
type zstdCompression struct {
	*zstdchunked.Decompressor
	*zstdchunked.Compressor
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }
