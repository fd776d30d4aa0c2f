package layerstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

const (
	// decodersPerCPU bounds the decoders in a store. Most of them wait for the
	// network, so there are more than CPUs; each holds up to 2 MiB of the blob.
	decodersPerCPU = 8
	decodersMost   = 32
	// decodersOfLayer bounds those of one layer, so that one storm of reads leaves
	// room for other containers.
	decodersOfLayer = 12
	// patience is the default of Options.Patience: longer than a registry's restart
	// or a link's flap, shorter than the 120 s after which Linux reports a hung task.
	patience = 60 * time.Second
)

// Options are those of a store; the zero value of each but Meta has a meaning.
type Options struct {
	// Quota bounds what the layers take on disk, in bytes, but for what reads with Demand need; 0 is no bound.
	Quota int64
	// Meta writes the EROFS image of a layer.
	Meta func(w io.Writer, x *index.Index) error
	// Patience is how long a read goes on after what the source answered first went
	// wrong; 0 is one minute. The reader's context bounds it further.
	Patience time.Duration
	// Log is told what nobody else is; nil is slog.Default.
	Log *slog.Logger
}

// Store keeps layers in a folder. All methods are safe for concurrent use.
type Store struct {
	dir      string
	boot     string
	opts     Options
	log      *slog.Logger
	patience time.Duration
	lock     *os.File
	broken   []error
	buffers  sync.Pool // of *[blockSize]byte

	gate    *gate
	hurry   hurry
	parked  atomic.Int32
	charged atomic.Int64
	told    atomic.Pointer[time.Time] // when the log last heard of a passed quota

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup // of the flusher

	kick   chan struct{}
	soonMu sync.Mutex
	soon   map[*layer]bool // guarded by soonMu

	mu     sync.Mutex // guards following
	layers map[digest.Digest]*layer
	made   map[digest.Digest]chan struct{} // being made; closed when that has ended
	asides int                             // counts the folders in new and trash
	leases map[*layer]bool                 // those with handles, also when they are gone
	closed bool
}

// Open opens the store in a folder, which it creates. It restores what layers it can,
// in parallel; what it cannot it sets aside and names in Broken.
func Open(dir string, o Options) (s *Store, err error) {
	if o.Meta == nil {
		return nil, errors.New("a layer store needs a function that makes metadata images")
	}
	ctx, cancel := context.WithCancel(context.Background())
	s = &Store{
		dir: dir, boot: bootID(), opts: o, log: o.Log, patience: o.Patience,
		gate: newGate(min(decodersPerCPU*runtime.GOMAXPROCS(0), decodersMost), decodersOfLayer),
		ctx:  ctx, cancel: cancel,
		kick: make(chan struct{}, 1), soon: map[*layer]bool{},
		layers: map[digest.Digest]*layer{}, made: map[digest.Digest]chan struct{}{}, leases: map[*layer]bool{},
	}
	s.buffers.New = func() any { return new([blockSize]byte) }
	if s.log == nil {
		s.log = slog.Default()
	}
	if s.patience == 0 {
		s.patience = patience
	}
	for _, sub := range []string{dirLayers, dirNew, dirBroken, dirTrash} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			cancel()
			return nil, fmt.Errorf("open the layer store: %w", err)
		}
	}
	if s.lock, err = lockFile(filepath.Join(dir, "lock")); err != nil {
		cancel()
		return nil, fmt.Errorf("open the layer store %s: %w", dir, err)
	}
	if err := s.restore(); err != nil {
		cancel()
		s.lock.Close()
		return nil, fmt.Errorf("open the layer store %s: %w", dir, err)
	}
	s.wg.Go(func() { s.flusher(ctx) })
	return s, nil
}

func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, ErrLocked
		}
		return nil, err
	}
	return f, nil
}

// Broken says which layers could not be restored by Open, and why.
func (s *Store) Broken() []error { return s.broken }

// Close stops all decoding and syncs what was written. Reads that wait fail with
// ErrClosed, as do all that come later.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	var open []*layer
	for l := range s.leases {
		open = append(open, l)
	}
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
	var errs []error
	for _, l := range open {
		l.opening.Lock()
		errs = append(errs, l.shut())
		l.opening.Unlock()
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// Get opens a layer by the digest of its blob, or by its diff ID.
func (s *Store) Get(key digest.Digest) (*Layer, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, fmt.Errorf("the layer store: %w", ErrClosed)
	}
	l := s.layers[key]
	if l == nil {
		for _, o := range s.layers {
			if o.info.DiffID == key && (l == nil || o.complete.Load()) {
				l = o
			}
		}
	}
	if l == nil {
		s.mu.Unlock()
		return nil, fmt.Errorf("%s: %w", key, ErrNotFound)
	}
	l.refs++
	s.leases[l] = true
	s.mu.Unlock()
	if err := l.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open layer %s: %w", l.info.Blob, err), s.release(l))
	}
	return &Layer{l: l}, nil
}

// Layers are the digests of the blobs of all layers.
func (s *Store) Layers() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]digest.Digest, 0, len(s.layers))
	for d := range s.layers {
		all = append(all, d)
	}
	return all
}

func (s *Store) openLayers() []*layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*layer, 0, len(s.leases))
	for l := range s.leases {
		all = append(all, l)
	}
	return all
}

// release ends one handle.
func (s *Store) release(l *layer) error {
	s.mu.Lock()
	if l.refs--; l.refs > 0 {
		s.mu.Unlock()
		return nil
	}
	l.lastUsed = time.Now()
	s.mu.Unlock()

	l.opening.Lock()
	defer l.opening.Unlock()
	s.mu.Lock()
	again := l.refs > 0
	s.mu.Unlock()
	if again {
		return nil
	}
	err := l.shut()
	s.mu.Lock()
	if l.refs == 0 {
		delete(s.leases, l)
	}
	gone := l.gone
	s.mu.Unlock()
	if gone {
		return errors.Join(err, s.discard(l))
	}
	now := time.Now()
	if terr := os.Chtimes(l.path(fileInfo), now, now); terr != nil {
		s.log.Warn("Could not note that a layer was used.", "layer", l.info.Blob, "error", terr)
	}
	return err
}
