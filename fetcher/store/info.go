package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	digest "github.com/opencontainers/go-digest"
)

// Info is what the store knows of a blob without opening it.
type Info struct {
	Digest digest.Digest
	// Size is the blob's length in bytes; 0 also when its records are damaged, then Have is 0 too.
	Size int64
	// Have is how many bytes of it the records say are held. After a machine crash some may prove lost when the blob is opened.
	Have int64
	// Complete: the whole blob was checked against its digest.
	Complete bool
	// Used is when it was last opened, to a minute.
	Used time.Time
	// Pins are the owners that pinned it, sorted.
	Pins []string
}

// Usage is what the blobs take on disk, in bytes.
type Usage struct {
	// Bytes are allocated on disk, by data and records. Holes do not count.
	Bytes int64 `json:"bytes"`
	// Reserved bytes are promised to blobs that this process is filling, and not on disk yet.
	Reserved int64 `json:"reserved"`
	// Quota bounds Bytes and Reserved together; 0: no bound.
	Quota int64 `json:"quota"`
	// Pinned is the part of Bytes that lies in pinned blobs.
	Pinned int64 `json:"pinned"`
	// Blobs is their number, complete or not.
	Blobs int `json:"blobs"`
}

// Stat is what is known of blob d; [fs.ErrNotExist] when the store does not have it.
func (s *Store) Stat(d digest.Digest) (Info, error) {
	if err := checkDigest(d); err != nil {
		return Info{}, err
	}
	pins, err := s.pins()
	if err != nil {
		return Info{}, err
	}
	return s.stat(d, pins)
}

// List is Stat of every blob, in no particular order.
func (s *Store) List() ([]Info, error) {
	pins, err := s.pins()
	if err != nil {
		return nil, err
	}
	var l []Info
	err = s.eachBlob(func(d digest.Digest) error {
		i, err := s.stat(d, pins)
		if errors.Is(err, fs.ErrNotExist) { // gone meanwhile
			return nil
		}
		l = append(l, i)
		return err
	})
	return l, err
}

func (s *Store) stat(d digest.Digest, pins map[digest.Digest][]string) (Info, error) {
	dir := s.blobDir(d)
	in := Info{Digest: d, Pins: pins[d]}
	fi, err := os.Stat(filepath.Join(dir, fileData))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = notExist("blob " + d.String())
		}
		return Info{}, err
	}
	if u, err := os.Stat(filepath.Join(dir, fileUsed)); err == nil {
		in.Used = u.ModTime()
	}
	if st := s.opened(d); st != nil { // knows better than the disk
		in.Size, in.Have, in.Complete = st.size, st.have.Load(), st.at() >= verified
		return in, nil
	}
	f, err := os.Open(filepath.Join(dir, filePieces))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return in, nil
		}
		return Info{}, err
	}
	defer f.Close()
	pi, err := f.Stat()
	if err != nil {
		return Info{}, err
	}
	// The size that the pieces lie in is in the header: first it, then they.
	h, err := readPieces(f, pi.Size(), nil)
	if err == nil && !h.complete {
		_, err = readPieces(f, pi.Size(), func(i int, _ Source, _ uint32) {
			if i < pieceCount(h.size) {
				_, n := pieceRange(h.size, i)
				in.Have += n
			}
		})
	}
	if errors.Is(err, errPieces) || err == nil && fi.Size() != h.size {
		in.Have = 0
		return in, nil
	}
	if err != nil {
		return Info{}, fmt.Errorf("blob %s: %w", d, err)
	}
	in.Size, in.Complete = h.size, h.complete
	if h.complete {
		in.Have = h.size
	}
	return in, nil
}

// opened is the state of d if this process has it open and ready.
func (s *Store) opened(d digest.Digest) *state {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.open[d]; e != nil {
		return e.st
	}
	return nil
}

// eachBlob calls f for every blob folder; what else lies there is passed over.
func (s *Store) eachBlob(f func(digest.Digest) error) error {
	for _, a := range algorithms {
		es, err := os.ReadDir(filepath.Join(s.dir, dirBlobs, a.String()))
		if err != nil {
			return err
		}
		for _, e := range es {
			d := digest.NewDigestFromEncoded(a, e.Name())
			if checkDigest(d) != nil {
				continue
			}
			if err := f(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// Usage adds up what the blobs take on disk, this process's and others'.
func (s *Store) Usage() (Usage, error) {
	pins, err := s.pins()
	if err != nil {
		return Usage{}, err
	}
	u := Usage{Quota: s.quota, Reserved: s.reserved(nil)}
	err = s.eachBlob(func(d digest.Digest) error {
		n := allocated(s.blobDir(d))
		u.Bytes += n
		u.Blobs++
		if len(pins[d]) > 0 {
			u.Pinned += n
		}
		return nil
	})
	return u, err
}

// reserved is what open blobs of this process, but not self's, will still take.
func (s *Store) reserved(self *entry) (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.open {
		switch {
		case e == self:
		case e.st == nil:
			n += e.reserved.Load()
		case e.st.at() == filling:
			n += e.st.size - e.st.have.Load()
		}
	}
	return n
}

// allocated is what a blob's folder takes on disk; what is gone takes nothing.
func allocated(dir string) (n int64) {
	for _, name := range []string{fileData, filePieces} {
		var st syscall.Stat_t
		if syscall.Stat(filepath.Join(dir, name), &st) == nil {
			n += st.Blocks * 512 // st_blocks counts 512 bytes, whatever the file system's block: stat(2)
		}
	}
	return n
}
