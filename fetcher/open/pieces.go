package open

import (
	"crypto/sha1"
	"slices"

	"github.com/anacrolix/torrent/metainfo"
)

// chunkSize is what one request asks for, in bytes: what every client sends and accepts (BEP 3: "all current implementations").
const chunkSize = 16 << 10

// A metainfo piece is in one of these states. It moves
//
//	absent → filling     a chunk arrives
//	filling → absent     the hash is wrong, or the memory is needed
//	filling → checked    the hash is right
//	checked → absent     the memory is needed
//	any → held           all store pieces that it lies in are held
//	held → absent        one of them is lost
type pieceState uint8

const (
	absent  pieceState = iota
	filling            // its buffer is not full, or full and not checked
	checked            // its buffer is full and matches the SHA-1
	held               // the store has it
)

// pieces is what a torrent knows of its pieces, both kinds. It is not safe for concurrent use.
type pieces struct {
	layout
	hashes []byte // SHA-1 of each metainfo piece, 20 bytes each

	stored  []bool // store pieces held
	missing int    // count of those that are not
	state   []pieceState
	trusted []bool // metainfo pieces whose held bytes are known to match their SHA-1
	bufs    map[int]*buffer
	used    int64 // bytes in bufs
	wanted  []int // store pieces, in the order of the wishes; none is held
}

func newPieces(l layout, hashes []byte) *pieces {
	return &pieces{
		layout: l, hashes: hashes,
		stored: make([]bool, l.storePieces()), missing: l.storePieces(),
		state: make([]pieceState, l.metaPieces()), trusted: make([]bool, l.metaPieces()),
		bufs: make(map[int]*buffer),
	}
}

func (p *pieces) hash(j int) (h metainfo.Hash) {
	copy(h[:], p.hashes[j*sha1.Size:])
	return h
}

// complete tells whether metainfo piece j is there to be served.
func (p *pieces) complete(j int) bool { return p.state[j] == checked || p.state[j] == held }

// want notes a wish; whether that is news.
func (p *pieces) want(i int) bool {
	if i < 0 || i >= len(p.stored) || p.stored[i] || slices.Contains(p.wanted, i) {
		return false
	}
	p.wanted = append(p.wanted, i)
	return true
}

// unwant takes a wish back; whether that is news.
func (p *pieces) unwant(i int) bool {
	k := slices.Index(p.wanted, i)
	if k < 0 {
		return false
	}
	p.wanted = slices.Delete(p.wanted, k, k+1)
	return true
}

// have notes that store piece i is held, and returns the metainfo pieces whose state changed by it.
func (p *pieces) have(i int) (changed []int) {
	if i < 0 || i >= len(p.stored) || p.stored[i] {
		return nil
	}
	p.stored[i] = true
	p.missing--
	p.unwant(i)
	m := p.metaOf(i)
	for j := m.first; j <= m.last; j++ {
		if !p.allStored(j) {
			continue
		}
		if p.state[j] == checked {
			p.trusted[j] = true
		}
		p.state[j] = held
		p.free(j)
		changed = append(changed, j)
	}
	return changed
}

// lost notes that store piece i is not held any more, and returns the metainfo pieces that went with it.
func (p *pieces) lost(i int) (changed []int) {
	if i < 0 || i >= len(p.stored) || !p.stored[i] {
		return nil
	}
	p.stored[i] = false
	p.missing++
	m := p.metaOf(i)
	for j := m.first; j <= m.last; j++ {
		p.trusted[j] = false
		if p.state[j] == held {
			p.state[j] = absent
			changed = append(changed, j)
		}
	}
	return changed
}

// allStored tells whether every store piece that metainfo piece j lies in is held.
func (p *pieces) allStored(j int) bool {
	s := p.storeOf(j)
	return !slices.Contains(p.stored[s.first:s.last+1], false)
}

// fill is the buffer for a chunk of metainfo piece j; nil when none is needed.
func (p *pieces) fill(j int) *buffer {
	switch p.state[j] {
	case filling:
	case absent:
		_, n := p.metaRange(j)
		p.bufs[j] = newBuffer(n)
		p.used += n
		p.state[j] = filling
	default:
		return nil
	}
	return p.bufs[j]
}

// reset throws the buffer of metainfo piece j away.
func (p *pieces) reset(j int) {
	p.free(j)
	if p.state[j] != held {
		p.state[j] = absent
	}
}

func (p *pieces) free(j int) {
	if b := p.bufs[j]; b != nil {
		p.used -= int64(len(b.data))
		delete(p.bufs, j)
	}
}

// deliverable tells whether store piece i can be written: it is wanted, and all that it lies in is checked.
func (p *pieces) deliverable(i int) bool {
	if p.stored[i] || !slices.Contains(p.wanted, i) {
		return false
	}
	m := p.metaOf(i)
	for j := m.first; j <= m.last; j++ {
		if p.state[j] != checked {
			return false
		}
	}
	return true
}

// plan is which metainfo pieces are to be downloaded now: those of the wishes, oldest first, as far as their buffers fit the budget (in
// bytes), and those of the first wish in any case. Buffers that no wish needs make room; dropped are those that were complete.
func (p *pieces) plan(budget int64) (now map[int]bool, dropped []int) {
	now = make(map[int]bool)
	needed := make(map[int]bool) // by wishes that were admitted
	total := int64(0)            // bytes of needed
	for k, i := range p.wanted {
		m := p.metaOf(i)
		more := int64(0)
		for j := m.first; j <= m.last; j++ {
			if !needed[j] && p.state[j] != held {
				_, n := p.metaRange(j)
				more += n
			}
		}
		if k > 0 && total+more > budget {
			break
		}
		total += more
		for j := m.first; j <= m.last; j++ {
			if p.state[j] == held {
				continue
			}
			needed[j] = true
			if p.state[j] != checked {
				now[j] = true
			}
		}
	}
	// What is needed and not there yet will be; the rest of the budget may keep what came along.
	spare := budget - total
	for j, b := range p.bufs {
		if needed[j] {
			continue
		}
		if spare -= int64(len(b.data)); spare >= 0 {
			continue
		}
		if p.complete(j) {
			dropped = append(dropped, j)
		}
		p.reset(j)
	}
	return now, dropped
}
