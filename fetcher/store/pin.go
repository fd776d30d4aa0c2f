package store

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	digest "github.com/opencontainers/go-digest"
)

// maxOwner bounds an owner's name, in bytes: an image reference (255 + 128) with a prefix fits.
const maxOwner = 1024

// Pin keeps blob d from being evicted and removed until owner unpins it, over restarts. It need not be there yet. Pinning twice is
// pinning once. An owner is any name that its user finds again: "seed:" and an image, for example.
func (s *Store) Pin(d digest.Digest, owner string) error {
	if err := checkPin(d, owner); err != nil {
		return err
	}
	unlock, err := s.lockStore()
	if err != nil {
		return err
	}
	defer unlock()
	dir := s.pinDir(owner)
	if err := os.Mkdir(dir, modeDir); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("pin blob %s: %w", d, noSpace(err))
	}
	path := filepath.Join(dir, pinName(d))
	if _, err := os.Lstat(path); err == nil {
		return nil
	}
	if err := s.writeFile(path, []byte(owner)); err != nil {
		return fmt.Errorf("pin blob %s: %w", d, err)
	}
	return nil
}

// Unpin takes owner's pin off blob d; without one it does nothing.
func (s *Store) Unpin(d digest.Digest, owner string) error {
	if err := checkPin(d, owner); err != nil {
		return err
	}
	unlock, err := s.lockStore()
	if err != nil {
		return err
	}
	defer unlock()
	dir := s.pinDir(owner)
	if err := os.Remove(filepath.Join(dir, pinName(d))); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("unpin blob %s: %w", d, err)
	}
	_ = os.Remove(dir) // if that was the last
	return nil
}

// UnpinAll takes off all pins of owner.
func (s *Store) UnpinAll(owner string) error {
	unlock, err := s.lockStore()
	if err != nil {
		return err
	}
	defer unlock()
	old, err := s.trash(s.pinDir(owner))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unpin all of %s: %w", owner, err)
	}
	return os.RemoveAll(old)
}

func checkPin(d digest.Digest, owner string) error {
	if owner == "" || len(owner) > maxOwner {
		return fmt.Errorf("pin blob %s: an owner's name has 1 to %d bytes, not %d", d, maxOwner, len(owner))
	}
	return checkDigest(d)
}

// pinDir: owners are free text, so the folder's name is a hash; the text is in the pins.
func (s *Store) pinDir(owner string) string {
	return filepath.Join(s.dir, dirPins, hashName(owner))
}

func hashName(name string) string {
	h := sha256.Sum256([]byte(name))
	return hex.EncodeToString(h[:])
}

func pinName(d digest.Digest) string { return d.Algorithm().String() + "-" + d.Encoded() }

// pins are the owners of all pins, sorted, by digest. A pin whose text cannot be read still pins.
func (s *Store) pins() (map[digest.Digest][]string, error) {
	owners, err := os.ReadDir(filepath.Join(s.dir, dirPins))
	if err != nil {
		return nil, fmt.Errorf("read pins: %w", err)
	}
	m := make(map[digest.Digest][]string)
	for _, o := range owners {
		dir := filepath.Join(s.dir, dirPins, o.Name())
		es, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // unpinned meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read pins: %w", err)
		}
		for _, e := range es {
			a, hex, _ := strings.Cut(e.Name(), "-")
			d := digest.NewDigestFromEncoded(digest.Algorithm(a), hex)
			if checkDigest(d) != nil {
				continue
			}
			name := o.Name()
			if b, err := readFile(filepath.Join(dir, e.Name()), maxOwner); err == nil && len(b) > 0 {
				name = string(b)
			}
			m[d] = append(m[d], name)
		}
	}
	for _, owners := range m {
		slices.Sort(owners)
	}
	return m, nil
}
