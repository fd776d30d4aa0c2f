package erofs

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// namespaces are those of extended attributes that EROFS knows, with the number that
// stands for each. An ACL is a whole name.
var namespaces = [...]struct {
	prefix string
	number byte
}{
	{"user.", 1},
	{"system.posix_acl_access", 2},
	{"system.posix_acl_default", 3},
	{"trusted.", 4},
	{"security.", 6},
}

// splitXattr gives the number of the name's namespace and the rest of the name.
func splitXattr(name string) (number byte, rest string, ok bool) {
	for _, ns := range namespaces {
		rest, found := strings.CutPrefix(name, ns.prefix)
		if found && (rest == "") == !strings.HasSuffix(ns.prefix, ".") {
			return ns.number, rest, true
		}
	}
	return 0, "", false
}

// sizeXattrs gives the bytes that an entry's extended attributes take behind its inode.
func sizeXattrs(e *index.Entry) (int64, error) {
	if len(e.Xattrs) == 0 {
		return 0, nil
	}
	size := int64(xattrHeader)
	for i, x := range e.Xattrs {
		_, rest, ok := splitXattr(x.Name)
		switch {
		case !ok:
			return 0, fmt.Errorf("%s: EROFS cannot hold the extended attribute %s: it knows user., trusted., security. and POSIX ACLs",
				quotePath(e.Path), quotePath(x.Name))
		case len(x.Name) > maxXattrName || strings.IndexByte(x.Name, 0) >= 0:
			return 0, fmt.Errorf("%s: no file can have the extended attribute %s: its name has %d bytes (at most %d, no NUL)",
				quotePath(e.Path), quotePath(x.Name), len(x.Name), maxXattrName)
		case len(x.Value) > maxXattrValue:
			return 0, fmt.Errorf("%s: EROFS cannot hold the extended attribute %s: its value has %d bytes (at most %d)",
				quotePath(e.Path), quotePath(x.Name), len(x.Value), maxXattrValue)
		case i > 0 && e.Xattrs[i-1].Name >= x.Name:
			return 0, fmt.Errorf("%s: its extended attributes are out of order, or %s is there twice",
				quotePath(e.Path), quotePath(x.Name))
		}
		size += alignUp(int64(xattrEntry+len(rest)+len(x.Value)), 4)
		if size > maxXattrs {
			return 0, fmt.Errorf("%s: its extended attributes are more than the %d bytes that EROFS holds", quotePath(e.Path), maxXattrs)
		}
	}
	return size, nil
}

// writeXattrs writes what sizeXattrs has measured. The first 12 bytes, a filter and the
// count of shared attributes, stay zero: neither is used.
func (m *emitter) writeXattrs(xattrs []index.Xattr) {
	if len(xattrs) == 0 {
		return
	}
	m.take(xattrHeader)
	for _, x := range xattrs {
		number, rest, _ := splitXattr(x.Name)
		b := m.take(int(alignUp(int64(xattrEntry+len(rest)+len(x.Value)), 4)))
		b[0], b[1] = byte(len(rest)), number
		binary.LittleEndian.PutUint16(b[2:], uint16(len(x.Value)))
		copy(b[xattrEntry+copy(b[xattrEntry:], rest):], x.Value)
	}
}
