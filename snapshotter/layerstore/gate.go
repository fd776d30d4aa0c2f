package layerstore

import (
	"context"
	"slices"
	"sync"
)

// gate bounds how many decoders work at once, in the store and for one layer, and lets
// those in first for whom somebody waits. Its lock is taken inside that of a layer.
type gate struct {
	perLayer, spare int // spare places are for demand alone

	mu      sync.Mutex // guards following
	free    int
	waiting []*ticket
	active  map[*layer]int
}

// ticket is one decoder's place in the queue.
type ticket struct {
	l     *layer
	prio  Priority
	ready chan struct{} // closed when it was let in
}

func newGate(places, perLayer int) *gate {
	return &gate{perLayer: perLayer, spare: places / 4, free: places, active: map[*layer]int{}}
}

func (g *gate) enter(ctx context.Context, t *ticket) error {
	g.mu.Lock()
	t.ready = make(chan struct{})
	g.waiting = append(g.waiting, t)
	g.admitLocked()
	g.mu.Unlock()
	select {
	case <-t.ready:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if i := slices.Index(g.waiting, t); i >= 0 {
		g.waiting = slices.Delete(g.waiting, i, i+1)
	} else {
		g.leaveLocked(t.l)
	}
	return ctx.Err()
}

func (g *gate) leave(l *layer) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.leaveLocked(l)
}

func (g *gate) leaveLocked(l *layer) {
	g.free++
	if g.active[l]--; g.active[l] == 0 {
		delete(g.active, l)
	}
	g.admitLocked()
}

// raise lets a ticket that may still wait go before those of less priority.
func (g *gate) raise(t *ticket, prio Priority) {
	g.mu.Lock()
	defer g.mu.Unlock()
	t.prio = max(t.prio, prio)
	g.admitLocked()
}

func (g *gate) admitLocked() {
	for g.free > 0 {
		best := -1
		for i, t := range g.waiting {
			switch {
			case g.active[t.l] >= g.perLayer, t.prio != Demand && g.free <= g.spare:
			case best < 0 || t.prio > g.waiting[best].prio:
				best = i
			}
		}
		if best < 0 {
			return
		}
		t := g.waiting[best]
		g.waiting = slices.Delete(g.waiting, best, best+1)
		g.free--
		g.active[t.l]++
		close(t.ready)
	}
}

// hurry tells those who work in the background whether a demand read waits.
type hurry struct {
	mu   sync.Mutex // guards following
	n    int
	calm chan struct{} // closed when n comes to 0
}

func (h *hurry) begin() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n++; h.n == 1 {
		h.calm = make(chan struct{})
	}
}

func (h *hurry) end() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n--; h.n == 0 {
		close(h.calm)
	}
}

// wait is nil when no demand read waits, else a channel that is closed when the last
// has ended.
func (h *hurry) wait() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.n == 0 {
		return nil
	}
	return h.calm
}
