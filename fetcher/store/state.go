package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"sync"
	"sync/atomic"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// phase is how far a blob is. It only grows.
type phase uint32

const (
	// filling: pieces come and may go.
	filling phase = iota
	// verified: the digest was checked, the sync and the record of it are under way.
	verified
	// durable: complete on disk; the writer lock is given back.
	durable
)

// state is a blob that this process has open, shared by all its handles.
type state struct {
	store     *Store
	digest    digest.Digest
	size      int64
	pieceSize int64
	dir       string
	used      *os.File // flock LOCK_SH while the state lives
	data      *os.File // O_RDWR while filling; O_RDONLY when it was complete already
	loaded    bool     // what the disk claims is in held

	// Read without a lock; written under mu.
	held     []atomic.Uint64 // bit i%64 of word i/64: piece i is held
	have     atomic.Int64    // bytes in held pieces
	frontier atomic.Int64    // first piece that is not held
	phase    atomic.Uint32
	touched  atomic.Int64 // UnixNano of the last record of use

	mu      sync.Mutex
	pieces  *os.File    // guarded by mu, nil once durable; used without it while a piece is marked, which keeps phase at filling
	writer  *os.File    // guarded by mu, nil once durable; flock LOCK_EX
	sources []Source    // guarded by mu
	busy    map[int]int // guarded by mu: pieces with writes in flight (their number) or being marked (-1)
	idle    *sync.Cond  // on mu: busy changed
	cleared int         // guarded by mu: how often pieces were forgotten
	changed chan struct{}

	recorded  chan struct{} // guarded by mu: closed when the record of completion ended, nil before Finish
	recordErr error         // guarded by mu

	dirty    []int64       // guarded by mu: windows to write back, by offset
	draining chan struct{} // guarded by mu: closed when the goroutine that does so ended, nil without one
}

func (st *state) isHeld(i int) bool { return st.held[i/64].Load()&(1<<(i%64)) != 0 }

func (st *state) at() phase { return phase(st.phase.Load()) }

func (st *state) pieceOf(off int64) int {
	return int(off >> bits.TrailingZeros64(uint64(st.pieceSize)))
}

func (st *state) setHeldLocked(i int) {
	_, n := pieceRange(st.size, i)
	st.held[i/64].Or(1 << (i % 64))
	st.have.Add(n)
	f := int(st.frontier.Load())
	for f < len(st.sources) && st.isHeld(f) {
		f++
	}
	st.frontier.Store(int64(f))
}

func (st *state) clearHeldLocked(i int) {
	_, n := pieceRange(st.size, i)
	st.held[i/64].And(^uint64(1 << (i % 64)))
	st.have.Add(-n)
	if int64(i) < st.frontier.Load() {
		st.frontier.Store(int64(i))
	}
}

func (st *state) notifyLocked() {
	if st.changed != nil {
		close(st.changed)
		st.changed = nil
	}
}

// write puts p at off. Each piece it touches is busy meanwhile, so that none of them can become held under it: what is being marked is
// waited for, and a mark waits for writes in flight.
func (st *state) write(p []byte, off int64) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	first, last := st.pieceOf(off), st.pieceOf(off+int64(len(p))-1)
	st.mu.Lock()
	for i := first; i <= last; {
		switch {
		case st.isHeld(i):
			st.mu.Unlock()
			return 0, fmt.Errorf("blob %s, piece %d: %w", st.digest, i, ErrHeld)
		case st.busy[i] < 0:
			st.idle.Wait()
			i = first // any of them may have become held
		default:
			i++
		}
	}
	for i := first; i <= last; i++ {
		st.busy[i]++
	}
	st.mu.Unlock()

	n, err := st.put(p, off)

	st.mu.Lock()
	for i := first; i <= last; i++ {
		if st.busy[i]--; st.busy[i] == 0 {
			delete(st.busy, i)
		}
	}
	st.idle.Broadcast()
	st.mu.Unlock()
	if err != nil {
		return n, fmt.Errorf("write blob %s at %d: %w", st.digest, off, noSpace(err))
	}
	return n, nil
}

// writeSize is the most that one system call writes. ext4 on kernels with large folios tries to find memory in one stretch for each
// write, and where memory is in pieces it moves pages about for that: 4 GiB in writes of 1 MiB took 14.5 s of system time, of 512 KiB
// 5.3 s, of 256 KiB 2.1 s, of 128 KiB 1.8 s, of 32 KiB 2.1 s (Linux 6.18, 24 GiB of memory, most of it page cache).
const writeSize = 128 * kib

// put writes p at off in parts.
func (st *state) put(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		n, err := st.data.WriteAt(p[done:min(done+writeSize, len(p))], off+int64(done))
		done += n
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// mark makes piece i held; crc nil: read it back. The record is written after the data, by plain writes: a killed process has both in
// the kernel in that order, and a machine crash is what the CRC is for.
func (st *state) mark(i int, src Source, crc *uint32) error {
	if i < 0 || i >= len(st.sources) || src < Cache || src > Peer {
		return fmt.Errorf("mark piece %d of blob %s (%d pieces) from %s: no such piece or source", i, st.digest, len(st.sources), src)
	}
	if st.isHeld(i) {
		return nil
	}
	st.mu.Lock()
	for !st.isHeld(i) && st.busy[i] != 0 {
		st.idle.Wait()
	}
	if st.isHeld(i) {
		st.mu.Unlock()
		return nil
	}
	st.busy[i] = -1
	st.mu.Unlock()

	err := st.record(i, src, crc)

	st.mu.Lock()
	defer st.mu.Unlock()
	delete(st.busy, i)
	st.idle.Broadcast()
	if err != nil {
		return fmt.Errorf("mark piece %d of blob %s: %w", i, st.digest, noSpace(err))
	}
	st.sources[i] = src
	st.setHeldLocked(i)
	st.writebackLocked(i)
	st.notifyLocked()
	return nil
}

func (st *state) record(i int, src Source, crc *uint32) error {
	if crc == nil {
		read, err := st.checksum(context.Background(), i)
		if err != nil {
			return err
		}
		crc = &read
	}
	b := encodeRecord(i, *crc, src)
	_, err := st.pieces.WriteAt(b[:], recordOffset(i))
	return err
}

func (st *state) eraseRecord(i int) error {
	_, err := st.pieces.WriteAt(make([]byte, recordSize), recordOffset(i))
	return err
}

func (st *state) clear(forget func(i int, src Source) bool) int {
	// forget is the caller's: it runs without the lock and may ask for anything.
	var drop []int
	for i := range st.sources {
		if st.isHeld(i) && forget(i, st.source(i)) {
			drop = append(drop, i)
		}
	}
	if len(drop) == 0 {
		return 0
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.at() != filling {
		return 0
	}
	n := 0
	for _, i := range drop {
		if !st.isHeld(i) {
			continue
		}
		st.clearHeldLocked(i)
		st.sources[i] = 0
		n++
		if err := st.eraseRecord(i); err != nil {
			// After a restart the piece would count again; the final digest would find it again.
			st.store.log.Warn("store: record of a forgotten piece stays", "digest", st.digest, "piece", i, "error", err)
		}
	}
	st.cleared++
	st.notifyLocked()
	return n
}

func (st *state) source(i int) Source {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.sources[i]
}

// bufferSize is for reading pieces back: one piece of the smallest size, so that memory stays bounded at any blob size.
const bufferSize = 256 * kib

var buffers = sync.Pool{New: func() any { b := make([]byte, bufferSize); return &b }}

// read calls each with the n bytes at off, in order and in parts.
func (st *state) read(ctx context.Context, off, n int64, each func([]byte)) error {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for n > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p := (*buf)[:min(n, bufferSize)]
		if k, err := st.data.ReadAt(p, off); k < len(p) {
			return short(err)
		}
		each(p)
		off += int64(len(p))
		n -= int64(len(p))
	}
	return nil
}

// short: the data file has its full size from the start, so a read that ends early means that somebody cut it.
func short(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// close ends the state: nobody has a handle any more.
func (st *state) close() error {
	st.mu.Lock()
	st.dirty = nil
	draining := st.draining
	st.mu.Unlock()
	if draining != nil {
		<-draining
	}
	err := st.wait()
	st.discardEmpty()
	st.closeFiles()
	return err
}

// discardEmpty takes a blob away of which nothing came: a pull that failed leaves nothing behind.
func (st *state) discardEmpty() {
	if !st.loaded || st.at() != filling || st.have.Load() > 0 {
		return
	}
	unlock, err := st.store.lockStore()
	if err != nil {
		return
	}
	ok, err := tryFlock(st.used, unix.LOCK_EX) // a waiting process has it too: it shall fill the blob
	var old string
	if err == nil && ok && samePath(st.used, st.used.Name()) {
		old, err = st.store.trash(st.dir)
	}
	unlock()
	if err != nil {
		st.store.log.Warn("store: empty blob stays", "digest", st.digest, "error", err)
	} else if old != "" {
		st.store.delete(old)
	}
}

// closeFiles gives everything back; the lock that keeps the blob from being removed last.
func (st *state) closeFiles() {
	st.mu.Lock()
	st.closeWriter()
	st.mu.Unlock()
	if st.data != nil {
		st.data.Close()
	}
	if st.used != nil {
		st.used.Close()
	}
}

// closeWriter lets others fill the blob, or find that it is complete.
func (st *state) closeWriter() {
	if st.pieces != nil {
		st.pieces.Close()
		st.pieces = nil
	}
	if st.writer != nil {
		st.writer.Close()
		st.writer = nil
	}
}
