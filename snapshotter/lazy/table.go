package lazy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/metadata"
	digest "github.com/opencontainers/go-digest"
)

const (
	// maxChunk bounds one chunk of a file, in bytes, as a whole chunk is held in
	// memory while it is checked. eStargz writes 4 MiB, zstd:chunked 64 KiB on average.
	maxChunk = 64 << 20

	// maxName bounds the path of a file, in bytes: PATH_MAX of Linux. It also bounds
	// how deep folders are, and so how deep the library calls itself.
	maxName = 4096
)

// parseTable decodes a table of contents just as the library will.
func parseTable(r io.Reader) (*estargz.JTOC, error) {
	table := new(estargz.JTOC)
	if err := json.NewDecoder(r).Decode(table); err != nil {
		return nil, fmt.Errorf("the table of contents is not JSON: %w", err)
	}
	return table, nil
}

// checkEntries refuses a table that the library would show otherwise than containerd unpacks the layer, or follow in a circle:
// it overflows the stack when a folder comes to lie inside itself, by a hard link to one, and that
// ends the daemon with all its mounts.
func checkEntries(table *estargz.JTOC) error {
	entries := make(map[string]*estargz.TOCEntry, len(table.Entries))
	folders := map[string]bool{"": true} // what has something in it
	for _, e := range table.Entries {
		if e == nil {
			return errors.New("the table of contents has an entry of nothing")
		}
		if e.Type == "chunk" {
			continue // has no name of its own
		}
		if len(e.Name) > maxName || len(e.LinkName) > maxName {
			return fmt.Errorf("the table of contents has a name of more than %d bytes", maxName)
		}
		if strings.Contains(e.Name+e.LinkName, "\ufffd") {
			// JSON has no way to write such a name: the tar alone still has it.
			return fmt.Errorf("the table of contents has the name %q, which may have lost bytes that are not UTF-8", e.Name)
		}
		name := entryName(e.Name)
		entries[name] = e // the last of one name counts
		for dir := name; dir != ""; {
			dir = entryName(path.Dir("/" + dir))
			if folders[dir] {
				break
			}
			folders[dir] = true
		}
	}
	for _, e := range table.Entries {
		if e.Type == "chunk" {
			continue
		}
		name := entryName(e.Name)
		if e.Type != "dir" && folders[name] {
			return fmt.Errorf("the table of contents has files in %q, which is no folder", name)
		}
		to := e
		for seen := 0; to.Type == "hardlink"; seen++ {
			next := entries[entryName(to.LinkName)]
			if next == nil || next.Type == "dir" || seen > len(entries) {
				return fmt.Errorf("the table of contents has a hard link %q that leads to no file", name)
			}
			to = next
		}
		if !sameAttributes(e, to) {
			return fmt.Errorf("the table of contents has a hard link %q with attributes that its file does not have", name)
		}
	}
	return nil
}

// sameAttributes tells whether a hard link leaves its file as it is: unpacked, the file has the attributes of its last name, and the
// library shows those of the first.
func sameAttributes(link, to *estargz.TOCEntry) bool {
	if link.Mode != to.Mode || link.UID != to.UID || link.GID != to.GID || link.ModTime3339 != to.ModTime3339 {
		return false
	}
	for name, value := range link.Xattrs {
		if had, ok := to.Xattrs[name]; !ok || !bytes.Equal(had, value) {
			return false
		}
	}
	// chown(2) takes it away, others stay.
	_, had := to.Xattrs[capability]
	_, has := link.Xattrs[capability]
	return had == has
}

// capability is the attribute of a file's capabilities.
const capability = "security.capability"

// impliedFolder is one that has something in it and is not in the table, "" when there is none.
func impliedFolder(table *estargz.JTOC) string {
	listed := map[string]bool{"": true}
	for _, e := range table.Entries {
		if e.Type == "dir" {
			listed[entryName(e.Name)] = true
		}
	}
	for _, e := range table.Entries {
		if e.Type == "chunk" {
			continue
		}
		if dir := entryName(path.Dir("/" + entryName(e.Name))); !listed[dir] {
			return dir
		}
	}
	return ""
}

// entryName is the path of an entry from the root, "" for the root itself.
func entryName(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

// checkTable walks a parsed table of contents and refuses what could not be read
// correctly later: a file whose chunks do not make up its whole size, a chunk
// with no digest to check it by, or too large to hold.
// Found now it costs an ordinary unpack; found by a running container it costs EIO.
func checkTable(m metadata.Reader) error {
	var walk func(id uint32) error
	walk = func(id uint32) error {
		var failed error
		err := m.ForeachChild(id, func(name string, child uint32, mode os.FileMode) bool {
			switch {
			case mode.IsDir():
				if child == id && name == "" {
					return true // "./" in the archive is the root itself
				}
				failed = walk(child)
			case mode.IsRegular():
				failed = checkFile(m, name, child)
			}
			return failed == nil
		})
		if failed != nil {
			return failed
		}
		return err
	}
	return walk(m.RootID())
}

func checkFile(m metadata.Reader, name string, id uint32) error {
	attr, err := m.GetAttr(id)
	if err != nil {
		return err
	}
	if attr.Size == 0 {
		return nil
	}
	f, err := m.OpenFile(id)
	if err != nil {
		return err
	}
	var at int64
	for at < attr.Size {
		off, size, sum, ok := f.ChunkEntryForOffset(at)
		if !ok || off != at || size <= 0 || size > attr.Size-at {
			return fmt.Errorf("the table of contents does not cover all %d bytes of %q", attr.Size, name)
		}
		if size > maxChunk {
			return fmt.Errorf("the table of contents has a chunk of %d MiB in %q, more than the %d MiB allowed", size>>20, name, maxChunk>>20)
		}
		if _, err := digest.Parse(sum); err != nil {
			return fmt.Errorf("the table of contents has no digest for a chunk of %q: its bytes could not be checked", name)
		}
		at += size
	}
	return nil
}
