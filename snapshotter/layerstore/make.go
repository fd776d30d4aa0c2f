package layerstore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// chargeGrain is how much room an eager layer asks for at a time.
const chargeGrain = 1 << 20

// Create opens the layer of an index, which is made with no data if it is not there.
// It comes back with what the store has of it, whichever index it was made with.
func (s *Store) Create(ctx context.Context, x *index.Index) (*Layer, error) {
	h, err := s.once(ctx, x.Blob, func() error {
		dir, err := s.aside(dirNew)
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		f, err := os.OpenFile(filepath.Join(dir, fileData), os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Truncate(x.DataSize), f.Sync(), f.Close()); err != nil {
			return err
		}
		return s.finish(dir, x, 0, false)
	})
	if err != nil {
		return nil, fmt.Errorf("make layer %s: %w", x.Blob, full(err))
	}
	return h, nil
}

// Unpack opens the layer of a blob with all its data there. What is missing is decoded
// from blob, which begins at the blob's first byte; it is not read when nothing is.
// Several callers for the same layer share one's work. The layer is full at once; it
// is complete a moment later, when all was synced (Completed, or wait with Complete).
func (s *Store) Unpack(ctx context.Context, desc ocispec.Descriptor, blob io.Reader) (*Layer, error) {
	mine := false
	h, err := s.once(ctx, desc.Digest, func() error {
		mine = true
		return s.build(ctx, desc, blob)
	})
	if err != nil {
		return nil, fmt.Errorf("unpack layer %s: %w", desc.Digest, full(err))
	}
	if mine || h.l.full.Load() {
		return h, nil
	}
	if err := h.l.pour(ctx, blob); err != nil {
		return nil, errors.Join(fmt.Errorf("unpack layer %s: %w", desc.Digest, full(err)), h.Close())
	}
	return h, nil
}

// once opens a layer, after it was made by one of the callers if it is not there.
func (s *Store) once(ctx context.Context, d digest.Digest, create func() error) (*Layer, error) {
	if err := d.Validate(); err != nil {
		return nil, err
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		s.mu.Lock()
		_, there := s.layers[d]
		other := s.made[d]
		closed := s.closed
		if !there && other == nil && !closed {
			s.made[d] = make(chan struct{})
		}
		s.mu.Unlock()
		switch {
		case there || closed:
			h, err := s.Get(d)
			if errors.Is(err, ErrNotFound) {
				continue // evicted in between
			}
			return h, err
		case other != nil:
			select {
			case <-other:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			continue
		}
		err := create()
		s.mu.Lock()
		close(s.made[d])
		delete(s.made, d)
		s.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
}

// build makes a layer from its whole blob.
func (s *Store) build(ctx context.Context, desc ocispec.Descriptor, blob io.Reader) error {
	dir, err := s.aside(dirNew)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	f, err := os.OpenFile(filepath.Join(dir, fileData), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	sink := &chargedFile{s: s, f: f}
	done := false
	defer func() {
		if !done {
			s.charged.Add(-sink.charged.Load())
		}
	}()
	x, err := index.Build(ctx, blob, desc, sink, index.Options{})
	if err == nil {
		err = f.Truncate(x.DataSize)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	over := sink.charged.Load() - sink.written.Load()
	sink.charged.Add(-over)
	s.charged.Add(-over)
	if err := s.finish(dir, x, sink.charged.Load(), true); err != nil {
		return err
	}
	done = true
	return nil
}

// finish writes the files beside a layer's data, and puts the layer into its place.
func (s *Store) finish(dir string, x *index.Index, charged int64, all bool) error {
	chunks, err := tableOf(x)
	if err != nil {
		return fmt.Errorf("the index of %s is wrong: %w", x.Blob, err)
	}
	in := info{
		Version: infoVersion, Blob: x.Blob, BlobSize: x.BlobSize, DiffID: x.DiffID, DataSize: x.DataSize,
		Chunks:   chunks.pack(),
		Implicit: slices.ContainsFunc(x.Entries, func(e index.Entry) bool { return e.Implicit }),
	}
	var g errgroup.Group
	g.Go(func() error {
		var encoded bytes.Buffer
		if err := index.Encode(&encoded, x); err != nil {
			return err
		}
		in.IndexSize, in.IndexSum = int64(encoded.Len()), digest.FromBytes(encoded.Bytes())
		return writeFile(filepath.Join(dir, fileIndex), func(w io.Writer) error { _, err := w.Write(encoded.Bytes()); return err })
	})
	g.Go(func() error {
		return writeFile(filepath.Join(dir, filePresent), func(w io.Writer) error { return writePresent(w, chunks.len(), s.boot, all) })
	})
	if order := firstOf(x); order != nil {
		g.Go(func() error {
			b, err := json.Marshal(order)
			if err != nil {
				return err
			}
			return writeFile(filepath.Join(dir, fileOrder), func(w io.Writer) error { _, err := w.Write(b); return err })
		})
	}
	path := filepath.Join(dir, fileMeta)
	if err := errors.Join(writeFile(path, func(w io.Writer) error { return s.opts.Meta(w, x) }), g.Wait()); err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	in.MetaSize = st.Size()
	b, err := json.Marshal(in)
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(dir, fileInfo), func(w io.Writer) error { _, err := w.Write(b); return err }); err != nil {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	in.Chunks = nil

	l := s.newLayer(filepath.Join(s.dir, dirLayers, folderName(x.Blob)), in, chunks)
	l.charged.Store(charged)
	if err := s.charge(l, onDisk(dir)-blocks(filepath.Join(dir, fileData)), Prefetch); err != nil {
		return err
	}
	s.mu.Lock()
	if s.closed {
		err = ErrClosed
	} else if err = os.Rename(dir, l.dir); err == nil {
		s.layers[x.Blob] = l
	}
	s.mu.Unlock()
	if err != nil {
		s.charged.Add(charged - l.charged.Load())
		return err
	}
	return syncDir(filepath.Dir(l.dir))
}

// aside makes a folder of a new name in sub.
func (s *Store) aside(sub string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	dir := s.asideNameLocked(sub)
	return dir, os.Mkdir(dir, 0o700)
}

func (s *Store) asideNameLocked(sub string) string {
	s.asides++
	return filepath.Join(s.dir, sub, strconv.Itoa(s.asides))
}

// chargedFile is a data file whose growth counts towards the quota.
type chargedFile struct {
	s       *Store
	f       *os.File
	charged atomic.Int64
	written atomic.Int64
}

func (c *chargedFile) WriteAt(p []byte, off int64) (int, error) {
	if isZero(p) {
		return len(p), nil
	}
	n := int64(len(p))
	if over := c.written.Add(n) - c.charged.Load(); over > 0 {
		grow := max(over, chargeGrain)
		if c.s.charge(nil, grow, Prefetch) != nil {
			grow = over
			if err := c.s.charge(nil, grow, Prefetch); err != nil {
				return 0, err
			}
		}
		c.charged.Add(grow)
	}
	done, err := c.f.WriteAt(p, off)
	if isFull(err) && c.s.evict(n) {
		done, err = c.f.WriteAt(p, off)
	}
	return done, full(err)
}

// pour decodes what is missing from the whole blob.
func (l *layer) pour(ctx context.Context, blob io.Reader) error {
	l.mu.Lock()
	if err := l.usableLocked(Prefetch); err != nil {
		l.mu.Unlock()
		return err
	}
	ld, err := l.indexLocked()
	if err != nil {
		l.mu.Unlock()
		return err
	}
	l.wg.Add(1)
	l.mu.Unlock()
	defer l.wg.Done()
	at := &forward{r: blob}
	err = ld.x.Fill(ctx, 0, l.chunks.len()-1, at.open, func(c int, p []byte) error {
		if err := l.s.ctx.Err(); err != nil {
			return ErrClosed
		}
		return l.keep(c, p, Prefetch)
	})
	if err == nil && !l.full.Load() {
		err = errors.New("the decoder left chunks out")
	}
	if wrongChunk(err) >= 0 {
		err = fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}

// forward gives a decoder parts of a blob that can be read once.
type forward struct {
	r   io.Reader
	off int64
}

func (f *forward) open(off int64) (io.ReadCloser, error) {
	if off < f.off {
		return nil, fmt.Errorf("byte %d of the blob is needed again after byte %d", off, f.off)
	}
	if _, err := io.CopyN(io.Discard, f, off-f.off); err != nil {
		return nil, err
	}
	return io.NopCloser(f), nil
}

func (f *forward) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	f.off += int64(n)
	return n, err
}
