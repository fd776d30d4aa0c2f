package layerfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/snapshotter/index/published"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// What the kernel does not tell, and the next daemon has to know, is in small files below Options.State. They are written
// before what they tell of, and need to outlive the process alone: after a reboot there are no mounts.
const (
	dirMounts = "mounts" // of each mount, by its snapshot: what kind it is
	dirOpens  = "opens"  // of each layer that reads from blobfs: how often
	dirClaims = "claims" // of each layer with a published index that has not been checked, or was false: why
)

// notePath is the note of a mount.
func (f *FileSystem) notePath(at string) string {
	return filepath.Join(f.o.State, dirMounts, filepath.Base(filepath.Dir(at)))
}

func (f *FileSystem) note(at string, k kind) error {
	if err := os.WriteFile(f.notePath(at), []byte(k), 0o600); err != nil {
		return fmt.Errorf("the mount on %s cannot be noted: %w", at, err)
	}
	return nil
}

func (f *FileSystem) unnote(at string) { _ = os.Remove(f.notePath(at)) }

// noted is the kind of a mount of a former daemon. Without a note it is the one that is right for both.
func (f *FileSystem) noted(at string) kind {
	if b, err := os.ReadFile(f.notePath(at)); err == nil && kind(b) == kindData {
		return kindData
	}
	return kindBlobs
}

// opens says that the kernel has a layer's file open, and where what is missing of it comes from.
type opens struct {
	Count    int           `json:"count"`
	Ref      string        `json:"ref"`
	Manifest digest.Digest `json:"manifest,omitempty"`
	Layer    digest.Digest `json:"layer"`
}

func (f *FileSystem) opensPath(d digest.Digest) string {
	return filepath.Join(f.o.State, dirOpens, d.Encoded())
}

func (f *FileSystem) noteOpens(s *served, n int) error {
	path := f.opensPath(s.digest)
	if n == 0 {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(opens{Count: n, Ref: s.target.Ref, Manifest: s.target.Manifest, Layer: s.digest})
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// notedOpens are those of the former daemon.
func (f *FileSystem) notedOpens() (found []opens) {
	names, err := os.ReadDir(filepath.Join(f.o.State, dirOpens))
	if err != nil {
		f.log.Error("which layers are being read cannot be found out", "error", err)
	}
	for _, e := range names {
		path := filepath.Join(f.o.State, dirOpens, e.Name())
		if !f.link.taken || filepath.Ext(path) != "" {
			_ = os.Remove(path) // of another connection, or never finished
			continue
		}
		var o opens
		b, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(b, &o)
		}
		if err == nil && (o.Count <= 0 || o.Layer.Validate() != nil) {
			err = errors.New("it says nothing")
		}
		if err != nil {
			f.log.Error("a note of who reads a layer is unreadable", "file", path, "error", err)
			continue
		}
		found = append(found, o)
	}
	return found
}

func (o opens) target() lazy.Target {
	return lazy.Target{Ref: o.Ref, Manifest: o.Manifest, Layer: o.Layer}
}

func (f *FileSystem) claimPath(d digest.Digest) string {
	return filepath.Join(f.o.State, dirClaims, d.Encoded())
}

// claim says that the layer's index is somebody's word that nobody has checked yet; why is not empty once it was found to be
// false.
func (f *FileSystem) claim(d digest.Digest, why string) error {
	return os.WriteFile(f.claimPath(d), []byte(why), 0o600)
}

// unclaim forgets that an index has to be checked; not that it was found to be false, as it would
// be found and used again.
func (f *FileSystem) unclaim(d digest.Digest) {
	if f.forged(d) == nil {
		_ = os.Remove(f.claimPath(d))
	}
}

func (f *FileSystem) claimed(d digest.Digest) bool {
	_, err := os.Lstat(f.claimPath(d))
	return err == nil
}

// forged is the error of a layer whose published index was found to be false.
func (f *FileSystem) forged(d digest.Digest) error {
	if b, err := os.ReadFile(f.claimPath(d)); err == nil && len(b) > 0 {
		return fmt.Errorf("layer %s was mounted by an index that is not its own: %w: %s; remove the image and pull it again", d, published.ErrForged, b)
	}
	return nil
}
