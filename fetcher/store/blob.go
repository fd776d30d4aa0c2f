package store

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"

	digest "github.com/opencontainers/go-digest"
)

// Blob is a handle on a blob. All methods may be called at the same time, Close last; handles of one digest share everything but that
// they are closed.
type Blob struct {
	state  *state
	entry  *entry
	closed atomic.Bool
}

var (
	_ io.ReaderAt = (*Blob)(nil)
	_ io.WriterAt = (*Blob)(nil)
	_ io.Closer   = (*Blob)(nil)
)

// Digest is the blob's name.
func (b *Blob) Digest() digest.Digest { return b.state.digest }

// Size is the blob's length in bytes.
func (b *Blob) Size() int64 { return b.state.size }

// PieceSize is the length in bytes of its pieces but the last, see [PieceSize].
func (b *Blob) PieceSize() int64 { return b.state.pieceSize }

// Pieces is the number of pieces; 0 for an empty blob.
func (b *Blob) Pieces() int { return len(b.state.sources) }

// PieceRange is where piece i, 0 <= i < Pieces(), lies.
func (b *Blob) PieceRange(i int) (off, n int64) { return pieceRange(b.state.size, i) }

// Has tells whether piece i is held. False for an i that does not exist.
func (b *Blob) Has(i int) bool {
	return i >= 0 && i < len(b.state.sources) && b.state.isHeld(i)
}

// Source is who supplied piece i, as recorded, also by earlier processes; 0 when it is not held.
func (b *Blob) Source(i int) Source {
	if !b.Has(i) {
		return 0
	}
	return b.state.source(i)
}

// Have is how many bytes lie in held pieces.
func (b *Blob) Have() int64 { return b.state.have.Load() }

// Frontier is the first piece that is not held, Pieces() when there is none.
func (b *Blob) Frontier() int { return int(b.state.frontier.Load()) }

// Complete tells whether the whole blob was checked against its digest.
func (b *Blob) Complete() bool { return b.state.at() >= verified }

// Changed returns a channel that is closed at the next change of the set of pieces, and when the blob becomes complete. Get it before
// looking at what it announces, and again after each change.
func (b *Blob) Changed() <-chan struct{} {
	st := b.state
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.changed == nil {
		st.changed = make(chan struct{})
	}
	return st.changed
}

// WriteAt puts bytes into pieces that are not held yet. They do not count before MarkPiece. When any byte would lie in a held piece
// nothing is written and the error is [ErrHeld], so suppliers that race each other write piece by piece. Two writers of one piece must
// agree between them whose bytes stay; a write never changes a piece once it is held.
//
// A full disk is [ErrNoSpace]. The quota is not looked at here: [Store.Blob] has made room for all of the blob.
func (b *Blob) WriteAt(p []byte, off int64) (int, error) {
	if b.closed.Load() {
		return 0, ErrClosed
	}
	if off < 0 || off > b.state.size || int64(len(p)) > b.state.size-off {
		return 0, fmt.Errorf("write blob %s: %d bytes at %d do not lie in its %d bytes", b.state.digest, len(p), off, b.state.size)
	}
	return b.state.write(p, off)
}

// MarkPiece declares piece i held, after all its bytes were written, and records it with its CRC-32C, which it reads the piece back for.
// When it returns, the piece outlives a kill of the process. Marking what is held does nothing. It waits for writes to the piece that
// are in flight. On an error the piece stays missing.
func (b *Blob) MarkPiece(i int, src Source) error {
	if b.closed.Load() {
		return ErrClosed
	}
	return b.state.mark(i, src, nil)
}

// MarkPieceCRC is MarkPiece for a caller that has the CRC-32C (Castagnoli) of the piece's bytes: nothing is read back. A wrong CRC costs
// the piece at the first open after a machine crash.
func (b *Blob) MarkPieceCRC(i int, src Source, crc uint32) error {
	if b.closed.Load() {
		return ErrClosed
	}
	return b.state.mark(i, src, &crc)
}

// ClearPieces forgets the held pieces for which forget is true, after a digest mismatch, and returns how many those were. Of a complete
// blob nothing is forgotten. forget may call the blob's methods. A ReadAt that runs at the same time may still return bytes of a
// forgotten piece, or of what is written there next: the caller keeps these two apart.
func (b *Blob) ClearPieces(forget func(i int, src Source) bool) int {
	if b.closed.Load() || b.Complete() {
		return 0
	}
	return b.state.clear(forget)
}

// ReadAt reads like [io.ReaderAt]: all of p or an error, [io.EOF] at the end. When any byte of it lies in a piece that is not held
// nothing is read and the error is [ErrMissing]. It takes no lock.
func (b *Blob) ReadAt(p []byte, off int64) (int, error) {
	st := b.state
	if b.closed.Load() {
		return 0, ErrClosed
	}
	if off < 0 {
		return 0, fmt.Errorf("read blob %s at %d: the offset is negative", st.digest, off)
	}
	if off >= st.size {
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > st.size-off {
		p, eof = p[:st.size-off], io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	if st.at() == filling {
		for i, last := st.pieceOf(off), st.pieceOf(off+int64(len(p))-1); i <= last; i++ {
			if !st.isHeld(i) {
				return 0, fmt.Errorf("read blob %s at %d: piece %d: %w", st.digest, off, i, ErrMissing)
			}
		}
	}
	n, err := st.data.ReadAt(p, off)
	if n < len(p) {
		return n, fmt.Errorf("read blob %s at %d: %w", st.digest, off, short(err))
	}
	return n, eof
}

// File opens the complete blob's file for reading, for sendfile(2) and the like; [ErrIncomplete] before. The caller closes it. It stays
// readable when the blob is evicted after b was closed.
func (b *Blob) File() (*os.File, error) {
	if b.closed.Load() {
		return nil, ErrClosed
	}
	if !b.Complete() {
		return nil, fmt.Errorf("open file of blob %s: %w", b.state.digest, ErrIncomplete)
	}
	path := filepath.Join(b.state.dir, fileData)
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	// The checked bytes are those of the open file; the path is somebody's to change.
	if !samePath(b.state.data, path) {
		f.Close()
		return nil, fmt.Errorf("open file of blob %s: %s was replaced from outside the store", b.state.digest, path)
	}
	return f, nil
}

// Verify reads the whole blob and checks it against its digest; all pieces must be held ([ErrMissing]). On success the blob is complete
// at once, in this process; the sync of the data and the durable record follow in the background, and Close waits for them.
// [ErrMismatch]: some piece is wrong, the caller forgets and fetches again what it does not trust. Already complete: nil.
func (b *Blob) Verify(ctx context.Context) error {
	st := b.state
	if b.closed.Load() {
		return ErrClosed
	}
	if b.Complete() {
		return nil
	}
	st.mu.Lock()
	cleared := st.cleared
	st.mu.Unlock()
	if err := st.checkAllHeld(); err != nil {
		return err
	}
	h := st.digest.Algorithm().Hash()
	if err := st.read(ctx, 0, st.size, func(p []byte) { h.Write(p) }); err != nil {
		return fmt.Errorf("verify blob %s: %w", st.digest, err)
	}
	return st.finish(digest.NewDigest(st.digest.Algorithm(), h), cleared)
}

// Finish is Verify for a caller that hashed the bytes as they came, in order and as they are in the store: sum is what came out.
func (b *Blob) Finish(ctx context.Context, sum digest.Digest) error {
	if b.closed.Load() {
		return ErrClosed
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return b.state.finish(sum, anyClear)
}

// Close gives the handle back. The last one of a blob waits for the record of completion and returns what went wrong with it; the blob
// is then verified again by whoever opens it next. A blob of which nothing is held goes away.
func (b *Blob) Close() error {
	if b.closed.Swap(true) {
		return nil
	}
	s, e := b.state.store, b.entry
	s.mu.Lock()
	if e.refs--; e.refs > 0 {
		s.mu.Unlock()
		return nil
	}
	e.closing = true
	s.mu.Unlock()
	err := b.state.close()
	s.drop(b.state.digest, e)
	return err
}
