package open

import (
	"bytes"
	"crypto/sha1"
	"errors"
	"fmt"
	"math/rand/v2"
)

const (
	// probes is how many held pieces are checked before a torrent is served: a metainfo of something else fails at the first. More would
	// make adding a thousand layers slow.
	probes = 3
	// readSize is how much of a piece is read at a time, in bytes, to be hashed or compared.
	readSize = 256 << 10
)

// passed takes in metainfo piece j, whose buffer matched its SHA-1.
func (t *Torrent) passed(j int) {
	t.mu.Lock()
	buf := t.pieces.bufs[j]
	if t.ended != nil || t.pieces.state[j] != filling || !buf.full() {
		t.mu.Unlock()
		return
	}
	t.pieces.state[j] = checked
	stored := t.pieces.storeOf(j)
	var overlaps []int // store pieces that are held already
	for i := stored.first; i <= stored.last; i++ {
		if t.pieces.stored[i] {
			overlaps = append(overlaps, i)
		}
	}
	t.mu.Unlock()
	for _, i := range overlaps {
		if err := t.compare(i, j, buf); err != nil {
			t.end(err)
			return
		}
	}
	for i := stored.first; i <= stored.last; i++ {
		t.deliver(i)
	}
	t.wake()
}

// compare checks what the storage holds of store piece i against metainfo piece j. The storage failing says nothing.
func (t *Torrent) compare(i, j int, buf *buffer) error {
	start, _ := t.pieces.metaRange(j)
	off, n := t.pieces.overlap(i, j)
	want := buf.part(off-start, n)
	for p := make([]byte, min(n, readSize)); n > 0; {
		p = p[:min(n, int64(len(p)))]
		if _, err := t.st.ReadAt(p, off); err != nil {
			return nil
		}
		if !bytes.Equal(p, want[:len(p)]) {
			return fmt.Errorf("bytes %d to %d are in the store, and piece %d of the torrent has others", off, off+int64(len(p))-1, j)
		}
		off, n, want = off+int64(len(p)), n-int64(len(p)), want[len(p):]
	}
	return nil
}

// deliver writes store piece i and marks it, if it is wanted and everything that it lies in is checked.
func (t *Torrent) deliver(i int) {
	t.mu.Lock()
	if t.ended != nil || !t.failed.IsZero() || t.delivering[i] || !t.pieces.deliverable(i) {
		t.mu.Unlock()
		return
	}
	t.delivering[i] = true
	m := t.pieces.metaOf(i)
	bufs := make([]*buffer, 0, m.last-m.first+1)
	for j := m.first; j <= m.last; j++ {
		bufs = append(bufs, t.pieces.bufs[j])
	}
	t.mu.Unlock()

	err := t.write(i, m, bufs)
	if err == nil {
		err = t.st.MarkPiece(i, t.Supplier())
	}
	if err != nil && t.st.Has(i) { // it came by other means since; that is no trouble
		err = nil
	}
	off := errors.Is(err, ErrPutOff)
	t.mu.Lock()
	delete(t.delivering, i)
	switch {
	case err == nil:
		t.setHave(i)
	case off: // to wish again is the caller's affair; tried again at once, it would be put off again
		t.pieces.unwant(i)
		t.countBusy()
	}
	t.mu.Unlock()
	switch {
	case err == nil, off:
		t.wake()
	case errors.Is(err, ErrBadPiece):
		t.end(err)
	default:
		t.fail(err)
	}
}

// write puts the parts of store piece i, which lie in metainfo pieces m, into the storage.
func (t *Torrent) write(i int, m span, bufs []*buffer) error {
	for k, buf := range bufs {
		j := m.first + k
		start, _ := t.pieces.metaRange(j)
		off, n := t.pieces.overlap(i, j)
		if _, err := t.st.WriteAt(buf.part(off-start, n), off); err != nil {
			return err
		}
	}
	return nil
}

// prove checks metainfo piece j, which is held, against its SHA-1 unless that was done before.
func (t *Torrent) prove(j int) error {
	if done, err := t.proved(j); done {
		return err
	}
	t.proving.Lock()
	defer t.proving.Unlock()
	if done, err := t.proved(j); done {
		return err
	}
	off, n := t.pieces.metaRange(j)
	h := sha1.New()
	p := make([]byte, min(n, readSize))
	for end := off + n; off < end; off += int64(len(p)) {
		p = p[:min(end-off, int64(len(p)))]
		if _, err := t.st.ReadAt(p, off); err != nil {
			return err
		}
		h.Write(p)
	}
	t.mu.Lock()
	want, still := t.pieces.hash(j), t.pieces.state[j] == held
	if still && bytes.Equal(h.Sum(nil), want[:]) {
		t.pieces.trusted[j] = true
		t.mu.Unlock()
		return nil
	}
	t.mu.Unlock()
	if !still { // lost while it was read
		return errNotThere
	}
	return t.end(fmt.Errorf("piece %d has the SHA-1 %x in the store and %s in the torrent", j, h.Sum(nil), want))
}

func (t *Torrent) proved(j int) (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.ended != nil:
		return true, t.ended
	case t.pieces.trusted[j]:
		return true, nil
	}
	return false, nil
}

// probe checks a few held pieces, at random, before the torrent begins. Only a mismatch is an error.
func (t *Torrent) probe() error {
	n := len(t.pieces.state)
	from := rand.IntN(n)
	for k, left := 0, probes; k < n && left > 0; k++ {
		j := (from + k*(n/probes+1)) % n // spread out
		if t.pieces.state[j] != held {
			continue
		}
		left--
		if err := t.prove(j); errors.Is(err, ErrMismatch) {
			return err
		}
	}
	return nil
}
