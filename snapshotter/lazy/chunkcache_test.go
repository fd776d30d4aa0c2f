package lazy

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestChunkCacheBound: the folder is kept below its limit, the oldest files going first.
func TestChunkCacheBound(t *testing.T) {
	const limit, size = 1 << 20, 64 << 10
	c, err := newChunkCache(filepath.Join(t.TempDir(), "chunks"), limit)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	dir := c.newDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	start := time.Now().Add(-time.Hour)
	for i := range 64 {
		path := filepath.Join(dir, fmt.Sprintf("%02d", i))
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, time.Time{}, start.Add(time.Duration(i)*time.Second)); err != nil {
			t.Fatal(err)
		}
		c.added(size)
	}
	used := func() (total int64) {
		filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				total += size
			}
			return nil
		})
		return total
	}
	for end := time.Now().Add(5 * time.Second); used() > limit && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if n := used(); n > limit || n == 0 {
		t.Errorf("%d bytes are left, want at most %d", n, int64(limit))
	}
	if _, err := os.Stat(filepath.Join(dir, "63")); err != nil {
		t.Error("the newest is gone:", err)
	}
}
