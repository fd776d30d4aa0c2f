package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// skipped is what treesum.py leaves out, for the reason it gives.
var skipped = []string{
	"dev", "proc", "sys", "run", ".dockerenv", "etc/hostname", "etc/hosts", "etc/resolv.conf", "etc/mtab",
	"stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark",
}

// TreeSum is what /app/treesum.py must print in a container of the image: a SHA-256 over every file of the root, and how many
// there are.
func (i *Image) TreeSum() (string, error) {
	root, err := i.root()
	if err != nil {
		return "", err
	}
	sum, count := sha256.New(), 0
	// Folder by folder and by name inside each: not the order of whole paths, where "a-b" comes before "a/b".
	var walk func(dir string, prefix string)
	children := map[string][]string{}
	for name := range root {
		if name != "." {
			children[path.Dir(name)] = append(children[path.Dir(name)], path.Base(name))
		}
	}
	walk = func(dir, prefix string) {
		slices.Sort(children[dir])
		for _, base := range children[dir] {
			name := prefix + base
			if slices.Contains(skipped, name) {
				continue
			}
			e := root[name]
			h := &e.Header
			owner := fmt.Sprintf("%d:%d", h.Uid, h.Gid)
			count++
			switch h.Typeflag {
			case tar.TypeDir:
				fmt.Fprintf(sum, "dir %o %s %s\n", h.Mode, owner, name)
				walk(name, name+"/")
			case tar.TypeSymlink:
				fmt.Fprintf(sum, "link %s %s %s\n", owner, h.Linkname, name)
			case tar.TypeReg:
				fmt.Fprintf(sum, "file %o %s %d %d %x %s\n", h.Mode, owner, h.ModTime.Unix(), h.Size, sha256.Sum256(e.Body), name)
			default:
				fmt.Fprintf(sum, "other %o %s %s\n", h.Mode, owner, name)
			}
		}
	}
	walk(".", "")
	return fmt.Sprintf("%x %d", sum.Sum(nil), count), nil
}

// root is all layers, one over another.
func (i *Image) root() (Tree, error) {
	root := Tree{}
	for _, desc := range i.Layers {
		layer, err := i.readLayer(desc)
		if err != nil {
			return nil, err
		}
		root.apply(layer)
	}
	return root, nil
}

// FileSums are the SHA-256 of the contents of the image's regular files, in hexadecimal, by their absolute paths.
func (i *Image) FileSums() (map[string]string, error) {
	files, err := i.FileBytes()
	if err != nil {
		return nil, err
	}
	sums := map[string]string{}
	for name, body := range files {
		sums[name] = fmt.Sprintf("%x", sha256.Sum256(body))
	}
	return sums, nil
}

// FileBytes are the contents themselves.
func (i *Image) FileBytes() (map[string][]byte, error) {
	root, err := i.root()
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{}
	for name, e := range root {
		if e.Header.Typeflag == tar.TypeReg {
			files["/"+name] = e.Body
		}
	}
	return files, nil
}

// apply puts a layer over t: whiteouts first (OCI image-spec, layer.md), then what is in it, hard links as what they link to.
func (t Tree) apply(layer Tree) {
	for name := range layer {
		base, ok := strings.CutPrefix(path.Base(name), ".wh.")
		if !ok {
			continue
		}
		gone := path.Join(path.Dir(name), base)
		for old := range t {
			if base == ".wh..opq" && strings.HasPrefix(old, path.Dir(name)+"/") || old == gone || strings.HasPrefix(old, gone+"/") {
				delete(t, old)
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(layer)) {
		if strings.HasPrefix(path.Base(name), ".wh.") {
			continue
		}
		e := layer[name]
		if e.Header.Typeflag == tar.TypeLink {
			e = layer[clean(e.Header.Linkname)]
		}
		t[name] = e
	}
}

// readLayer decompresses a layer into memory.
func (i *Image) readLayer(desc ocispec.Descriptor) (Tree, error) {
	raw, err := os.ReadFile(i.Path(desc.Digest))
	if err != nil {
		return nil, fmt.Errorf("read a layer: %w", err)
	}
	var r io.Reader = bytes.NewReader(raw)
	switch desc.MediaType {
	case ocispec.MediaTypeImageLayerGzip:
		r, err = gzip.NewReader(r)
	case ocispec.MediaTypeImageLayerZstd:
		var z *zstd.Decoder
		if z, err = zstd.NewReader(r); err == nil {
			defer z.Close()
			r = z
		}
	}
	if err != nil {
		return nil, fmt.Errorf("decompress the layer %s: %w", desc.Digest, err)
	}
	return ReadTree(r)
}
