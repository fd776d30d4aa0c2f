package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	digest "github.com/opencontainers/go-digest"
)

// MaxContent is the largest content in bytes, 8 MiB: twice what the OCI distribution specification asks registries to take as a
// manifest (4 MiB), and what the origin accepts.
const MaxContent = 8 * mib

// PutContent keeps a manifest or an index of up to [MaxContent] bytes ([ErrTooLarge]), if it has digest d ([ErrMismatch]). It does not
// count for the quota.
func (s *Store) PutContent(d digest.Digest, b []byte) error {
	if err := checkDigest(d); err != nil {
		return err
	}
	if len(b) > MaxContent {
		return fmt.Errorf("content %s: %w: %d bytes, %d are the most", d, ErrTooLarge, len(b), int64(MaxContent))
	}
	if sum := d.Algorithm().FromBytes(b); sum != d {
		return fmt.Errorf("content %s: %w: its bytes have %s", d, ErrMismatch, sum)
	}
	if _, err := s.Content(d); err == nil {
		return nil
	}
	if err := s.writeFile(s.contentPath(d), b); err != nil {
		return fmt.Errorf("keep content %s: %w", d, err)
	}
	return nil
}

// Content returns what PutContent kept, checked against d again; [fs.ErrNotExist] when there is none. Content that was damaged on disk
// is deleted, and is then not there.
func (s *Store) Content(d digest.Digest) ([]byte, error) {
	if err := checkDigest(d); err != nil {
		return nil, err
	}
	path := s.contentPath(d)
	b, err := readFile(path, MaxContent)
	if err == nil && d.Algorithm().FromBytes(b) == d {
		return b, nil
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err == nil || errors.Is(err, ErrTooLarge):
		s.log.Warn("store: damaged content deleted", "digest", d)
		_ = os.Remove(path)
	default:
		return nil, fmt.Errorf("content %s: %w", d, err)
	}
	return nil, notExist("content " + d.String())
}

// readFile reads a file of at most limit bytes, ErrTooLarge above.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: %w", path, ErrTooLarge)
	}
	return b, err
}
