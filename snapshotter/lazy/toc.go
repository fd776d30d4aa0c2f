package lazy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxTOC bounds the compressed table of contents, in bytes. A layer of 20,000
	// files has about 1.5 MiB; this is room for half a million.
	maxTOC = 64 << 20

	// maxTOCJSON bounds the decompressed table, so that a few crafted kilobytes
	// cannot fill the memory of the node. JSON compresses to about a seventh.
	maxTOCJSON = 512 << 20

	// Both spellings are in use for the digest of the compressed table of a
	// zstd:chunked layer: the first by containers/storage (podman, buildah,
	// skopeo) since 2021, the second by stargz-snapshotter's converter.
	zstdChecksum    = "io.github.containers.zstd-chunked.manifest-checksum"
	zstdChecksumOld = zstdchunked.ManifestChecksumAnnotation
)

// errPlain says that a layer has no table of contents, so that nothing of it can be
// read before all of it is there. It is the ordinary case, not a failure.
var errPlain = errors.New("the layer has no table of contents")

// format is a way to write a layer that can be read at random.
type format string

const (
	formatEStargz     format = "eStargz"
	formatZstdChunked format = "zstd:chunked"
)

// tocRef is how an image manifest vouches for the table of contents of one layer:
// by the digest of the JSON, of its compressed form, or both.
type tocRef struct {
	json       digest.Digest
	compressed digest.Digest
}

// tocRefOf collects what vouches for a layer's table: the manifest's annotations,
// and the label that containerd copied from them where the manifest has none.
// The error is errPlain when nothing does: an unchecked table is never used.
func tocRefOf(desc ocispec.Descriptor, t Target) (tocRef, error) {
	var r tocRef
	for _, a := range []struct {
		to   *digest.Digest
		text string
	}{
		{&r.json, desc.Annotations[estargz.TOCJSONDigestAnnotation]},
		{&r.compressed, first(desc.Annotations, zstdChecksum, zstdChecksumOld)},
	} {
		if a.text == "" {
			continue
		}
		d, err := digest.Parse(a.text)
		if err != nil {
			return tocRef{}, fmt.Errorf("the manifest's digest %q of the layer's table of contents is malformed: %w", a.text, err)
		}
		*a.to = d
	}
	if r.json == "" {
		r.json = t.TOC
	}
	if r == (tocRef{}) {
		return tocRef{}, errPlain
	}
	return r, nil
}

// toc is the end of a layer blob: its table of contents and footer, checked.
type toc struct {
	format format
	digest digest.Digest // of the JSON
	off    int64         // where bytes starts in the blob
	bytes  []byte        // from off to the blob's end
	// implied is a folder that the layer leaves out though it has something in it; "" when there is none.
	implied string
}

// ranged is what a table of contents is read from.
type ranged interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}

// readTOC fetches the end of a layer and checks the table of contents in it
// against ref, before anything parses it.
func readTOC(ctx context.Context, blob ranged, size int64, ref tocRef) (*toc, error) {
	t, json, err := readTail(ctx, blob, size, ref)
	if err != nil {
		return nil, err
	}
	defer json.Close()
	sum := digest.Canonical.Digester()
	limited := &io.LimitedReader{R: json, N: maxTOCJSON + 1}
	text := io.TeeReader(limited, sum.Hash())
	table, tableErr := parseTable(text)
	if _, err := io.Copy(io.Discard, text); err != nil {
		return nil, fmt.Errorf("the table of contents does not decompress: %w", err)
	}
	if limited.N <= 0 {
		return nil, fmt.Errorf("the table of contents is larger than %d MiB", maxTOCJSON>>20)
	}
	t.digest = sum.Digest()
	if ref.json != "" && t.digest != ref.json {
		return nil, fmt.Errorf("the table of contents is not the one in the manifest: its digest is %s, not %s", t.digest, ref.json)
	}
	if tableErr != nil {
		return nil, tableErr
	}
	if err := checkEntries(table); err != nil {
		return t, err
	}
	t.implied = impliedFolder(table)
	return t, nil
}

// readTail fetches the end of a layer, checks the compressed table of contents if ref has a digest
// of that, and opens it. It takes two reads: one of the footer (about fifty bytes), which says where
// the table is, and one of the table.
func readTail(ctx context.Context, blob ranged, size int64, ref tocRef) (*toc, io.ReadCloser, error) {
	footer := make([]byte, min(size, max(estargz.FooterSize, zstdchunked.FooterSize)))
	if len(footer) < zstdchunked.FooterSize {
		return nil, nil, fmt.Errorf("the layer of %d bytes is too short for the table of contents the manifest promises", size)
	}
	if _, err := blob.ReadAt(ctx, footer, size-int64(len(footer))); err != nil {
		return nil, nil, fmt.Errorf("the end of the layer could not be read: %w", err)
	}
	t := &toc{}
	off, length, open, err := parseFooter(footer, size, t)
	if err != nil {
		return nil, nil, err
	}
	t.off, t.bytes = off, make([]byte, size-off)
	if _, err := blob.ReadAt(ctx, t.bytes, off); err != nil {
		return nil, nil, fmt.Errorf("the table of contents could not be read: %w", err)
	}
	compressed := t.bytes[:length]
	if ref.compressed != "" {
		if got := ref.compressed.Algorithm().FromBytes(compressed); got != ref.compressed {
			return nil, nil, fmt.Errorf("the table of contents is not the one in the manifest: its digest is %s, not %s", got, ref.compressed)
		}
	}
	json, err := open(bytes.NewReader(compressed))
	if err != nil {
		return nil, nil, fmt.Errorf("the table of contents does not decompress: %w", err)
	}
	return t, json, nil
}

// parseFooter finds the table of contents of a blob of size bytes from the blob's
// last bytes, whichever of the formats it is. It returns where the compressed
// table lies, and what decompresses it.
func parseFooter(footer []byte, size int64, t *toc) (off, length int64, open func(io.Reader) (io.ReadCloser, error), err error) {
	var footerLen int64
	if len(footer) >= estargz.FooterSize {
		gz := new(estargz.GzipDecompressor)
		_, off, length, err = gz.ParseFooter(footer[len(footer)-estargz.FooterSize:])
		t.format, footerLen, open = formatEStargz, estargz.FooterSize, gz.DecompressTOC
	}
	if len(footer) < estargz.FooterSize || err != nil {
		zs := new(zstdchunked.Decompressor)
		_, off, length, err = zs.ParseFooter(footer[len(footer)-zstdchunked.FooterSize:])
		t.format, footerLen, open = formatZstdChunked, zstdchunked.FooterSize, zs.DecompressTOC
	}
	if err != nil {
		return 0, 0, nil, fmt.Errorf("the layer ends in neither an eStargz nor a zstd:chunked footer: %w", err)
	}
	if length <= 0 {
		length = size - off - footerLen
	}
	if off < 0 || length <= 0 || off > size-footerLen || length > size-footerLen-off {
		return 0, 0, nil, fmt.Errorf("the %s footer names a table of contents outside the layer", t.format)
	}
	if size-off > maxTOC {
		return 0, 0, nil, fmt.Errorf("the table of contents of %d MiB is larger than the %d MiB allowed", (size-off)>>20, maxTOC>>20)
	}
	return off, length, open, nil
}
