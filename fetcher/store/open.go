package store

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// entry is a blob that this process has open, is opening or is closing.
type entry struct {
	size  int64
	ready chan struct{} // closed when opening ended, well or not
	gone  chan struct{} // closed when the entry left Store.open

	st       *state       // guarded by Store.mu; nil while opening
	refs     int          // guarded by Store.mu
	closing  bool         // guarded by Store.mu
	reserved atomic.Int64 // bytes granted by the quota and not on disk yet; counts while st is nil
	needed   bool         // the quota does not refuse it
}

// Blob opens the blob d of size bytes and creates it when the store does not have it. It first makes room for what is missing of it, so
// it may evict others; [ErrQuota] when that is not enough. While another process fills the blob it waits for that to end or to give
// up, bounded by ctx, and then finds what that process got. A blob that is stored with another size is [ErrSize] and stays as it is.
//
// After a machine crash the pieces of an incomplete blob are read and checked here.
func (s *Store) Blob(ctx context.Context, d digest.Digest, size int64) (*Blob, error) {
	return s.blob(ctx, d, size, false)
}

// Need is Blob for what a container cannot go on without: what the quota has no room for, after all is evicted that can be, goes
// beyond it.
func (s *Store) Need(ctx context.Context, d digest.Digest, size int64) (*Blob, error) {
	return s.blob(ctx, d, size, true)
}

func (s *Store) blob(ctx context.Context, d digest.Digest, size int64, needed bool) (*Blob, error) {
	if err := checkDigest(d); err != nil {
		return nil, err
	}
	if err := checkSize(d, size); err != nil {
		return nil, err
	}
	for {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			return nil, ErrClosed
		}
		e := s.open[d]
		if e == nil {
			e = &entry{size: size, ready: make(chan struct{}), gone: make(chan struct{}), needed: needed}
			s.open[d] = e
			s.mu.Unlock()
			return s.openEntry(ctx, d, e)
		}
		var wait chan struct{}
		switch {
		case e.closing:
			wait = e.gone
		case e.st == nil:
			wait = e.ready
		case e.size != size:
			s.mu.Unlock()
			return nil, sizeError(d, e.size, size)
		default:
			e.refs++
			s.mu.Unlock()
			e.st.touch()
			return &Blob{state: e.st, entry: e}, nil
		}
		s.mu.Unlock()
		select {
		case <-wait:
			// Opened, failed or gone: look again. When it failed this caller tries itself, the other's context is not its own.
		case <-ctx.Done():
			return nil, fmt.Errorf("open blob %s: %w", d, context.Cause(ctx))
		}
	}
}

func sizeError(d digest.Digest, have, want int64) error {
	return fmt.Errorf("blob %s: %w: stored with %d bytes, asked for with %d; one of the two descriptors is wrong", d, ErrSize, have, want)
}

func (s *Store) openEntry(ctx context.Context, d digest.Digest, e *entry) (*Blob, error) {
	st, err := s.openState(ctx, d, e)
	if err != nil {
		s.drop(d, e)
		close(e.ready)
		return nil, fmt.Errorf("open blob %s: %w", d, noSpace(err))
	}
	s.mu.Lock()
	e.st, e.refs = st, 1
	s.mu.Unlock()
	close(e.ready)
	return &Blob{state: st, entry: e}, nil
}

// drop ends an entry, and with the last one of a closed store its lock file.
func (s *Store) drop(d digest.Digest, e *entry) {
	s.mu.Lock()
	delete(s.open, d)
	last := s.closed && len(s.open) == 0
	s.mu.Unlock()
	if last {
		s.closeLock()
	}
	close(e.gone)
}

func (s *Store) openState(ctx context.Context, d digest.Digest, e *entry) (_ *state, err error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	n := pieceCount(e.size)
	st := &state{
		store:     s,
		digest:    d,
		size:      e.size,
		pieceSize: PieceSize(e.size),
		dir:       s.blobDir(d),
		held:      make([]atomic.Uint64, (n+63)/64),
		sources:   make([]Source, n),
		busy:      make(map[int]int),
	}
	st.idle = sync.NewCond(&st.mu)
	if st.used, err = lockUse(ctx, st.dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			st.discardEmpty()
			st.closeFiles()
		}
	}()
	st.touch()
	if ok, err := st.loadComplete(); err != nil || ok {
		return st, err
	}
	if st.writer, err = s.lockWriter(ctx, d, st.dir); err != nil {
		return nil, err
	}
	// Whoever held it may have completed the blob.
	if ok, err := st.loadComplete(); err != nil || ok {
		return st, err
	}
	if err := st.load(ctx); err != nil {
		return nil, err
	}
	st.loaded = true
	if err := s.makeRoom(ctx, st.size-st.have.Load(), e); err != nil {
		return nil, err
	}
	return st, nil
}

// loadComplete opens the blob if it is recorded as complete; nothing needs to be locked for that, such a record does not change.
func (st *state) loadComplete() (bool, error) {
	f, err := os.Open(filepath.Join(st.dir, filePieces))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return false, err
	}
	h, err := readPieces(f, fi.Size(), nil)
	if errors.Is(err, errPieces) || err == nil && !h.complete {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	data, err := os.Open(filepath.Join(st.dir, fileData))
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		return false, err
	}
	if fi, err := data.Stat(); err != nil || fi.Size() != h.size {
		data.Close()
		return false, err
	}
	if h.size != st.size {
		data.Close()
		return false, sizeError(st.digest, h.size, st.size)
	}
	for i := range st.sources {
		st.sources[i] = Cache // a record that cannot be read does not make checked bytes wrong
	}
	if _, err := readPieces(f, fi.Size(), func(i int, src Source, _ uint32) { st.sources[i] = src }); err != nil {
		data.Close()
		return false, err
	}
	for i := range st.sources {
		st.setHeldLocked(i)
	}
	st.data = data
	st.closeWriter()
	st.phase.Store(uint32(durable))
	return true, nil
}

// load opens a blob that is to be filled; the writer lock is held.
func (st *state) load(ctx context.Context) error {
	var err error
	if st.pieces, err = os.OpenFile(filepath.Join(st.dir, filePieces), os.O_RDWR|os.O_CREATE, modeFile); err != nil {
		return err
	}
	fi, err := st.pieces.Stat()
	if err != nil {
		return err
	}
	var claims []claim
	h, err := readPieces(st.pieces, fi.Size(), func(i int, src Source, crc uint32) {
		claims = append(claims, claim{i, crc, src})
	})
	if err != nil && !errors.Is(err, errPieces) {
		return err
	}
	st.data, err = st.openData(h, err)
	switch {
	case err != nil && !errors.Is(err, errPieces) && !errors.Is(err, fs.ErrNotExist):
		return err
	case err != nil:
		if fi.Size() > 0 {
			st.store.log.Warn("store: what was there of the blob cannot be used, starting over", "digest", st.digest, "error", err)
		}
		return st.reset(fi.Size() > 0)
	case h.size != st.size && len(claims) > 0:
		return sizeError(st.digest, h.size, st.size)
	case h.size != st.size: // nothing is lost, and a wrong descriptor does not block the right one
		return st.reset(true)
	}
	if st.store.bootID == "" || h.bootID != st.store.bootID {
		if claims, err = st.recheck(ctx, claims); err != nil {
			return err
		}
	}
	for _, c := range claims {
		st.sources[c.piece] = c.src
		st.setHeldLocked(c.piece)
	}
	return nil
}

// openData opens the data that a usable pieces file (err is nil) speaks of. A blob whose data has another size than the record says is
// not the one that was recorded.
func (st *state) openData(h header, err error) (*os.File, error) {
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(st.dir, fileData), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && fi.Size() != h.size {
		err = fmt.Errorf("%w: data of %d bytes instead of %d", errPieces, fi.Size(), h.size)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// reset makes the blob empty. At no point do the files claim what is not there: the old claims go first (durably, if there were any),
// and the header comes last. The data becomes a new file, never the old one with holes: somebody may still be reading that.
func (st *state) reset(claimed bool) error {
	if err := st.pieces.Truncate(0); err != nil {
		return err
	}
	if claimed {
		if err := st.pieces.Sync(); err != nil {
			return err
		}
	}
	if st.data != nil {
		st.data.Close()
		st.data = nil
	}
	path := filepath.Join(st.dir, fileData)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, modeFile)
	if err != nil {
		return err
	}
	st.data = f
	if err := f.Truncate(st.size); err != nil {
		return err
	}
	if err := st.pieces.Truncate(piecesLen(st.size)); err != nil {
		return err
	}
	return st.writeHeader(false)
}

func (st *state) writeHeader(complete bool) error {
	_, err := st.pieces.WriteAt(header{size: st.size, bootID: st.store.bootID, complete: complete}.encode(), 0)
	return err
}

// claim is a piece that the pieces file says is held.
type claim struct {
	piece int
	crc   uint32
	src   Source
}

// maxRecheck bounds the reads at once when pieces are checked again: enough to keep a disk busy, few enough to leave it usable.
const maxRecheck = 4

// recheck returns the claims that the data bears out and erases the others. The machine was down since they were made, and the records
// may have reached the disk when the data did not. Only when all is right does the header get this boot's id.
func (st *state) recheck(ctx context.Context, claims []claim) ([]claim, error) {
	good := make([]bool, len(claims))
	var g errgroup.Group
	g.SetLimit(min(maxRecheck, runtime.GOMAXPROCS(0)))
	for k, c := range claims {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error {
			crc, err := st.checksum(ctx, c.piece)
			good[k] = err == nil && crc == c.crc // what cannot be read is not held
			return nil
		})
	}
	_ = g.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	kept := claims[:0]
	for k, c := range claims {
		if good[k] {
			kept = append(kept, c)
			continue
		}
		if err := st.eraseRecord(c.piece); err != nil {
			return nil, err
		}
	}
	if lost := len(claims) - len(kept); lost > 0 {
		st.store.log.Info("store: pieces that did not survive the machine's last stop are fetched again", "digest", st.digest, "pieces", lost)
	}
	return kept, st.writeHeader(false)
}

// checksum reads piece i and returns its CRC-32C.
func (st *state) checksum(ctx context.Context, i int) (uint32, error) {
	off, n := pieceRange(st.size, i)
	var crc uint32
	err := st.read(ctx, off, n, func(p []byte) { crc = crc32.Update(crc, castagnoli, p) })
	return crc, err
}

// touchEvery is how exact the time of last use is: a blob that is opened a thousand times a second writes its inode once a minute.
const touchEvery = time.Minute

// touch records that the blob was used. Eviction works without it, only worse, so errors do not matter.
func (st *state) touch() {
	now := time.Now()
	last := st.touched.Load()
	ago := now.UnixNano() - last // below 0 after the clock was set back
	if ago >= 0 && ago < int64(touchEvery) || !st.touched.CompareAndSwap(last, now.UnixNano()) {
		return
	}
	if err := os.Chtimes(filepath.Join(st.dir, fileUsed), now, now); err != nil {
		st.store.log.Debug("store: time of use not recorded", "digest", st.digest, "error", err)
	}
}
