package lazy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/snapshot"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// mountTimeout bounds one Mount: manifest, footer, table of contents, mount. containerd
// holds a pull up for it, and the snapshotter a read transaction on its database, so a
// registry that does not answer must not hold it long; what follows is an
// ordinary unpack, which waits for the registry in its own way.
const mountTimeout = 15 * time.Second

// ErrOff is why nothing is lazy when Options.Layers is nil.
var ErrOff = errors.New("lazy mounting is off")

// errClosed is the answer of a file system that was closed.
var errClosed = errors.New("the daemon is shutting down")

// Options make a FileSystem.
type Options struct {
	Dir       string       // for decoded chunks: emptied at start, private to one FileSystem
	Layers    Layers       // nil: every layer is unpacked
	Log       *slog.Logger // nil: slog.Default()
	UserXattr bool         // overlayfs is mounted with userxattr (rootless)
}

// FileSystem mounts layers. Its methods may be called from many goroutines; calls
// for one mountpoint wait for each other, calls for different ones do not.
type FileSystem struct {
	layers Layers
	log    *slog.Logger
	cache  *chunkCache
	opaque layer.OverlayOpaqueType

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup // warm-ups

	mu     sync.Mutex // guards following
	places map[string]*place
	warmed map[digest.Digest]time.Time
	gone   map[string]bool // mountpoints unmounted during a Restore; nil outside one
	closed bool
}

var _ snapshot.FileSystem = (*FileSystem)(nil)

// place is what is known of one mountpoint. It exists while something is mounted or
// somebody works there.
type place struct {
	turn   chan struct{} // holds one token; who has it may mount and unmount
	m      *mounted      // guarded by FileSystem.mu
	cancel func()        // ends the mount in progress; guarded by FileSystem.mu
	ending int           // who waits to unmount; guarded by FileSystem.mu
	users  int           // guarded by FileSystem.mu
}

// New makes a file system with nothing mounted. The caller closes it.
func New(o Options) (*FileSystem, error) {
	cache, err := newChunkCache(o.Dir, chunkCacheLimit)
	if err != nil {
		return nil, err
	}
	f := &FileSystem{
		layers: o.Layers,
		log:    o.Log,
		cache:  cache,
		// One of the two, not both: overlayfs hides its own kind from containers only.
		opaque: layer.OverlayOpaqueTrusted,
		places: make(map[string]*place),
		warmed: make(map[digest.Digest]time.Time),
	}
	if o.UserXattr {
		f.opaque = layer.OverlayOpaqueUser
	}
	if f.log == nil {
		f.log = slog.Default()
	}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	return f, nil
}

// Mount mounts the layer that the labels name on the folder at. An error means that
// nothing is mounted there and the layer is to be unpacked.
func (f *FileSystem) Mount(ctx context.Context, at string, labels map[string]string) error {
	p, leave, err := f.enter(ctx, at)
	if err != nil {
		return err
	}
	defer leave()
	return f.mount(ctx, p, at, labels)
}

// Check tells whether the layer mounted on at can be used. A mount that is not there,
// as its daemon was killed or its registry was away at the last start, is made
// again first.
func (f *FileSystem) Check(ctx context.Context, at string, labels map[string]string) error {
	if f.mountAt(at) != nil {
		return nil
	}
	p, leave, err := f.enter(ctx, at)
	if err != nil {
		return err
	}
	defer leave()
	if f.mountAt(at) != nil {
		return nil // made while this call waited
	}
	return f.remount(ctx, p, at, labels)
}

// Unmount takes away what is mounted on at, or being mounted, and releases all it
// holds. A mount still in use by a container is taken out of sight and released when
// the container ends. It is no error when nothing is mounted.
func (f *FileSystem) Unmount(ctx context.Context, at string) error {
	f.mu.Lock()
	if f.gone != nil {
		f.gone[at] = true
	}
	before := f.places[at]
	if before != nil {
		before.ending++
		if before.cancel != nil {
			before.cancel()
		}
	}
	f.mu.Unlock()
	p, leave, err := f.enter(ctx, at)
	if before != nil {
		f.mu.Lock()
		before.ending--
		f.mu.Unlock()
	}
	if err != nil && !errors.Is(err, errClosed) {
		return err
	}
	if err != nil {
		return unmountPath(at)
	}
	defer leave()
	f.mu.Lock()
	m := p.m
	p.m = nil
	f.mu.Unlock()
	if m == nil {
		return unmountPath(at)
	}
	inUse, err := m.unmount(ctx)
	if inUse {
		f.log.Info("layer unmounted, but still in use; it is released when its last user is gone", "mountpoint", at)
	}
	return err
}

// Mounted tells what is mounted, a layer once for each mount.
func (f *FileSystem) Mounted() []Target {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []Target
	for _, p := range f.places {
		if p.m != nil {
			all = append(all, p.m.target)
		}
	}
	return all
}

// Close unmounts everything and ends all work. Reads in flight fail.
func (f *FileSystem) Close() error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil
	}
	f.closed = true
	var left []*mounted
	for _, p := range f.places {
		if p.m != nil {
			left = append(left, p.m)
		}
		p.m = nil
	}
	f.mu.Unlock()
	f.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), unmountWait)
	defer cancel()
	var errs []error
	for _, m := range left {
		_, err := m.unmount(ctx)
		errs = append(errs, err)
	}
	f.wg.Wait()
	f.cache.close()
	return errors.Join(errs...)
}

// remount makes a lost mount again. The caller is in p.
func (f *FileSystem) remount(ctx context.Context, p *place, at string, labels map[string]string) error {
	if err := unmountPath(at); err != nil {
		return err
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		return fmt.Errorf("the folder of a lazy layer cannot be made again: %w", err)
	}
	return f.mount(ctx, p, at, labels)
}

// mount builds and mounts a tree, and logs how it went. The caller is in p.
func (f *FileSystem) mount(ctx context.Context, p *place, at string, labels map[string]string) error {
	start := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, mountTimeout,
		fmt.Errorf("no answer within %s", mountTimeout))
	defer cancel()
	stop := context.AfterFunc(f.ctx, cancel)
	defer stop()
	f.mu.Lock()
	p.cancel = cancel
	if p.ending > 0 { // came between the turn and now
		cancel()
	}
	f.mu.Unlock()

	t, err := ParseLabels(labels)
	var m *mounted
	var kind format
	if err == nil {
		m, kind, err = f.build(ctx, at, t)
	}
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}

	f.mu.Lock()
	p.cancel = nil
	if err == nil && m.alive() {
		m.target = t
		p.m = m
	}
	f.mu.Unlock()

	line := f.log.With("digest", t.Layer, "image", t.Ref)
	took := time.Since(start).Round(time.Millisecond)
	switch {
	case err == nil:
		line.Info("layer", "served", "lazy", "why", string(kind), "took", took)
	case errors.Is(err, errPlain), errors.Is(err, ErrOff):
		line.Info("layer", "served", "unpack", "why", err.Error())
	default:
		line.Warn("layer", "served", "unpack", "why", err.Error(), "took", took)
	}
	return err
}

type onOthersKey struct{}

// OnOthers tells Mount that the layer lies on others. One that leaves out folders of theirs is then not mounted: its tree
// would have these folders with attributes of its own.
func OnOthers(ctx context.Context) context.Context {
	return context.WithValue(ctx, onOthersKey{}, true)
}

// build does the work of a mount.
func (f *FileSystem) build(ctx context.Context, at string, t Target) (*mounted, format, error) {
	if f.layers == nil {
		return nil, "", ErrOff
	}
	f.warm(t)
	desc, ref, err := f.describe(ctx, t)
	if err != nil {
		return nil, "", err
	}
	blob, table, err := f.open(ctx, t.Ref, desc, ref)
	if err != nil {
		return nil, "", err
	}
	if on, _ := ctx.Value(onOthersKey{}).(bool); on && table.implied != "" {
		blob.Close()
		return nil, "", fmt.Errorf("it leaves out the folder %q, whose attributes are those of the layers below", table.implied)
	}
	reader := &blobReader{blob: blob, size: desc.Size, failed: f.readFailed(t.Ref, desc.Digest)}
	// Not the context of this call: the mount outlives it.
	reader.ctx, reader.cancel = context.WithCancel(f.ctx)
	tr, err := openTree(ctx, t.Ref, desc, table, reader, f.cache.newDir(), f.cache, f.opaque)
	if err != nil {
		return nil, "", err
	}
	if err := ctx.Err(); err != nil {
		tr.close()
		return nil, "", err
	}
	m, err := mountTree(at, tr, f.ended)
	if err != nil {
		return nil, "", err
	}
	blob.Fetch()
	return m, table.format, nil
}

// describe finds a layer's descriptor, and what vouches for its table of contents.
func (f *FileSystem) describe(ctx context.Context, t Target) (ocispec.Descriptor, tocRef, error) {
	desc, err := f.layers.Describe(ctx, t.Ref, t.Manifest, t.Layer)
	if err != nil {
		return desc, tocRef{}, fmt.Errorf("the image's manifest could not be looked up: %w", err)
	}
	if desc.Digest != t.Layer {
		return desc, tocRef{}, fmt.Errorf("the image's manifest has no layer %s", t.Layer)
	}
	ref, err := tocRefOf(desc, t)
	if errors.Is(err, errPlain) {
		err = fmt.Errorf("%w (%s)", err, desc.MediaType)
	}
	return desc, ref, err
}

// open opens a layer and reads its table of contents. The caller closes the layer.
func (f *FileSystem) open(ctx context.Context, name string, desc ocispec.Descriptor, ref tocRef) (Layer, *toc, error) {
	blob, err := f.layers.Open(ctx, name, desc)
	if err != nil {
		return nil, nil, fmt.Errorf("the layer could not be opened: %w", err)
	}
	table, err := readTOC(ctx, blob, desc.Size, ref)
	if err != nil {
		blob.Close()
		return nil, nil, err
	}
	return blob, table, nil
}

// readFailed logs failed reads of one layer, once in ten seconds at most: a program
// that got EIO tends to try again at once.
func (f *FileSystem) readFailed(ref string, d digest.Digest) func(error) {
	var mu sync.Mutex
	var last time.Time
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if time.Since(last) < 10*time.Second || f.ctx.Err() != nil {
			return
		}
		last = time.Now()
		f.log.Error("a container's read failed: bytes of the layer could not be had", "digest", d, "image", ref, "error", err)
	}
}

// mountAt returns the live mount on at, or nil.
func (f *FileSystem) mountAt(at string) *mounted {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.places[at]; p != nil && p.m != nil && p.m.alive() {
		return p.m
	}
	return nil
}

// ended forgets a mount that went away, by Unmount or by somebody else's hand.
func (f *FileSystem) ended(m *mounted) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.places[m.at]
	if p == nil || p.m != m {
		return
	}
	p.m = nil
	if p.users == 0 {
		delete(f.places, m.at)
	}
	f.log.Warn("a lazy mount was taken away by somebody else; it is made again when it is next used", "mountpoint", m.at)
}

// enter waits for the turn at a mountpoint. leave must be called.
func (f *FileSystem) enter(ctx context.Context, at string) (_ *place, leave func(), _ error) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil, nil, errClosed
	}
	p := f.places[at]
	if p == nil {
		p = &place{turn: make(chan struct{}, 1)}
		p.turn <- struct{}{}
		f.places[at] = p
	}
	p.users++
	f.mu.Unlock()
	release := func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		p.users--
		if p.users == 0 && p.m == nil && f.places[at] == p {
			delete(f.places, at)
		}
	}
	select {
	case <-p.turn:
		return p, func() { p.turn <- struct{}{}; release() }, nil
	case <-ctx.Done():
		release()
		return nil, nil, ctx.Err()
	}
}
