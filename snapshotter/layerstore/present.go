package layerstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"sync/atomic"
)

// The file "present": a header of presentHeader bytes (magic, the number of chunks as
// 8 bytes, the boot in which the second bitmap was written), then two bitmaps in
// little-endian words of 64 bits: the chunks that were synced, and those written.
const (
	presentMagic  = "quaychk1"
	presentHeader = 64
	bootLen       = 36
)

// present is which chunks of a layer are there, in memory and on disk. What is in has
// was written to the data file. has is read without locks.
type present struct {
	n     int
	has   bitset
	count atomic.Int64 // of the bits in has

	synced []uint64 // used by open and sync alone

	mu sync.Mutex // held by who changes has, count or the file
	f  *os.File   // nil after close
}

func presentSize(n int) int64 { return presentHeader + 2*8*int64((n+63)/64) }

// writePresent writes the file of a layer of n chunks, with all chunks written (none
// of them synced) or none.
func writePresent(w io.Writer, n int, boot string, all bool) error {
	b := make([]byte, presentSize(n))
	copy(b, presentMagic)
	binary.LittleEndian.PutUint64(b[8:], uint64(n))
	copy(b[16:16+bootLen], boot)
	if all {
		second := b[presentHeader+(len(b)-presentHeader)/2:]
		for c := range n {
			second[c/8] |= 1 << (c % 8)
		}
	}
	_, err := w.Write(b)
	return err
}

// openPresent reads the file of a layer of n chunks and takes it over for this boot.
func openPresent(path string, n int, boot string) (p *present, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	p, same, err := readPresent(f, n, boot)
	if err != nil {
		return nil, err
	}
	if !same {
		// First the bitmap, then the boot that makes it count: a process killed
		// between the two leaves what is true of both boots.
		for i := range p.synced {
			if err := p.writeWord(i); err != nil {
				return nil, err
			}
		}
		if _, err := f.WriteAt([]byte(pad(boot)), 16); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// readPresent reads the file of a layer of n chunks. same is false when it was last written in another boot: then only
// what was synced is there.
func readPresent(f *os.File, n int, boot string) (p *present, same bool, err error) {
	b := make([]byte, presentSize(n))
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, false, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if string(b[:8]) != presentMagic || binary.LittleEndian.Uint64(b[8:]) != uint64(n) {
		return nil, false, fmt.Errorf("%s is not of this layer", f.Name())
	}
	p = &present{n: n, has: newBitset(n), f: f, synced: make([]uint64, (n+63)/64)}
	words := len(p.synced)
	same = string(b[16:16+bootLen]) == pad(boot)
	for i := range words {
		p.synced[i] = binary.LittleEndian.Uint64(b[presentHeader+8*i:]) & p.mask(i)
		w := p.synced[i]
		if same {
			w |= binary.LittleEndian.Uint64(b[presentHeader+8*(words+i):]) & p.mask(i)
		}
		p.has.words[i].Store(w)
	}
	p.count.Store(int64(p.has.count()))
	return p, same, nil
}

func pad(boot string) string {
	var b [bootLen]byte
	copy(b[:], boot)
	return string(b[:])
}

// mask has the bits of word i that stand for a chunk.
func (p *present) mask(i int) uint64 {
	if left := p.n - 64*i; left < 64 {
		return 1<<left - 1
	}
	return ^uint64(0)
}

func (p *present) full() bool { return p.count.Load() == int64(p.n) }

// add records that chunk c was written. It reports false when it was there before.
func (p *present) add(c int) (bool, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.has.set(c) {
		return false, nil
	}
	p.count.Add(1)
	return true, p.writeWord(c >> 6)
}

// writeWord writes one word of the second bitmap. Called with mu held, or before p is
// shared.
func (p *present) writeWord(i int) error {
	if p.f == nil {
		return os.ErrClosed
	}
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], p.has.words[i].Load())
	_, err := p.f.WriteAt(b[:], presentHeader+8*int64(len(p.synced)+i))
	return err
}

// sync makes what is present now last, by way of syncData, which has to write all that
// was written to the data file before it was called to the disk. When it fails the
// kernel may have dropped what it could not write, so everything not synced before
// counts as missing again. Calls must not overlap; add may run meanwhile.
func (p *present) sync(syncData func() error) error {
	now := make([]uint64, len(p.synced))
	for i := range now {
		now[i] = p.has.words[i].Load()
	}
	if slices.Equal(now, p.synced) {
		return nil
	}
	err := syncData()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		for i := range p.synced {
			p.has.words[i].Store(p.synced[i])
			err = errors.Join(err, p.writeWord(i))
		}
		p.count.Store(int64(p.has.count()))
		return err
	}
	b := make([]byte, 8*len(now))
	for i, w := range now {
		binary.LittleEndian.PutUint64(b[8*i:], w)
	}
	if p.f == nil {
		return os.ErrClosed
	}
	if _, err := p.f.WriteAt(b, presentHeader); err != nil {
		return err
	}
	p.synced = now
	return nil
}

func (p *present) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.f == nil {
		return nil
	}
	err := p.f.Close()
	p.f = nil
	return err
}
