package lazy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/fs/remote"
	"github.com/containerd/stargz-snapshotter/metadata"
	"github.com/containerd/stargz-snapshotter/metadata/memory"
	"github.com/containerd/stargz-snapshotter/task"
	fusefs "github.com/hanwen/go-fuse/v2/fs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// readTimeout bounds one read of compressed bytes; after it the reader sees EIO. A
// process that waits for a FUSE read cannot be killed, so it must end some time. It is
// a little below the 120 s at which the kernel reports a hung task, and long enough
// for a registry or the network to come back from a restart.
const readTimeout = 100 * time.Second

// resolverConfig is what stargz's layer resolver is told.
var resolverConfig = config.Config{
	// The resolver keeps compressed bytes it fetched in this cache. Nothing comes
	// by there: the tree reads from the Layer itself (see openTree), whose store has
	// the one copy on disk. "memory" is an empty map that stays empty; anything else
	// would make a directory.
	HTTPCacheType: "memory",

	// Decoded chunks. A file is read 128 KiB at a time and its chunks are up to
	// 4 MiB, so without a cache each chunk is fetched and decoded 32 times.
	// "memory" never forgets a chunk; a directory does not either, but its files can be
	// taken away from outside, and a chunk that is gone is decoded again: chunkCache
	// bounds it.
	FSCacheType: "directory",
	DirectoryCacheConfig: config.DirectoryCacheConfig{
		Direct: true, // no second copy in memory, no open files kept: needed to take files away
	},

	// Layer.Fetch brings the rest; the kernel's page cache keeps what was read.
	NoPrefetch:        true,
	NoBackgroundFetch: true,
	NoPrometheus:      true,
}

// tree is the file tree of one layer over its blob.
type tree struct {
	root  fusefs.InodeEmbedder
	layer layer.Layer
	blob  *blobReader
	dir   string // its decoded chunks

	closeOnce sync.Once
}

// openTree builds the tree of files that t describes. The tree owns blob from now
// on, also when there is an error.
//
// Each tree has a resolver of its own, so that what stargz asks by name (which
// handler serves this digest, where to read, what is cached) has one possible
// answer, held by the closures below. The metadata store is handed a reader that goes through
// stargz's own block cache, and puts ours in its place: this is what keeps one copy
// on disk.
func openTree(ctx context.Context, ref string, desc ocispec.Descriptor, t *toc, blob *blobReader, dir string, cache *chunkCache, opaque layer.OverlayOpaqueType) (_ *tree, err error) {
	tr := &tree{blob: blob, dir: dir}
	defer func() {
		// A crafted table must cost its own layer, not the daemon and all other mounts.
		if p := recover(); p != nil {
			err = fmt.Errorf("the layer's table of contents cannot be used: %v", p)
		}
		if err != nil {
			tr.close()
		}
	}()
	blob.tail.Store(t)
	defer blob.tail.Store(nil)

	store := func(_ *io.SectionReader, opts ...metadata.Option) (metadata.Reader, error) {
		m, err := memory.NewReader(io.NewSectionReader(blob, 0, blob.size), opts...)
		if err != nil {
			return nil, err
		}
		if err := checkTable(m); err != nil {
			return nil, err
		}
		return &meteredReader{Reader: m, cache: cache}, nil
	}
	handlers := map[string]remote.Handler{"quay": blob}
	// The task manager delays stargz's background fetches, of which there are none.
	tasks := task.NewBackgroundTaskManager(1, 0)
	resolver, err := layer.NewResolver(dir, tasks, resolverConfig, handlers, store, opaque, nil)
	if err != nil {
		return nil, err
	}
	if tr.layer, err = resolver.Resolve(ctx, nil, reference.Spec{Locator: ref}, desc); err != nil {
		return nil, err
	}
	if err := tr.layer.Verify(t.digest); err != nil {
		return nil, err
	}
	if tr.root, err = tr.layer.RootNode(0); err != nil {
		return nil, err
	}
	return tr, nil
}

// close gives back everything the tree holds. It must not be mounted any more.
func (t *tree) close() {
	t.closeOnce.Do(func() {
		if t.layer != nil {
			t.layer.Close()
		}
		t.blob.close()
		os.RemoveAll(t.dir)
	})
}

// blobReader reads a Layer for a tree: as an io.ReaderAt, and as stargz's handler and
// fetcher. The context of the mount ends its reads.
type blobReader struct {
	ctx    context.Context
	cancel context.CancelFunc
	blob   Layer
	size   int64
	failed func(error)         // told of each failed read
	tail   atomic.Pointer[toc] // served from memory while the tree is built
}

var (
	_ io.ReaderAt    = (*blobReader)(nil)
	_ remote.Handler = (*blobReader)(nil)
	_ remote.Fetcher = (*blobReader)(nil)
)

// ReadAt implements io.ReaderAt. It never returns fewer bytes without an error.
func (b *blobReader) ReadAt(p []byte, off int64) (int, error) {
	if t := b.tail.Load(); t != nil && off >= t.off && off+int64(len(p)) <= b.size {
		return copy(p, t.bytes[off-t.off:]), nil
	}
	ctx, cancel := context.WithTimeout(b.ctx, readTimeout)
	defer cancel()
	n, err := b.blob.ReadAt(ctx, p, off)
	if err == nil && n < len(p) {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && !errors.Is(err, io.EOF) {
		b.failed(err)
	}
	return n, err
}

// Handle implements remote.Handler: there is one layer to ask for.
func (b *blobReader) Handle(context.Context, ocispec.Descriptor) (remote.Fetcher, int64, error) {
	return b, b.size, nil
}

// Fetch implements remote.Fetcher.
func (b *blobReader) Fetch(_ context.Context, off, size int64) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(b, off, size)), nil
}

// Check implements remote.Fetcher: whether bytes come is seen when they are read.
func (b *blobReader) Check() error { return b.ctx.Err() }

// GenID implements remote.Fetcher.
func (b *blobReader) GenID(off, size int64) string { return fmt.Sprintf("%016x-%x", off, size) }

func (b *blobReader) close() {
	b.cancel()
	b.blob.Close()
}

// meteredReader tells the chunk cache how much is decoded into it, and gives the attributes that unpacked files would have.
type meteredReader struct {
	metadata.Reader
	cache *chunkCache
}

func (m *meteredReader) GetAttr(id uint32) (metadata.Attr, error) {
	attr, err := m.Reader.GetAttr(id)
	return unpacked(attr), err
}

func (m *meteredReader) GetChild(pid uint32, base string) (uint32, metadata.Attr, error) {
	id, attr, err := m.Reader.GetChild(pid, base)
	return id, unpacked(attr), err
}

// unpacked leaves out the extended attributes that unpackers leave out, of which some would be orders to overlayfs, gives symbolic
// links the mode that they have on every Linux file system, whatever the tar says, and bounds times as containerd does: a table has no time
// at all where the tar has the epoch.
func unpacked(attr metadata.Attr) metadata.Attr {
	mode := uint32(unix.S_IFIFO) // what has no contents
	switch {
	case attr.Mode&os.ModeSymlink != 0:
		attr.Mode |= os.ModePerm
		mode = unix.S_IFLNK
	case attr.Mode.IsRegular():
		mode = unix.S_IFREG
	case attr.Mode.IsDir():
		mode = unix.S_IFDIR
	}
	if attr.ModTime.Before(time.Unix(0, 0)) || attr.ModTime.After(time.Unix(0, math.MaxInt64)) {
		attr.ModTime = time.Unix(0, 0)
	}
	xattrs := attr.Xattrs
	attr.Xattrs = make(map[string][]byte, len(xattrs)) // the reader's own must not change
	for name, value := range xattrs {
		if index.KeptXattr(name, mode) {
			attr.Xattrs[name] = value
		}
	}
	return attr
}

func (m *meteredReader) OpenFileWithPreReader(id uint32, preRead func(uint32, int64, int64, string, io.Reader) error) (metadata.File, error) {
	f, err := m.Reader.OpenFileWithPreReader(id, func(nid uint32, off, size int64, sum string, r io.Reader) error {
		err := preRead(nid, off, size, sum, r)
		m.cache.added(size)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &meteredFile{File: f, cache: m.cache}, nil
}

type meteredFile struct {
	metadata.File
	cache *chunkCache
}

func (f *meteredFile) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	f.cache.added(int64(n))
	return n, err
}
