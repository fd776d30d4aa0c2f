package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"
)

// Epoch is the time of every entry that is newer: 2024-01-01, in UTC. Older times, such as those of packaged files, stay.
var Epoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// Entry is one file of a layer. Body is nil but for regular files.
type Entry struct {
	Header tar.Header
	Body   []byte
}

// Tree is the content of a layer by cleaned path without a leading slash ("usr/bin/python3"); the root is ".".
type Tree map[string]*Entry

// AddFile adds a regular file and the folders above it that are missing.
func (t Tree) AddFile(name string, mode int64, body []byte) {
	t.addParents(name)
	t[name] = &Entry{
		Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(body)), ModTime: Epoch},
		Body:   body,
	}
}

// AddLink adds a symbolic link and the folders above it that are missing.
func (t Tree) AddLink(name, target string) {
	t.addParents(name)
	t[name] = &Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: Epoch}}
}

// AddDir adds a folder and those above it that are missing.
func (t Tree) AddDir(name string, mode int64) {
	t.addParents(name)
	t[name] = &Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: Epoch}}
}

func (t Tree) addParents(name string) {
	for dir := path.Dir(name); dir != "." && dir != "/"; dir = path.Dir(dir) {
		if t[dir] == nil {
			t[dir] = &Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: Epoch}}
		}
	}
}

// ReadTree reads a tar into memory, with its times clamped to Epoch.
func ReadTree(r io.Reader) (Tree, error) {
	t := Tree{}
	in := tar.NewReader(r)
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read a layer: %w", err)
		}
		e := &Entry{Header: *h}
		if e.Header.ModTime.After(Epoch) {
			e.Header.ModTime = Epoch
		}
		// Access and change times are those of the machine that made it.
		e.Header.AccessTime, e.Header.ChangeTime, e.Header.Format = time.Time{}, time.Time{}, tar.FormatUnknown
		// Numbers only: names mean something inside the image, not where the tar is read.
		e.Header.Uname, e.Header.Gname = "", ""
		for _, k := range []string{"atime", "ctime", "mtime", "path", "linkpath", "size", "uname", "gname"} {
			delete(e.Header.PAXRecords, k)
		}
		if h.Typeflag == tar.TypeReg {
			if e.Body, err = io.ReadAll(in); err != nil {
				return nil, fmt.Errorf("read %s of a layer: %w", h.Name, err)
			}
		}
		t[clean(h.Name)] = e
	}
}

func clean(name string) string { return path.Clean(strings.TrimPrefix(name, "/")) }

// same reports whether two entries make the same file. Where hard links count, the link's target must be the same too.
func (e *Entry) same(o *Entry) bool {
	a, b := &e.Header, &o.Header
	return a.Typeflag == b.Typeflag && a.Linkname == b.Linkname && a.Mode == b.Mode && a.Uid == b.Uid && a.Gid == b.Gid &&
		a.Devmajor == b.Devmajor && a.Devminor == b.Devminor && a.ModTime.Equal(b.ModTime) &&
		maps.Equal(a.PAXRecords, b.PAXRecords) && bytes.Equal(e.Body, o.Body)
}

// Above is the layer that makes upper out of t: what is new or different, and whiteouts (OCI image-spec, layer.md) for what
// is gone.
func (t Tree) Above(upper Tree) Tree {
	layer := Tree{}
	for name, e := range upper {
		if lower := t[name]; lower == nil || !lower.same(e) {
			layer[name] = e
		}
	}
	// A hard link must find its target in its own layer.
	for _, e := range slices.Collect(maps.Values(layer)) {
		if e.Header.Typeflag == tar.TypeLink {
			target := clean(e.Header.Linkname)
			layer[target] = upper[target]
		}
	}
	for name := range t {
		if upper[name] != nil || (path.Dir(name) != "." && upper[path.Dir(name)] == nil) {
			continue // still there, or gone with its folder
		}
		layer.AddFile(path.Join(path.Dir(name), ".wh."+path.Base(name)), 0, nil)
	}
	layer.takeParents(upper)
	return layer
}

// takeParents gives every file the folders above it, as they are in from: what merges layers takes a folder's mode and owner
// from the uppermost layer that names it.
func (t Tree) takeParents(from Tree) {
	for _, name := range slices.Collect(maps.Keys(t)) {
		for dir := path.Dir(name); dir != "." && dir != "/"; dir = path.Dir(dir) {
			if e := from[dir]; e != nil {
				t[dir] = e
			}
		}
	}
}

// WriteTo writes the tree as a tar, sorted, folders before what is in them and hard links last.
func (t Tree) WriteTo(w io.Writer) (int64, error) {
	counter := &countWriter{w: w}
	out := tar.NewWriter(counter)
	for _, link := range []bool{false, true} {
		for _, name := range slices.Sorted(maps.Keys(t)) {
			e := t[name]
			if (e.Header.Typeflag == tar.TypeLink) != link || name == "." {
				continue
			}
			h := e.Header
			h.Name = name
			if h.Typeflag == tar.TypeDir {
				h.Name += "/"
			}
			if err := out.WriteHeader(&h); err != nil {
				return counter.n, fmt.Errorf("write %s into a layer: %w", name, err)
			}
			if _, err := out.Write(e.Body); err != nil {
				return counter.n, fmt.Errorf("write %s into a layer: %w", name, err)
			}
		}
	}
	if err := out.Close(); err != nil {
		return counter.n, fmt.Errorf("end a layer: %w", err)
	}
	return counter.n, nil
}

type countWriter struct {
	w io.Writer
	n int64
}

func (c *countWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
