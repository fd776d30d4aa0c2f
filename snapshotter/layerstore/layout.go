package layerstore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
)

// The names of the files and folders of a store; see the package comment.
const (
	dirLayers = "layers"
	dirNew    = "new"
	dirBroken = "broken"
	dirTrash  = "trash"

	fileInfo     = "layer"
	fileIndex    = "index"
	fileMeta     = "meta.erofs"
	fileData     = "data"
	filePresent  = "present"
	fileComplete = "complete"
	fileOrder    = "order"
	fileRefined  = "refined"
)

// infoVersion is the version of info and of the files beside it. A store of another
// version is not read.
const infoVersion = 2

// maxInfo bounds the file that info is read from: maxChunks in 3 bytes each, as base64.
const maxInfo = 4*maxChunks + 4096

// info is what is known of a layer without its index, so that opening the store and
// reading what is present need not decode it.
type info struct {
	Version   int           `json:"version"`
	Blob      digest.Digest `json:"blob"`
	BlobSize  int64         `json:"blobSize"`
	DiffID    digest.Digest `json:"diffID,omitempty"`
	DataSize  int64         `json:"dataSize"`
	IndexSize int64         `json:"indexSize"`
	IndexSum  digest.Digest `json:"indexSum"`
	MetaSize  int64         `json:"metaSize"`
	Implicit  bool          `json:"implicit,omitempty"` // an entry of the index is
	Chunks    []byte        `json:"chunks"`             // see chunkTable.pack
}

func folderName(d digest.Digest) string { return d.Algorithm().String() + "-" + d.Encoded() }

func parseFolder(name string) (digest.Digest, error) {
	algo, hex, ok := strings.Cut(name, "-")
	d := digest.Digest(algo + ":" + hex)
	if !ok || d.Validate() != nil {
		return "", fmt.Errorf("%q is not the name of a layer", name)
	}
	return d, nil
}

func readInfo(dir string) (info, chunkTable, error) {
	var in info
	b, err := readBounded(filepath.Join(dir, fileInfo), maxInfo)
	if err != nil {
		return in, chunkTable{}, err
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return in, chunkTable{}, fmt.Errorf("read %s: %w", filepath.Join(dir, fileInfo), err)
	}
	if in.Version != infoVersion {
		return in, chunkTable{}, fmt.Errorf("%s is of version %d, this program knows %d", dir, in.Version, infoVersion)
	}
	if in.Blob.Validate() != nil || in.BlobSize <= 0 || in.DataSize < 0 || in.DiffID != "" && in.DiffID.Validate() != nil {
		return in, chunkTable{}, fmt.Errorf("%s describes no layer", filepath.Join(dir, fileInfo))
	}
	t, err := unpackTable(in.Chunks, in.DataSize)
	if err != nil {
		return in, chunkTable{}, fmt.Errorf("read %s: %w", filepath.Join(dir, fileInfo), err)
	}
	in.Chunks = nil
	return in, t, nil
}

func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, most)
	}
	return b, nil
}

// writeFile writes a new file and syncs it.
func writeFile(path string, write func(io.Writer) error) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := write(f); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Sync()
}

// replaceFile puts b in the place of path, so that a crash leaves the old or the new.
func replaceFile(path string, b []byte) error {
	aside := path + ".new"
	err := writeFile(aside, func(w io.Writer) error { _, err := w.Write(b); return err })
	if err == nil {
		err = os.Rename(aside, path)
	}
	if err != nil {
		os.Remove(aside)
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// onDisk is what the files of a folder take, as the file system counts it.
func onDisk(dir string) (n int64) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return 0
	}
	for _, e := range names {
		n += blocks(filepath.Join(dir, e.Name()))
	}
	return n
}
