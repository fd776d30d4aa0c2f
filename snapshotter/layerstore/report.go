package layerstore

import (
	"cmp"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
)

// Report is what a store has of one layer.
type Report struct {
	Blob     digest.Digest
	Size     int64 // of the data file
	Present  int64 // of that, bytes that are there
	OnDisk   int64 // what its files take, as the store accounts for it
	Complete bool
	Open     bool   // somebody has it open
	Why      string // it is not complete: one sentence; "" when it is, or when nobody has it open
}

// Report tells of all layers, sorted by their blobs. Who asks does not count as one who uses them.
func (s *Store) Report() []Report {
	s.mu.Lock()
	open := map[*layer]bool{}
	for l := range s.leases {
		open[l] = true
	}
	all := make([]*layer, 0, len(s.layers))
	for _, l := range s.layers {
		all = append(all, l)
	}
	s.mu.Unlock()
	out := make([]Report, len(all))
	for i, l := range all {
		out[i] = l.report(open[l])
	}
	slices.SortFunc(out, func(a, b Report) int { return cmp.Compare(a.Blob, b.Blob) })
	return out
}

func (l *layer) report(open bool) Report {
	r := Report{
		Blob: l.info.Blob, Size: l.info.DataSize, OnDisk: l.charged.Load(), Complete: l.complete.Load(), Open: open,
	}
	switch {
	case r.Complete:
		r.Present = r.Size
	case !open || !l.opening.TryLock(): // it is being opened or closed
		r.Present = l.presentOnDisk()
	default:
		defer l.opening.Unlock()
		if !l.openedNow() {
			r.Present = l.presentOnDisk()
			break
		}
		st := (&Layer{l: l}).Stats()
		r.Present, r.Complete, r.Why = st.PresentBytes, st.Complete, st.Why
	}
	return r
}

func (l *layer) openedNow() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.opened
}

// presentOnDisk is how many bytes the file says are there; 0 when it cannot be read, as that of a layer that is being removed.
func (l *layer) presentOnDisk() (n int64) {
	l.mu.Lock()
	path := filepath.Join(l.dir, filePresent)
	l.mu.Unlock()
	f, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer f.Close()
	p, _, err := readPresent(f, l.chunks.len(), l.s.boot)
	if err != nil {
		return 0
	}
	for c := range p.n {
		if p.has.has(c) {
			n += l.chunks.size(c)
		}
	}
	return n
}
