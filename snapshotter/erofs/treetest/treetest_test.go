package treetest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tree makes a small tree, the same each time.
func tree(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	at := func(p string) string { return filepath.Join(root, p) }
	for _, err := range []error{
		os.Mkdir(at("d"), 0o755),
		os.WriteFile(at("d/f"), []byte("contents"), 0o644),
		os.Link(at("d/f"), at("d/g")),
		os.WriteFile(at("d/copy"), []byte("contents"), 0o644),
		os.Symlink("target", at("link")),
		unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		os.Chmod(at("null"), 0o666), // whatever the umask is
		unix.Setxattr(at("d/f"), "trusted.x", []byte("v"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	settle(t, root)
	return root
}

// settle gives all names one time.
func settle(t *testing.T, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		ts := unix.Timespec{Sec: 1_000_000_000, Nsec: 5}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestEachDifferenceIsFound(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("devices and trusted attributes need root")
	}
	for _, c := range []struct {
		says   string // in one of the lines; empty: there is no difference
		change func(at func(string) string) error
		o      Options
	}{
		{"", func(func(string) string) error { return nil }, Options{}},
		{`"d/copy": only in the first`, func(at func(string) string) error { return os.Remove(at("d/copy")) }, Options{}},
		{`"d-": only in the second`, func(at func(string) string) error { return os.WriteFile(at("d-"), nil, 0o644) }, Options{}},
		{`mode is 0100644`, func(at func(string) string) error { return os.Chmod(at("d/copy"), 0o644|os.ModeSetuid) }, Options{}},
		{`mode is 020666`, func(at func(string) string) error { return os.Chmod(at("null"), 0o600) }, Options{}},
		{`owner is 0:0`, func(at func(string) string) error { return os.Lchown(at("link"), 0, 1) }, Options{}},
		{`SHA-256`, func(at func(string) string) error { return os.WriteFile(at("d/copy"), []byte("CONTENTS"), 0o644) }, Options{}},
		{"", func(at func(string) string) error { return os.WriteFile(at("d/copy"), []byte("CONTENTS"), 0o644) }, Options{Sums: true}},
		{`size is 8`, func(at func(string) string) error { return os.Truncate(at("d/copy"), 9) }, Options{Sums: true}},
		{`target is "target"`, func(at func(string) string) error {
			os.Remove(at("link"))
			return os.Symlink("TARGET", at("link"))
		}, Options{}},
		{`device is 1:3`, func(at func(string) string) error {
			os.Remove(at("null"))
			if err := unix.Mknod(at("null"), unix.S_IFCHR, int(unix.Mkdev(1, 5))); err != nil {
				return err
			}
			return os.Chmod(at("null"), 0o666)
		}, Options{}},
		{`"trusted.y" is absent in the first tree, "w" in the second`, func(at func(string) string) error {
			return unix.Setxattr(at("d"), "trusted.y", []byte("w"), 0)
		}, Options{}},
		{"", func(at func(string) string) error {
			return unix.Setxattr(at("d"), "trusted.y", []byte("w"), 0)
		}, Options{Xattr: func(path, name string) bool { return path == "d" && name == "trusted.y" }}},
		{`link count is 2 in the first tree, 3 in the second`, func(at func(string) string) error { return os.Mkdir(at("d/sub"), 0o755) }, Options{}},
		{`"d/sub": only`, func(at func(string) string) error { return os.Mkdir(at("d/sub"), 0o755) }, Options{DirLinks: true}},
	} {
		a, b := tree(t), tree(t)
		at := func(p string) string { return filepath.Join(b, p) }
		if err := c.change(at); err != nil {
			t.Fatal(err)
		}
		settle(t, b)
		got, err := Compare(a, b, c.o)
		if err != nil {
			t.Fatal(err)
		}
		all := strings.Join(got, "\n")
		if c.says == "" && len(got) > 0 || !strings.Contains(all, c.says) {
			t.Errorf("want a line with %q, got\n%s", c.says, all)
		}
	}

	a, b := tree(t), tree(t)
	late := time.Unix(1_000_000_000, 6)
	if err := os.Chtimes(filepath.Join(b, "d/copy"), late, late); err != nil {
		t.Fatal(err)
	}
	if got, _ := Compare(a, b, Options{}); len(got) != 1 || !strings.Contains(got[0], "time is 2001-09-09T01:46:40.000000005Z") {
		t.Errorf("a nanosecond: got %q", got)
	}
	if got, _ := Compare(a, b, Options{Mtime: func(path string) bool { return path == "d/copy" }}); len(got) != 0 {
		t.Errorf("a nanosecond that may differ: got %q", got)
	}
	// The same names, sizes, counts and contents, but another pair is one file.
	b = tree(t)
	for _, err := range []error{
		os.Remove(filepath.Join(b, "d/g")), os.Remove(filepath.Join(b, "d/copy")),
		os.Link(filepath.Join(b, "d/f"), filepath.Join(b, "d/copy")),
		os.WriteFile(filepath.Join(b, "d/g"), []byte("contents"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	settle(t, b)
	if got, _ := Compare(a, b, Options{}); !strings.Contains(strings.Join(got, "\n"), `"d/g": first name of the same file`) {
		t.Errorf("other hard links: got %q", got)
	}
}
