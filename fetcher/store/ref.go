package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// AccessPublic is the [Ref.Access] of what the registry gives to everybody.
const AccessPublic = "public"

// Ref is what a tag pointed to when it was last seen, for pulls while the registry is away.
type Ref struct {
	// Name is the full reference, as its user spells it each time: "docker.io/library/debian:12".
	Name string `json:"name"`
	// Target is the manifest or index.
	Target ocispec.Descriptor `json:"target"`
	// Seen is when the registry said so.
	Seen time.Time `json:"seen"`
	// Access is [AccessPublic], or an opaque hash of the credential that the registry accepted. The store keeps it; who compares it
	// decides who may have the image.
	Access string `json:"access"`
}

// maxRef bounds a ref's file: a descriptor with annotations is a few KiB, references have up to 383 bytes.
const maxRef = 64 * kib

// errRef: the file is no ref.
var errRef = errors.New("unusable ref")

// SetRef keeps r in place of what was kept under its name.
func (s *Store) SetRef(r Ref) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("keep ref %q: %w", r.Name, err)
	}
	if len(b) > maxRef {
		return fmt.Errorf("keep ref %q: %w: %d bytes, %d are the most", r.Name, ErrTooLarge, len(b), int64(maxRef))
	}
	if _, err := parseRef(b); err != nil {
		return fmt.Errorf("keep ref %q: %w", r.Name, err)
	}
	if err := s.writeFile(s.refPath(r.Name), b); err != nil {
		return fmt.Errorf("keep ref %q: %w", r.Name, err)
	}
	return nil
}

// Ref returns what was kept under name; [fs.ErrNotExist] when there is nothing usable.
func (s *Store) Ref(name string) (Ref, error) {
	r, err := s.readRef(s.refPath(name))
	if err == nil && r.Name != name {
		err = fmt.Errorf("%w: it is of %q", errRef, r.Name)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case errors.Is(err, errRef) || errors.Is(err, ErrTooLarge):
		s.log.Warn("store: damaged ref passed over", "name", name, "error", err)
	default:
		return r, err
	}
	return Ref{}, notExist(fmt.Sprintf("ref %q", name))
}

// Refs returns all refs by name.
func (s *Store) Refs() ([]Ref, error) {
	dir := filepath.Join(s.dir, dirRefs)
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read refs: %w", err)
	}
	var rs []Ref
	for _, e := range es {
		r, err := s.readRef(filepath.Join(dir, e.Name()))
		if err == nil && s.refPath(r.Name) != filepath.Join(dir, e.Name()) {
			err = fmt.Errorf("%w: it is of %q", errRef, r.Name)
		}
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) { // one bad ref hurts only itself
				s.log.Warn("store: damaged ref passed over", "file", e.Name(), "error", err)
			}
			continue
		}
		rs = append(rs, r)
	}
	slices.SortFunc(rs, func(a, b Ref) int { return strings.Compare(a.Name, b.Name) })
	return rs, nil
}

// RemoveRef forgets name; [fs.ErrNotExist] when it is not there.
func (s *Store) RemoveRef(name string) error {
	err := os.Remove(s.refPath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return notExist(fmt.Sprintf("ref %q", name))
	}
	return err
}

// refPath: references are longer than file names may be, and have slashes.
func (s *Store) refPath(name string) string {
	return filepath.Join(s.dir, dirRefs, hashName(name)+".json")
}

func (s *Store) readRef(path string) (Ref, error) {
	b, err := readFile(path, maxRef)
	if err != nil {
		return Ref{}, err
	}
	return parseRef(b)
}

// parseRef takes only what can be used without another look.
func parseRef(b []byte) (Ref, error) {
	var r Ref
	if err := json.Unmarshal(b, &r); err != nil {
		return Ref{}, fmt.Errorf("%w: %w", errRef, err)
	}
	if r.Name == "" {
		return Ref{}, fmt.Errorf("%w: it has no name", errRef)
	}
	if err := checkDigest(r.Target.Digest); err != nil {
		return Ref{}, fmt.Errorf("%w: %w", errRef, err)
	}
	if err := checkSize(r.Target.Digest, r.Target.Size); err != nil {
		return Ref{}, fmt.Errorf("%w: %w", errRef, err)
	}
	return r, nil
}
