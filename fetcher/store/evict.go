package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/go-units"
	digest "github.com/opencontainers/go-digest"
)

// Remove deletes blob d. [ErrInUse] when this or another process has it open, [ErrPinned] when it is pinned, [fs.ErrNotExist] when the
// store does not have it.
func (s *Store) Remove(d digest.Digest) error {
	if err := checkDigest(d); err != nil {
		return err
	}
	old, err := s.remove(d)
	if err != nil {
		return fmt.Errorf("remove blob %s: %w", d, err)
	}
	return os.RemoveAll(old)
}

func (s *Store) remove(d digest.Digest) (trashed string, err error) {
	unlock, err := s.lockStore()
	if err != nil {
		return "", err
	}
	defer unlock()
	pins, err := s.pins()
	if err != nil {
		return "", err
	}
	if owners := pins[d]; len(owners) > 0 {
		return "", fmt.Errorf("%w by %s; unpin it first", ErrPinned, strings.Join(owners, ", "))
	}
	dir := s.blobDir(d)
	l, err := lockRemove(dir)
	if err != nil {
		return "", err
	}
	if l == nil {
		return "", fmt.Errorf("%w; close what reads or fetches it first", ErrInUse)
	}
	defer l.Close()
	return s.trash(dir)
}

// MakeRoom evicts what was not used for the longest time until need more bytes fit the quota. What is pinned or open stays. When that
// is not enough nothing is evicted and the error is [ErrQuota], saying what holds the space. Without a quota it does nothing.
func (s *Store) MakeRoom(ctx context.Context, need int64) error {
	return s.makeRoom(ctx, need, nil)
}

// makeRoom also promises the room to self, which is being opened, so that two blobs are not given the same room.
func (s *Store) makeRoom(ctx context.Context, need int64, self *entry) error {
	if s.quota == 0 || need <= 0 {
		return nil
	}
	unlock, err := s.lockStore()
	if err != nil {
		return err
	}
	victims, err := s.evict(ctx, need, self)
	if err == nil && self != nil {
		self.reserved.Store(need)
	}
	unlock()
	// Without the lock: deleting large files takes its time. But before returning, for the room is needed now.
	for _, v := range victims {
		s.delete(v)
	}
	return err
}

type candidate struct {
	digest digest.Digest
	bytes  int64
	used   time.Time
	lock   *os.File
}

// evict moves blobs to the trash and returns where they are there; the store lock is held.
func (s *Store) evict(ctx context.Context, need int64, self *entry) (trashed []string, err error) {
	pins, err := s.pins()
	if err != nil {
		return nil, err
	}
	var total, pinned, inUse int64
	var cs []*candidate
	err = s.eachBlob(func(d digest.Digest) error {
		c := &candidate{digest: d, bytes: allocated(s.blobDir(d))}
		total += c.bytes
		if len(pins[d]) > 0 {
			pinned += c.bytes
			return nil
		}
		if fi, err := os.Stat(filepath.Join(s.blobDir(d), fileUsed)); err == nil {
			c.used = fi.ModTime()
		}
		cs = append(cs, c)
		return nil
	})
	if err != nil {
		return nil, err
	}
	reserved := s.reserved(self)
	over := total + reserved + need - s.quota
	if over <= 0 {
		return nil, nil
	}
	slices.SortFunc(cs, func(a, b *candidate) int { return a.used.Compare(b.used) })
	var victims []*candidate
	defer func() {
		for _, v := range victims {
			v.lock.Close()
		}
	}()
	for _, c := range cs {
		if over <= 0 {
			break
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		switch c.lock, err = lockRemove(s.blobDir(c.digest)); {
		case errors.Is(err, fs.ErrNotExist):
			over -= c.bytes // a blob that is closed empty goes by itself
		case err != nil:
			return nil, err
		case c.lock == nil:
			inUse += c.bytes
		default:
			victims = append(victims, c)
			over -= c.bytes
		}
	}
	if over > 0 && self != nil && self.needed {
		s.log.Warn("store: what containers read takes more than the quota; raise it, or run fewer images", "beyond", over, "quota", s.quota)
		over = 0
	}
	if over > 0 {
		size := func(n int64) string { return units.BytesSize(float64(n)) }
		return nil, fmt.Errorf("%w: %s more is needed in %s, of its quota of %s %s is pinned, %s in use and %s promised to downloads under way; "+
			"raise the quota, unpin or remove images, or wait for what is running",
			ErrQuota, size(need), s.dir, size(s.quota), size(pinned), size(inUse), size(reserved))
	}
	for _, v := range victims {
		old, err := s.trash(s.blobDir(v.digest))
		if err != nil {
			return trashed, err
		}
		trashed = append(trashed, old)
		s.log.Debug("store: evicted", "digest", v.digest, "bytes", v.bytes, "used", v.used)
	}
	return trashed, nil
}
