package lazy

import (
	"cmp"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
)

// chunkCacheLimit bounds the decoded chunks of all mounts together, in bytes on disk.
// The kernel's page cache lies in front and serves what is read again; this one only
// carries a chunk of up to 4 MiB from the first 128 KiB read of it to the last, so that
// 64 chunks being read at once are ample.
const chunkCacheLimit = 256 << 20

// chunkCache is the folder of decoded chunks that the trees write to, kept to a
// bound. Files in it may vanish at any time: the chunk is then decoded again.
type chunkCache struct {
	dir   string
	limit int64 // bytes
	next  atomic.Int64

	grown   atomic.Int64 // bytes written since the last trim
	trimReq chan struct{}
	stop    chan struct{}
	wg      sync.WaitGroup
}

// newChunkCache starts with an empty folder: what a killed daemon left there
// belongs to no mount.
func newChunkCache(dir string, limit int64) (*chunkCache, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("the old chunk cache cannot be cleared: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the chunk cache cannot be made: %w", err)
	}
	c := &chunkCache{dir: dir, limit: limit, trimReq: make(chan struct{}, 1), stop: make(chan struct{})}
	c.wg.Go(func() {
		for {
			select {
			case <-c.trimReq:
				c.trim()
			case <-c.stop:
				return
			}
		}
	})
	return c, nil
}

// newDir names a folder for one tree. The tree makes and removes it.
func (c *chunkCache) newDir() string {
	return filepath.Join(c.dir, strconv.FormatInt(c.next.Add(1), 10))
}

// added counts n bytes, and asks for a trim at each eighth of the limit.
func (c *chunkCache) added(n int64) {
	if c.grown.Add(n) < c.limit/8 {
		return
	}
	c.grown.Store(0)
	select {
	case c.trimReq <- struct{}{}:
	default: // one is already asked for
	}
}

// trim removes the oldest files until three quarters of the limit are left.
func (c *chunkCache) trim() {
	type file struct {
		path string
		size int64
		made int64 // Unix nanoseconds
	}
	var files []file
	var total int64
	filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil // gone with its tree meanwhile
		}
		if i, err := d.Info(); err == nil {
			files = append(files, file{path, i.Size(), i.ModTime().UnixNano()})
			total += i.Size()
		}
		return nil
	})
	if total <= c.limit {
		return
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Compare(a.made, b.made) })
	for _, f := range files {
		if total <= c.limit/4*3 {
			return
		}
		if os.Remove(f.path) == nil {
			total -= f.size
		}
	}
}

// close ends trimming and removes the folder.
func (c *chunkCache) close() {
	close(c.stop)
	c.wg.Wait()
	os.RemoveAll(c.dir)
}
