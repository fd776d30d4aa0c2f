package layerstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Priority orders reads. The values are those of package fetcher.
type Priority int

// The priorities, lowest first.
const (
	// Background is the decoding of everything that nobody waits for.
	Background Priority = iota
	// Prefetch is what will likely be read soon.
	Prefetch
	// Demand is what somebody waits for now.
	Demand
)

// Blob is where a layer's missing chunks come from: its compressed blob. ReadAt reads
// all of p or returns an error; it is called for parts that lie within Size, from
// several goroutines, and ends soon after ctx does.
//
// What it delivers need not have been checked. When it turned out wrong and the Blob
// also has the method Doubt, that is told the range, before it is read again.
type Blob interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64, prio Priority) (int, error)
}

type doubter interface{ Doubt(from, to int64) }

const (
	// blockSize is what is asked of a Blob at a time, and blocks begin at its
	// multiples: some of the fetcher's smallest pieces, or one.
	blockSize = 256 << 10
	// pipeline is how many blocks one decoder has under way at most: 2 MiB cover a
	// round trip of 80 ms at 200 Mbit/s.
	pipeline = 8
	// strayRead is what is asked for where a decoder reads beyond what its chunks
	// need, as those with a buffer do.
	strayRead = 32 << 10
	// lateAfter is when a block of what is read ahead is late for somebody who waits:
	// more than most reads from a registry nearby take, little beside what is noticed.
	lateAfter = 100 * time.Millisecond
)

// blobReader reads a blob forward for one decoder. It has several blocks under way,
// but none beyond what the run needs up to its limit.
type blobReader struct {
	r      *run
	blob   Blob
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	off   int64 // of the next byte that is asked for
	size  int64
	cur   []byte // of the first block, what was not read yet
	first *block
	queue []*block // behind first, in order
}

// block is a part of a blob that is under way, or arrived.
type block struct {
	off  int64
	prio Priority
	buf  []byte
	err  error
	done chan struct{} // closed when buf or err is set
}

func (r *run) openBlob(off int64) (io.ReadCloser, error) {
	blob, err := r.l.source(r.ctx)
	if err != nil {
		return nil, err
	}
	size := r.l.info.BlobSize
	if blob.Size() != size {
		return nil, fmt.Errorf("the blob of %s has %d bytes, its index is of one of %d", r.l.info.Blob, blob.Size(), size)
	}
	if off < 0 || off > size {
		return nil, fmt.Errorf("decoding would begin at byte %d of %d", off, size)
	}
	ctx, cancel := context.WithCancel(r.ctx)
	return &blobReader{r: r, blob: blob, ctx: ctx, cancel: cancel, off: off, size: size}, nil
}

func (b *blobReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for len(b.cur) == 0 {
		b.recycle()
		b.ask()
		if len(b.queue) == 0 {
			return 0, io.EOF
		}
		b.first, b.queue = b.queue[0], b.queue[1:]
		if err := b.await(); err != nil {
			return 0, err
		}
		b.cur = b.first.buf
	}
	n := copy(p, b.cur)
	b.cur = b.cur[n:]
	return n, nil
}

func (b *blobReader) recycle() {
	if b.first != nil && b.first.err == nil {
		b.r.l.s.buffers.Put((*[blockSize]byte)(b.first.buf[:blockSize:blockSize]))
	}
	b.first = nil
}

// ask puts blocks under way.
func (b *blobReader) ask() {
	bound, hurried := b.r.bounds()
	for len(b.queue) < pipeline && b.off < b.size {
		end := b.off - b.off%blockSize + blockSize
		switch {
		case b.off < bound:
			// Only the last block is cut to what is needed; a cut of little is not
			// worth another question.
			if end > bound && end-bound > strayRead {
				end = bound
			}
		case len(b.queue) == 0:
			end = min(end, b.off+strayRead)
		default:
			return
		}
		end = min(end, b.size)
		prio := b.r.base
		if b.off < hurried {
			prio = Demand
		}
		b.queue = append(b.queue, b.fetch(b.off, int(end-b.off), prio))
		b.off = end
	}
}

func (b *blobReader) fetch(off int64, n int, prio Priority) *block {
	bl := &block{off: off, prio: prio, done: make(chan struct{})}
	b.wg.Go(func() {
		defer close(bl.done)
		buf := b.r.l.s.buffers.Get().(*[blockSize]byte)[:n]
		got, err := b.blob.ReadAt(b.ctx, buf, off, prio)
		if got == n && (err == nil || errors.Is(err, io.EOF)) {
			b.r.l.stats.fetched.Add(int64(n))
			bl.buf = buf
			return
		}
		if err == nil || errors.Is(err, io.EOF) {
			// Not io.EOF: a decoder would take it for the end of the blob.
			err = io.ErrUnexpectedEOF
		}
		bl.err = fmt.Errorf("read the blob at %d: %w", off, err)
	})
	return bl
}

// await waits for the first block. When somebody waits for the run that was asked for
// with less hurry, the block is asked for once more: at once if it was for the
// background, which may be held back, else when it is late.
func (b *blobReader) await() error {
	var late <-chan time.Time
	for {
		raised, demand := b.r.hurried()
		if demand && b.first.prio < Demand && late == nil {
			wait := lateAfter
			if b.first.prio == Background {
				wait = 0
			}
			timer := time.NewTimer(wait)
			defer timer.Stop()
			late = timer.C
		}
		select {
		case <-b.first.done:
			return b.first.err
		case <-raised:
			continue
		case <-late:
		}
		slow := b.first
		fast := b.fetch(slow.off, b.length(slow), Demand)
		select {
		case <-fast.done:
			b.first = fast
		case <-slow.done:
		}
		return b.first.err
	}
}

// length is that of a block that may not have arrived: up to the one behind it.
func (b *blobReader) length(bl *block) int {
	if len(b.queue) > 0 {
		return int(b.queue[0].off - bl.off)
	}
	return int(b.off - bl.off)
}

func (b *blobReader) Close() error {
	b.cancel()
	b.wg.Wait()
	return nil
}

// source opens the layer's blob, once for all runs.
func (l *layer) source(ctx context.Context) (Blob, error) {
	l.src.opening.Lock()
	defer l.src.opening.Unlock()
	l.src.mu.Lock()
	open, b := l.src.open, l.src.blob
	l.src.mu.Unlock()
	if b != nil {
		return b, nil
	}
	if open == nil {
		return nil, fmt.Errorf("%s: %w", l.info.Blob, ErrNoSource)
	}
	b, err := open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the blob of %s: %w", l.info.Blob, err)
	}
	l.src.mu.Lock()
	defer l.src.mu.Unlock()
	l.src.blob = b
	return b, nil
}

// dropSource lets go of the blob; a run that still needs one opens it again.
func (l *layer) dropSource() {
	l.src.mu.Lock()
	b := l.src.blob
	l.src.blob = nil
	l.src.mu.Unlock()
	if c, ok := b.(io.Closer); ok {
		if err := c.Close(); err != nil {
			l.s.log.Warn("Could not close the blob of a layer.", "layer", l.info.Blob, "error", err)
		}
	}
}

// source is where a layer's blob comes from.
type source struct {
	opening sync.Mutex // held while it is opened, before mu

	mu   sync.Mutex // guards following
	open func(context.Context) (Blob, error)
	blob Blob // nil until a chunk was missing
}
