package index

import (
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLinks is how many symbolic links containerd follows for one name.
const maxLinks = 255

// lookup finds an absolute, clean path, without following links.
func (t *tree) lookup(p string) *node {
	n := t.root
	for rest := strings.TrimPrefix(p, "/"); rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if n = n.children[name]; n == nil {
			return nil
		}
	}
	return n
}

// resolve follows the symbolic links in an absolute, clean path, the last element
// included, with the tree's root as the root. What does not exist counts as
// no link.
func (t *tree) resolve(p string) (string, error) {
	links := 0
	for {
		before := links
		next, err := t.follow(p, &links)
		if err != nil {
			return "", err
		}
		next = path.Clean("/" + next)
		if links == before && next == p {
			return p, nil
		}
		p = next
	}
}

// follow replaces each element that is a link once.
func (t *tree) follow(p string, links *int) (string, error) {
	if p == "/" {
		return p, nil
	}
	dir, file := path.Split(p)
	dir, err := t.follow(path.Clean(dir), links)
	if err != nil {
		return "", err
	}
	p = path.Join("/", dir, file)
	n := t.lookup(p)
	if n == nil || !n.is(unix.S_IFLNK) {
		return p, nil
	}
	if *links++; *links > maxLinks {
		return "", fmt.Errorf("%q leads through more than %d symbolic links", p, maxLinks)
	}
	if len(n.Link)+len(dir) > 2*maxPath {
		return "", fmt.Errorf("%q leads to a name that is too long", p)
	}
	if path.IsAbs(n.Link) {
		return path.Clean(n.Link), nil
	}
	return path.Join("/", dir, n.Link), nil
}

// parent finds the directory of a clean, absolute path, through links, and makes it
// where it is missing. It returns its path, too.
func (t *tree) parent(p string) (*node, string, error) {
	dir := path.Dir(p)
	n := t.root
	for rest := dir[1:]; rest != ""; { // the usual case: all there, and no links
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		if n = n.children[name]; n == nil || !n.is(unix.S_IFDIR) {
			break
		}
	}
	if n != nil && n.is(unix.S_IFDIR) {
		return n, dir, nil
	}
	dir, err := t.resolve(dir)
	if err != nil {
		return nil, "", err
	}
	if len(dir) > maxPath {
		return nil, "", fmt.Errorf("a path of %d bytes is too long", len(dir))
	}
	n = t.root
	for rest := dir[1:]; rest != ""; {
		var name string
		name, rest, _ = strings.Cut(rest, "/")
		child := n.children[name]
		if child == nil {
			if err := n.noDefaultACL(); err != nil {
				return nil, "", fmt.Errorf("%q: %w", name, err)
			}
			gid := uint32(0)
			if n.Mode&unix.S_ISGID != 0 {
				gid = n.GID // as mkdir(2) has it
			}
			child = newDir(gid)
			if err := t.put(n, name, child); err != nil {
				return nil, "", err
			}
		}
		if !child.is(unix.S_IFDIR) {
			return nil, "", fmt.Errorf("%q is in %q, which is no directory", p, name)
		}
		n = child
	}
	return n, dir, nil
}
