package index

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Options are the sizes that an index is made with. The zero value is good.
type Options struct {
	Spacing   int64 // bytes of stream between two points, at least about; 0 is DefaultSpacing
	ChunkSize int64 // a multiple of Align; 0 is DefaultChunkSize
}

const (
	// DefaultSpacing is how far it is to the next point, in bytes of the stream. Half of
	// it is decoded, and fetched, in vain for a random read. BenchmarkSpacing measures
	// what else is worth it; each point takes 32 KiB of memory, and some 2 KiB of an encoded
	// index, which has to stay below 1 % of its layer.
	DefaultSpacing = 1 << 20

	// DefaultChunkSize is half of what the kernel reads of a file at a time: it begins anywhere, so that of longer chunks
	// as much again would be decoded with it. Shorter ones save less than their sums take.
	DefaultChunkSize = 64 << 10

	minSpacing = 2 * history

	blobBuffer   = 256 << 10 // read from the blob at once
	streamBuffer = 512 << 10 // decoded at once
	dataBuffer   = 1 << 20   // written to the sink at once, about
	buffers      = 6         // of each kind: what one stage may be ahead of the next
)

// Build reads a whole layer once and makes its index. What it reads must be what desc
// says; its compression is told by its first bytes, not by desc. When sink is not
// nil it gets the data file: it must be empty, or read as zeros, at first, for holes are
// not written.
//
// The error is ErrNotIndexable when the blob is right and yet something in it cannot
// be indexed. Build takes some 15 MiB of memory beside the index, and a zstd frame's window. It returns
// when blob's Read does, at the latest: whoever cancels ctx must also end that.
func Build(ctx context.Context, blob io.Reader, desc ocispec.Descriptor, sink io.WriterAt, o Options) (*Index, error) {
	if desc.Digest.Algorithm() != digest.SHA256 || desc.Digest.Validate() != nil || desc.Size <= 0 || desc.Size > maxSize {
		return nil, notIndexable("its descriptor has the digest %q and the size %d", desc.Digest, desc.Size)
	}
	if o.Spacing == 0 {
		o.Spacing = DefaultSpacing
	}
	if o.ChunkSize == 0 {
		o.ChunkSize = DefaultChunkSize
	}
	if o.ChunkSize < Align || o.ChunkSize%Align != 0 || o.ChunkSize > maxChunk {
		return nil, fmt.Errorf("a chunk size of %d bytes is not a multiple of %d", o.ChunkSize, Align)
	}
	o.Spacing = max(o.Spacing, minSpacing)
	b := &build{
		x:    &Index{Blob: desc.Digest, BlobSize: desc.Size},
		o:    o,
		blob: newQueue(int(min(blobBuffer, desc.Size)), 1),
		raw:  newQueue(history+streamBuffer, 2),
		tree: newTree(),
	}
	g, gctx := errgroup.WithContext(ctx)
	b.ctx = gctx
	read := make(chan error, 1)
	go func() { read <- b.readBlob(ctx, blob) }()
	g.Go(b.decode)
	g.Go(b.hashStream)
	b.data = newDataFile(g, gctx, sink, o.ChunkSize)
	g.Go(b.untar)
	err := g.Wait()
	// A wrong blob explains every other failure, so it is waited for.
	if rerr := <-read; rerr != nil {
		return nil, rerr
	}
	if err != nil {
		return nil, err
	}
	if b.x.Entries, err = b.tree.entries(); err != nil {
		return nil, err
	}
	b.x.Chunks, b.x.DataSize = b.data.chunks, b.data.off
	b.x.DiffID = b.x.Blob
	if b.x.Compression != Tar {
		b.x.DiffID = digest.NewDigest(digest.SHA256, b.diff)
	}
	if len(b.x.Points) > 0 && b.x.DataSize == 0 {
		b.x.Points = nil
	}
	return b.x, b.x.Validate()
}

// build is a Build under way. Its stages run side by side, each one's results going
// to the next in buffers that return when all who read them are done.
type build struct {
	x    *Index
	o    Options
	ctx  context.Context
	blob *queue // from readBlob to decode
	raw  *queue // from decode to untar, and hashStream
	tree *tree
	data *dataFile
	diff hash.Hash // of the stream
}

// readBlob reads and hashes the blob. It goes on when nobody takes its buffers any
// more, because whether the blob is right must be known.
func (b *build) readBlob(ctx context.Context, r io.Reader) error {
	defer b.blob.close()
	h := sha256.New()
	left := b.x.BlobSize
	spare := make([]byte, 0)
	for left > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		buf := b.blob.get(b.ctx)
		p := spare
		if buf != nil {
			p = buf.all
		} else if len(p) == 0 {
			spare = make([]byte, blobBuffer)
			p = spare
		}
		n, err := io.ReadFull(r, p[:min(int64(len(p)), left)])
		h.Write(p[:n])
		left -= int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return fmt.Errorf("the layer ended after %d of %d bytes: %w", b.x.BlobSize-left, b.x.BlobSize, io.ErrUnexpectedEOF)
		}
		if err != nil {
			return fmt.Errorf("the layer could not be read: %w", err)
		}
		if buf != nil {
			buf.data = p[:n]
			b.blob.put(buf, 1)
		}
	}
	for range 100 { // a Reader may answer nothing now and then
		n, err := r.Read(make([]byte, 1))
		if n > 0 {
			return fmt.Errorf("the layer is longer than the %d bytes of its descriptor", b.x.BlobSize)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("the layer could not be read: %w", err)
		}
	}
	if got := digest.NewDigest(digest.SHA256, h); got != b.x.Blob {
		return fmt.Errorf("the layer has the digest %s, not %s", got, b.x.Blob)
	}
	return nil
}

// decode turns the blob into the stream.
func (b *build) decode() error {
	src := &queueReader{in: b.blob.out[0], ctx: b.ctx}
	head, err := src.peek(4)
	if err != nil {
		return b.blobErr(err)
	}
	var next func([]byte) ([]byte, error)
	var points *[]Point
	switch b.x.Compression = sniff(head); b.x.Compression {
	case Gzip:
		g := newGunzip(src, b.o.Spacing)
		next, points = g.next, &g.points
	case Zstd:
		u, err := newUnzstd(src, 0, 0, b.o.Spacing)
		if err != nil {
			return err
		}
		defer u.close()
		next, points = u.next, &u.points
	default:
		points = &[]Point{{}}
		next = func(buf []byte) ([]byte, error) {
			n, err := io.ReadFull(src, buf[history:])
			if n > 0 && (err == io.EOF || err == io.ErrUnexpectedEOF) {
				err = nil
			}
			return buf[history : history+n], err
		}
	}
	var last *buffer // whose end the next one needs
	for {
		buf := b.raw.get(b.ctx)
		if buf == nil {
			return b.ctx.Err()
		}
		p, err := next(buf.all)
		if last != nil {
			last.release()
		}
		last = buf
		if err == io.EOF {
			b.x.Points = *points
			b.raw.close() // not after an error, which is then the first to be heard of
			return nil
		}
		if err != nil {
			return b.blobErr(err)
		}
		buf.data = p
		b.raw.put(buf, 3) // untar, hashStream, and this loop until the next buffer
	}
}

// blobErr is for data that cannot be decoded. When the blob turns out to be damaged,
// that is told instead.
func (b *build) blobErr(err error) error {
	if cerr := b.ctx.Err(); cerr != nil {
		return cerr
	}
	return ErrNotIndexable{fmt.Errorf("it does not decompress: %w", err)}
}

// sniff tells a blob's compression by its first four bytes, as containerd does.
func sniff(head []byte) Compression {
	if len(head) >= 3 && head[0] == 0x1f && head[1] == 0x8b && head[2] == 8 {
		return Gzip
	}
	if len(head) >= 4 {
		m := uint32(head[0]) | uint32(head[1])<<8 | uint32(head[2])<<16 | uint32(head[3])<<24
		if m == zstdMagic || m&^15 == zstdSkippable {
			return Zstd
		}
	}
	return Tar
}

// hashStream finds the diff ID.
func (b *build) hashStream() error {
	b.diff = sha256.New()
	for {
		buf, err := receive(b.ctx, b.raw.out[1])
		if buf == nil {
			return err
		}
		if b.x.Compression != Tar { // whose diff ID is the blob's digest
			b.diff.Write(buf.data)
		}
		buf.release()
	}
}
