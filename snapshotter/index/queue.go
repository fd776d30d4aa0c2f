package index

import (
	"context"
	"io"
	"sync/atomic"
)

// buffer is memory of one size that goes from stage to stage.
type buffer struct {
	all  []byte
	data []byte // what is in it
	off  int64  // of data, where that matters
	zero int64  // stands for this many zeros instead of data
	refs atomic.Int32
	home chan *buffer
}

func (b *buffer) release() {
	if b.refs.Add(-1) == 0 {
		b.home <- b
	}
}

// queue is the way from one stage to those that follow it. There are only so many
// buffers, which bounds memory and makes a fast stage wait for a slow one.
type queue struct {
	size int // of a buffer
	made int // buffers; they are made when they are needed, as most layers are small
	free chan *buffer
	out  []chan *buffer // each gets every buffer
}

func newQueue(size, outs int) *queue {
	q := &queue{size: size, free: make(chan *buffer, buffers)}
	for range outs {
		q.out = append(q.out, make(chan *buffer, buffers))
	}
	return q
}

// get waits for a free buffer; nil when ctx is done. One goroutine alone may call it.
func (q *queue) get(ctx context.Context) *buffer {
	select {
	case b := <-q.free:
		return b
	default:
	}
	if q.made < buffers && ctx.Err() == nil {
		q.made++
		return &buffer{all: make([]byte, q.size), home: q.free}
	}
	select {
	case b := <-q.free:
		return b
	case <-ctx.Done():
		return nil
	}
}

// put hands b to all outs, and never waits: they have room for every buffer there is.
// refs releases bring b back.
func (q *queue) put(b *buffer, refs int32) {
	b.refs.Store(refs)
	for _, out := range q.out {
		out <- b
	}
}

func (q *queue) close() {
	for _, out := range q.out {
		close(out)
	}
}

// receive waits for the next buffer: nil without an error after the last one.
func receive(ctx context.Context, in <-chan *buffer) (*buffer, error) {
	select {
	case b, ok := <-in:
		if ok {
			return b, nil
		}
		return nil, ctx.Err()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// queueReader reads what comes out of a queue.
type queueReader struct {
	in   <-chan *buffer
	ctx  context.Context
	cur  *buffer
	rest []byte
	off  int64 // bytes read
}

// fill waits for something to be there.
func (r *queueReader) fill() error {
	for len(r.rest) == 0 {
		if r.cur != nil {
			r.cur.release()
			r.cur = nil
		}
		b, err := receive(r.ctx, r.in)
		if err != nil {
			return err
		}
		if b == nil {
			return io.EOF
		}
		r.cur, r.rest = b, b.data
	}
	return nil
}

// peek returns up to n bytes that come next.
func (r *queueReader) peek(n int) ([]byte, error) {
	if err := r.fill(); err != nil {
		return nil, err
	}
	return r.rest[:min(n, len(r.rest))], nil
}

func (r *queueReader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := r.fill(); err != nil {
		return 0, err
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	r.off += int64(n)
	return n, nil
}
