package lazy

import (
	"maps"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/metadata"
)

// TestUnpacked: what a table of contents says of a file comes out as it does when the layer is unpacked.
func TestUnpacked(t *testing.T) {
	at := time.Unix(1_600_000_000, 0)
	epoch := time.Unix(0, 0)
	for _, c := range []struct {
		name       string
		mode, want os.FileMode
		time, then time.Time
		xattrs     []string
		kept       []string
	}{
		{"a file", 0o640, 0o640, at, at, []string{"user.a", "security.capability", "trusted.overlay.metacopy", "strange"}, []string{"security.capability", "user.a"}},
		{"a directory of orders to overlayfs", os.ModeDir | 0o700, os.ModeDir | 0o700, at, at, []string{"trusted.overlay.redirect", "user.a"}, []string{"user.a"}},
		{"a fifo", os.ModeNamedPipe | 0o600, os.ModeNamedPipe | 0o600, at, at, []string{"user.a", "security.x"}, []string{"security.x"}},
		{"a link", os.ModeSymlink | 0o600, os.ModeSymlink | 0o777, at, at, []string{"user.a"}, nil},
		{"no time", 0o600, 0o600, time.Time{}, epoch, nil, nil},
		{"before the epoch", 0o600, 0o600, time.Unix(-1, 0), epoch, nil, nil},
		{"after all nanoseconds", 0o600, 0o600, time.Unix(1<<34, 0), epoch, nil, nil},
	} {
		given := map[string][]byte{}
		for _, x := range c.xattrs {
			given[x] = []byte("x")
		}
		got := unpacked(metadata.Attr{Mode: c.mode, ModTime: c.time, Xattrs: given})
		if names := slices.Sorted(maps.Keys(got.Xattrs)); got.Mode != c.want || !got.ModTime.Equal(c.then) || !slices.Equal(names, c.kept) {
			t.Errorf("%s: %v, %v, %v", c.name, got.Mode, got.ModTime, names)
		}
		if len(given) != len(c.xattrs) {
			t.Errorf("%s: the table's own attributes were changed", c.name)
		}
	}
}
