package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/store"
)

// Blob is a handle on one blob. All methods are safe for concurrent use; after
// Close they return ErrClosed.
type Blob struct {
	d     *download
	desc  ocispec.Descriptor
	close sync.Once
	over  func() // ends what was begun for this handle alone; may be nil
}

// Descriptor is the one the blob was asked with.
func (b *Blob) Descriptor() ocispec.Descriptor { return b.desc }

// Size is the blob's size in bytes.
func (b *Blob) Size() int64 { return b.desc.Size }

// ReadAt reads len(p) bytes from off, fetching what is missing. It returns the
// full length or an error: io.EOF when the range runs over the end (with the
// bytes before it), else nothing was read. See the package comment for what has
// been checked of the bytes.
func (b *Blob) ReadAt(ctx context.Context, p []byte, off int64, prio Priority) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d of %s", off, b.desc.Digest)
	}
	var eof error
	if off+int64(len(p)) > b.desc.Size {
		eof = io.EOF
		p = p[:max(b.desc.Size-off, 0)]
	}
	if len(p) == 0 {
		return 0, eof
	}
	first, last := b.d.piecesOf(off, int64(len(p)))
	// A piece can be dropped between the wait and the read, when the whole
	// turned out wrong: that is rare and then fetched again.
	for range flightTries {
		if err := b.d.need(ctx, first, last, prio); err != nil {
			return 0, err
		}
		n, err := b.d.st.ReadAt(p, off)
		switch {
		case n == len(p):
			return n, eof
		case !errors.Is(err, store.ErrMissing):
			return 0, fmt.Errorf("%s: %w", b.d.what(), err)
		}
	}
	return 0, fmt.Errorf("%s: bytes from %d on were wrong each time they were fetched: %w", b.d.what(), off, ErrMismatch)
}

// Fetch starts the background fetch of everything; it returns at once.
func (b *Blob) Fetch() { b.d.start() }

// Prefetch makes a range local, in parts, until it is or ctx ends.
func (b *Blob) Prefetch(ctx context.Context, off, n int64) error {
	if off < 0 || n < 0 || off+n > b.desc.Size {
		return fmt.Errorf("prefetch of [%d,%d) of %s, which has %d bytes", off, off+n, b.desc.Digest, b.desc.Size)
	}
	for n > 0 {
		part := min(n, maxFlight)
		first, last := b.d.piecesOf(off, part)
		b.d.f.yield(ctx, 0, yieldWaited)
		if err := b.d.need(ctx, first, last, Prefetch); err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// Wait fetches everything and returns when the digest was checked.
func (b *Blob) Wait(ctx context.Context) error {
	b.d.waiters.Add(1)
	defer b.d.waiters.Add(-1)
	b.d.start()
	b.d.mu.Lock()
	done := b.d.done
	b.d.mu.Unlock()
	select {
	case <-done:
		b.d.mu.Lock()
		defer b.d.mu.Unlock()
		return b.d.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Complete reports whether all of the blob is here and its digest was checked.
func (b *Blob) Complete() bool { return b.d.st.Complete() }

// File opens the blob's file for reading; only of a complete blob.
func (b *Blob) File() (*os.File, error) { return b.d.st.File() }

// Close gives the handle back. A fetch without handles stops where it is.
func (b *Blob) Close() error {
	b.close.Do(func() {
		if b.over != nil {
			b.over()
		}
		b.d.release()
	})
	return nil
}

// Reader reads the blob from its start, fetching all of it. The last piece is
// handed out only after the digest was checked: a reader that got io.EOF has
// got the right bytes, and one of a wrong blob gets ErrMismatch instead.
func (b *Blob) Reader(ctx context.Context) io.ReadCloser { return b.ReaderAt(ctx, 0) }

// ReaderAt is Reader from an offset.
func (b *Blob) ReaderAt(ctx context.Context, off int64) io.ReadCloser {
	b.d.waiters.Add(1)
	b.d.start()
	ctx, cancel := context.WithCancel(ctx)
	return &reader{b: b, ctx: ctx, cancel: cancel, off: off}
}

type reader struct {
	b      *Blob
	ctx    context.Context
	cancel context.CancelFunc
	off    int64
	close  sync.Once
}

func (r *reader) Read(p []byte) (int, error) {
	d := r.b.d
	if len(p) == 0 {
		return 0, nil
	}
	if r.off >= r.b.desc.Size {
		if err := r.b.Wait(r.ctx); err != nil {
			return 0, err
		}
		return 0, io.EOF
	}
	i := int(r.off / d.st.PieceSize())
	for {
		if err := r.await(i); err != nil {
			return 0, err
		}
		off, n := d.st.PieceRange(i)
		n = min(off+n-r.off, int64(len(p)))
		m, err := d.st.ReadAt(p[:n], r.off)
		if m == int(n) {
			r.off += n
			return m, nil
		}
		if !errors.Is(err, store.ErrMissing) {
			return 0, fmt.Errorf("%s: %w", d.what(), err)
		}
	}
}

// await waits until piece i may be handed out.
func (r *reader) await(i int) error {
	d := r.b.d
	if i == d.pieces-1 {
		return r.b.Wait(r.ctx)
	}
	d.mu.Lock()
	done := d.done
	d.mu.Unlock()
	for {
		changed := d.st.Changed()
		if d.st.Has(i) {
			return nil
		}
		select {
		case <-changed:
		case <-done:
			if d.st.Has(i) {
				return nil
			}
			d.mu.Lock()
			err := d.err
			d.mu.Unlock()
			if err == nil {
				err = ErrClosed
			}
			return err
		case <-r.ctx.Done():
			return r.ctx.Err()
		}
	}
}

func (r *reader) Close() error {
	r.close.Do(func() {
		r.cancel()
		r.b.d.waiters.Add(-1)
	})
	return nil
}

// Progress is how far the fetch of one blob is. Sizes are bytes.
type Progress struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"media_type,omitempty"`
	Size      int64         `json:"size"`
	// Have is what is here now; the three From fields say where it came from:
	// FromCache was here before, and with wrong bytes dropped on the way the sum
	// can exceed Have.
	Have       int64 `json:"have"`
	FromCache  int64 `json:"from_cache"`
	FromOrigin int64 `json:"from_origin"`
	FromPeers  int64 `json:"from_peers"`
	// Uploaded is what was given to other nodes.
	Uploaded int64 `json:"uploaded"`
	State    State `json:"state"`
	// Peers is how many other nodes are connected for this blob.
	Peers int `json:"peers"`
	// Note says in a few words what the fetch waits for, or why it failed.
	Note string `json:"note,omitempty"`
}

// Progress returns the state of the fetch now.
func (b *Blob) Progress() Progress { return b.d.progress(b.desc) }

func (d *download) progress(desc ocispec.Descriptor) Progress {
	p := Progress{
		Digest: desc.Digest, MediaType: desc.MediaType, Size: desc.Size,
		Have:       d.st.Have(),
		FromCache:  d.fromCache.Load(),
		FromOrigin: d.fromOrigin.Load(),
		FromPeers:  d.fromPeers.Load(),
		Uploaded:   d.readUp.Load(),
	}
	d.mu.Lock()
	p.State, p.Note = d.state, d.note
	switch {
	case d.state == Failed && d.err != nil:
		p.Note = d.err.Error()
	case d.state == Fetching && d.originErr != nil:
		p.Note = "registry: " + d.originErr.Error()
	}
	tor := d.tor
	d.mu.Unlock()
	if tor != nil {
		p.Peers = tor.Connections()
	}
	for _, o := range d.openNow() {
		s := o.tor.Stats()
		p.Peers += s.Peers
		p.Uploaded += s.Uploaded
	}
	return p
}

// Changed is closed at the next change of what is here of the blob; take a new
// one after each.
func (b *Blob) Changed() <-chan struct{} { return b.d.st.Changed() }
