package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// Support is the best way in which layers can be mounted.
type Support int

// The ways, the best last.
const (
	None       Support = iota // not at all
	Loop                      // with MountOptions.Loop
	FileBacked                // straight from the files
)

func (s Support) String() string {
	switch s {
	case FileBacked:
		return "file-backed"
	case Loop:
		return "loop"
	}
	return "none"
}

// Probe finds out how layers whose files lie in dir can be mounted, by mounting a tiny
// one there and reading it through overlayfs as a container would. The error says why
// there is no better way: it is nil with FileBacked only, and of use with Loop too.
func Probe(dir string) (Support, error) {
	work, err := os.MkdirTemp(dir, "erofs-probe-")
	if err != nil {
		return None, fmt.Errorf("whether EROFS works here cannot be tried: %w", err)
	}
	defer os.RemoveAll(work)
	plain := tryMount(work, MountOptions{})
	if plain == nil {
		return FileBacked, nil
	}
	plain = fmt.Errorf("file-backed EROFS does not work: %w", plain)
	if err := tryMount(work, MountOptions{Loop: true}); err != nil {
		return None, errors.Join(plain, fmt.Errorf("nor does EROFS on loop devices: %w", err))
	}
	return Loop, plain
}

// ProbeLoop finds out whether layers whose files lie in dir can be mounted with
// MountOptions.Loop, in the same way.
func ProbeLoop(dir string) error {
	work, err := os.MkdirTemp(dir, "erofs-probe-")
	if err != nil {
		return fmt.Errorf("whether EROFS works here cannot be tried: %w", err)
	}
	defer os.RemoveAll(work)
	if err := tryMount(work, MountOptions{Loop: true}); err != nil {
		return fmt.Errorf("EROFS on loop devices does not work: %w", err)
	}
	return nil
}

// tryMount makes a layer of one file in an empty folder and reads it.
func tryMount(work string, o MountOptions) (err error) {
	at := func(name string) string { return filepath.Join(work, name) }
	want := bytes.Repeat([]byte("EROFS"), blockSize/5)
	entries := []index.Entry{
		{Mode: unix.S_IFDIR | 0o755, HardLink: -1},
		{Path: "file", Mode: unix.S_IFREG | 0o644, HardLink: -1, Size: int64(len(want))},
	}
	var meta bytes.Buffer
	if err := Write(&meta, entries, blockSize); err != nil {
		return err
	}
	if err := os.WriteFile(at("meta"), meta.Bytes(), 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(at("data"), append(want, make([]byte, blockSize-len(want))...), 0o600); err != nil {
		return err
	}
	for _, d := range []string{"mnt", "empty", "overlay"} {
		if err := os.Mkdir(at(d), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := Mount(at("meta"), at("mnt"), at("data"), o); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, Unmount(at("mnt"))) }()
	lowers := "lowerdir=" + at("mnt") + ":" + at("empty") // without an upper it takes two
	if err := unix.Mount("overlay", at("overlay"), "overlay", unix.MS_RDONLY, lowers); err != nil {
		return fmt.Errorf("overlayfs cannot be mounted over it: %w", err)
	}
	defer func() { err = errors.Join(err, Unmount(at("overlay"))) }()
	got, err := os.ReadFile(filepath.Join(at("overlay"), "file"))
	if err != nil {
		return fmt.Errorf("a file on it cannot be read: %w", err)
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("a file on it reads wrongly: %d bytes, not the %d that were written", len(got), len(want))
	}
	return nil
}
