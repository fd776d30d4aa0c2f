package index

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"
)

// dataFile is the data file while it is written, front to back: gathered into large
// buffers, which are hashed by chunk and written to the sink side by side.
type dataFile struct {
	ctx    context.Context
	q      *queue
	cur    *buffer
	size   int   // of a buffer: whole chunks
	chunk  int64 // size of one
	off    int64 // bytes so far
	holes  int64
	chunks []Chunk // of hash, until it ends
}

func newDataFile(g *errgroup.Group, ctx context.Context, sink io.WriterAt, chunk int64) *dataFile {
	size := max(1, dataBuffer/chunk) * chunk
	outs := 1
	if sink != nil {
		outs = 2
	}
	d := &dataFile{ctx: ctx, q: newQueue(int(size), outs), size: int(size), chunk: chunk}
	g.Go(d.hash)
	if sink != nil {
		g.Go(func() error { return d.write(sink) })
	}
	return d
}

// space is where the next bytes may be put, never empty; advance tells how many were.
func (d *dataFile) space() ([]byte, error) {
	if d.cur == nil {
		b := d.q.get(d.ctx)
		if b == nil {
			return nil, d.ctx.Err()
		}
		b.data, b.off, b.zero = b.all[:0], d.off, 0
		d.cur = b
	}
	return d.cur.all[len(d.cur.data):], nil
}

func (d *dataFile) advance(n int) {
	d.cur.data = d.cur.all[:len(d.cur.data)+n]
	d.off += int64(n)
	if len(d.cur.data) == d.size {
		d.flush()
	}
}

func (d *dataFile) flush() {
	d.q.put(d.cur, int32(len(d.q.out)))
	d.cur = nil
}

// zeros goes on by n bytes of zeros. Long runs of them are not written.
func (d *dataFile) zeros(n int64) error {
	for n > 0 {
		p, err := d.space()
		if err != nil {
			return err
		}
		if run := n - n%d.chunk; run > 0 && len(d.cur.data) == 0 {
			d.cur.zero = run
			d.off += run
			n -= run
			d.flush()
			continue
		}
		p = p[:min(int64(len(p)), n)]
		clear(p)
		d.advance(len(p))
		n -= int64(len(p))
	}
	return nil
}

// align goes on to the next multiple of Align.
func (d *dataFile) align() error { return d.zeros(-d.off & (Align - 1)) }

// close ends the file.
func (d *dataFile) close() error {
	if err := d.align(); err != nil {
		return err
	}
	if d.cur != nil {
		d.flush()
	}
	d.q.close()
	return nil
}

// hash finds the chunks' sums.
func (d *dataFile) hash() error {
	var none *[32]byte // of a chunk of zeros
	at := int64(0)
	for {
		b, err := receive(d.ctx, d.q.out[0])
		if b == nil {
			return err
		}
		for range b.zero / d.chunk {
			if none == nil {
				sum := sha256.Sum256(make([]byte, d.chunk))
				none = &sum
			}
			d.chunks = append(d.chunks, Chunk{Off: at, Len: d.chunk, Sum: *none})
			at += d.chunk
		}
		for p := b.data; len(p) > 0; {
			n := min(int64(len(p)), d.chunk)
			d.chunks = append(d.chunks, Chunk{Off: at, Len: n, Sum: sha256.Sum256(p[:n])})
			at += n
			p = p[n:]
		}
		if at > maxData {
			return notIndexable("it has more than %d GiB of data", int64(maxData)>>30)
		}
		b.release()
	}
}

func (d *dataFile) write(sink io.WriterAt) error {
	for {
		b, err := receive(d.ctx, d.q.out[1])
		if b == nil {
			return err
		}
		if len(b.data) > 0 {
			if _, err := sink.WriteAt(b.data, b.off); err != nil {
				return fmt.Errorf("the layer's data could not be written: %w", err)
			}
		}
		b.release()
	}
}
