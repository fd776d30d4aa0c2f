package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestOldProbesAreRemoved: also those that seem to be of the future. A young one is left to whom it may belong.
func TestOldProbesAreRemoved(t *testing.T) {
	dir := t.TempDir()
	for name, age := range map[string]time.Duration{"old": 2 * probeAge, "young": 0, "future": -2 * probeAge} {
		path, at := filepath.Join(dir, "erofs-probe-"+name), time.Now().Add(-age)
		if err := errors.Join(os.Mkdir(path, 0o700), os.Chtimes(path, at, at)); err != nil {
			t.Fatal(err)
		}
	}
	removeProbes(dir)
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != "erofs-probe-young" {
		t.Errorf("left: %v, %v", left, err)
	}
}
