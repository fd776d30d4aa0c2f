package rig

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// BinVariable names the environment variable with the folder of the tools and servers; without it they are taken from
// build/bin of this module, where `make deps` and `make` put them.
const BinVariable = "QUAY_TEST_BIN"

// ErrNoTool says that a program a test needs is not installed.
var ErrNoTool = errors.New("not installed")

// BinDir is the folder that Bin looks in first.
func BinDir() string {
	if dir := os.Getenv(BinVariable); dir != "" {
		return dir
	}
	return filepath.Join(Root(), "build", "bin")
}

// Root is the folder of this module, with go.mod in it. A binary built with -trimpath does not know it: it takes the
// working folder or the nearest one above with a go.mod.
func Root() string {
	if _, file, _, ok := runtime.Caller(0); ok && filepath.IsAbs(file) {
		return filepath.Dir(filepath.Dir(filepath.Dir(file)))
	}
	wd, err := os.Getwd()
	if err != nil {
		return "."
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			return wd
		}
	}
}

// Bin is the path of a program: from BinDir, else from PATH. The error wraps ErrNoTool.
func Bin(name string) (string, error) {
	path := filepath.Join(BinDir(), name)
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
		return path, nil
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("%s is neither in %s nor on PATH: run make deps: %w", name, BinDir(), ErrNoTool)
}

// classicDir is where the classic engine was unpacked.
func classicDir() string { return filepath.Join(filepath.Dir(BinDir()), "classic") }

// toolPath is a PATH for daemons that start helpers by name: dirs first, then the tools, then the system's folders.
func toolPath(dirs ...string) string {
	path := ""
	for _, dir := range append(dirs, BinDir()) {
		path += dir + string(os.PathListSeparator)
	}
	// sbin holds runc, iptables and ip on Debian; a person's PATH may lack it.
	return path + "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
}

// ImageDir is the cache of the images that tests use.
func ImageDir() string { return filepath.Join(filepath.Dir(BinDir()), "images") }
