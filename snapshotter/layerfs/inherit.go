package layerfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	confs "github.com/containerd/continuity/fs"
	"github.com/containerd/continuity/sysx"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/erofs"
	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// dirMetas has the metadata images of single mounts: of layers that have things in directories which they leave out.
// Those have the attributes of the layers below, and so are different in each image.
const dirMetas = "metas"

type parentsKey struct{}

// WithParents tells Mount what the folders of the layers below are, the uppermost first.
func WithParents(ctx context.Context, parents []string) context.Context {
	return context.WithValue(ctx, parentsKey{}, parents)
}

func (f *FileSystem) ownMeta(at string) string {
	return filepath.Join(f.o.State, dirMetas, filepath.Base(filepath.Dir(at)))
}

// metaOf is the metadata image of a mount.
func (f *FileSystem) metaOf(at string, s *served) string {
	if s.h.Implicit() {
		if own := f.ownMeta(at); exists(own) {
			return own
		}
	}
	return s.h.MetaPath()
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// inherit makes the metadata image of a mount whose layer lies on others.
func (f *FileSystem) inherit(at string, s *served, parents []string) error {
	x, err := s.h.Index()
	if err != nil {
		return err
	}
	group := map[string]uint32{} // of the directories here whose new subdirectories get theirs, as mkdir(2) has it
	for i := range x.Entries {
		e := &x.Entries[i]
		if !e.Implicit || e.Path == "" {
			continue
		}
		if gid, ok := group[filepath.Dir(e.Path)]; ok {
			e.GID = gid
		}
		if err := inheritDir(e, parents); err != nil {
			return fmt.Errorf("the attributes of %q in the layers below cannot be read: %w", e.Path, err)
		}
		if slices.ContainsFunc(e.Xattrs, func(a index.Xattr) bool { return a.Name == index.DefaultACL }) {
			return fmt.Errorf("%q has a default access control list in the layers below: what is in it here would get one, too", e.Path)
		}
		if e.Mode&unix.S_ISGID != 0 {
			group[e.Path] = e.GID
		}
	}
	l, err := erofs.Plan(x.Blob, x.Entries, x.DataSize)
	if err != nil {
		return err
	}
	path := f.ownMeta(at)
	w, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = l.WriteTo(w)
	if err = errors.Join(err, w.Sync(), w.Close()); err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		os.Remove(path + ".new")
		return fmt.Errorf("the layer's metadata image for this mount cannot be written: %w", err)
	}
	return nil
}

// inheritDir gives a directory the attributes that it has in the nearest layer below, as containerd does when it
// unpacks. Only what the mounts' metadata images have is asked for.
func inheritDir(e *index.Entry, parents []string) error {
	for _, p := range parents {
		path, err := confs.RootPath(p, e.Path)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil // it was something else: the directory is new
		}
		e.Mode, e.UID, e.GID = st.Mode, st.Uid, st.Gid
		e.Sec, e.Nsec = st.Mtim.Sec, uint32(st.Mtim.Nsec)
		return inheritXattrs(e, path)
	}
	return nil
}

func inheritXattrs(e *index.Entry, path string) error {
	names, err := sysx.LListxattr(path)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return err
	}
	have := map[string]bool{}
	for _, x := range e.Xattrs {
		have[x.Name] = true
	}
	for _, name := range names {
		if have[name] || strings.HasPrefix(name, "trusted.") {
			continue // those are overlayfs's, and of that layer
		}
		value, err := sysx.LGetxattr(path, name)
		if err != nil {
			return err
		}
		e.Xattrs = append(e.Xattrs, index.Xattr{Name: name, Value: string(value)})
	}
	slices.SortFunc(e.Xattrs, func(a, b index.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return nil
}
