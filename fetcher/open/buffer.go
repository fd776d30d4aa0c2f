package open

import (
	"fmt"
	"io"
	"sync"
)

// buffer is the content of one metainfo piece that is not in the store yet. It is safe for concurrent use.
type buffer struct {
	mu     sync.Mutex // a leaf
	data   []byte     // guarded by mu
	chunks []bool     // those that were written; guarded by mu
	left   int        // count of those that were not; guarded by mu
}

func newBuffer(n int64) *buffer {
	c := int((n + chunkSize - 1) / chunkSize)
	return &buffer{data: make([]byte, n), chunks: make([]bool, c), left: c}
}

// write puts whole chunks in.
func (b *buffer) write(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	size, end := int64(len(b.data)), off+int64(len(p))
	if off < 0 || off%chunkSize != 0 || end > size || end%chunkSize != 0 && end != size {
		return 0, fmt.Errorf("%d bytes at %d are no chunks of a piece of %d", len(p), off, size)
	}
	copy(b.data[off:], p)
	for c := off / chunkSize; c*chunkSize < end; c++ {
		if !b.chunks[c] {
			b.chunks[c] = true
			b.left--
		}
	}
	return len(p), nil
}

// read is io.ReaderAt; errNotThere before all chunks were written.
func (b *buffer) read(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left > 0 {
		return 0, errNotThere
	}
	if off < 0 || off >= int64(len(b.data)) {
		return 0, io.EOF
	}
	n := copy(p, b.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (b *buffer) full() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.left == 0
}

// part is the bytes from off on, n of them, of a full buffer: nobody writes to those any more.
func (b *buffer) part(off, n int64) []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.data[off : off+n]
}
