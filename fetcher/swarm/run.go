package swarm

import (
	"math/rand/v2"
	"time"

	"github.com/anacrolix/torrent"
)

// wake has run look at what is to be done.
func (t *Torrent) wake() {
	select {
	case t.kick <- struct{}{}:
	default: // it will look anyway
	}
}

// run does everything that needs the library's lock, on behalf of methods that must not wait for it, and keeps an
// incomplete torrent connected. A complete one sleeps until something changes.
func (t *Torrent) run() {
	defer close(t.stopped)
	retry := time.NewTimer(0)
	defer retry.Stop()
	lure := -1      // the piece wanted only to be let connect; -1 when none
	paused := false // downloads are off
	var progress progress
	due := true
	for {
		t.settle()
		complete, fresh, failed := t.state()
		if !failed.IsZero() && !paused {
			t.lib.DisallowDataDownload()
			paused = true
		}
		if paused && time.Since(failed) >= retryStorage {
			t.mu.Lock()
			t.failed = time.Time{}
			t.mu.Unlock()
			t.lib.AllowDataDownload()
			paused = false
		}
		switch {
		case complete:
			lure = -1
			retry.Stop()
		case due:
			t.resync()
			t.shunSilent(time.Now())
			progress.nudge(t, time.Now())
			lure = t.connect(lure)
			retry.Reset(retryPeers*3/4 + rand.N(retryPeers/2))
		case fresh || lure >= 0:
			lure = t.connect(lure)
		}
		select {
		case <-t.ctx.Done():
			return
		case <-t.kick:
			// A torrent that was complete has no timer; it needs one if it is so no longer.
			due = complete
		case <-retry.C:
			due = true
		}
	}
}

func (t *Torrent) state() (complete, newPeers bool, failed time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	newPeers, t.newPeers = t.newPeers, false
	return t.missing == 0, newPeers, t.failed
}

// settle tells the library what changed since it was last told.
func (t *Torrent) settle() {
	for {
		t.mu.Lock()
		changed, wishes := t.changed, t.wishes
		if len(changed)+len(wishes) == 0 {
			t.mu.Unlock()
			return
		}
		t.changed, t.wishes = make(map[int]bool), make(map[int]bool)
		t.mu.Unlock()
		for i := range changed {
			t.lib.Piece(i).UpdateCompletion() // tells peers, and hashes nothing
		}
		for i, want := range wishes {
			t.setPriority(i, want)
		}
	}
}

func (t *Torrent) setPriority(i int, want bool) {
	p := torrent.PiecePriorityNone
	if want {
		p = torrent.PiecePriorityNormal
	}
	t.lib.Piece(i).SetPriority(p)
}

// resync finds pieces that the storage got without Have being called (while Add ran), and looks once more at those that
// were lost: the library may have been completing one at that very moment.
func (t *Torrent) resync() {
	t.mu.Lock()
	for i := range t.lost {
		t.changed[i] = true
	}
	clear(t.lost)
	var missing []int
	for i, held := range t.held {
		if !held {
			missing = append(missing, i)
		}
	}
	t.mu.Unlock()
	if !t.enter() {
		return
	}
	defer t.leave()
	for _, i := range missing {
		if t.st.Has(i) {
			t.setHave(i)
			t.wake()
		}
	}
}

// connect has the library dial the peers that are not connected, and returns the lure in use after it: see the package
// comment on the wish that the swarm makes itself.
func (t *Torrent) connect(lure int) int {
	conns := t.lib.PeerConns()
	connected := make(map[torrent.PeerID]bool, len(conns))
	for _, pc := range conns {
		connected[pc.PeerID] = true
	}

	now := time.Now()
	missing := 0
	t.mu.Lock()
	infos := make([]torrent.PeerInfo, 0, len(t.peers))
	for ap, a := range t.peers {
		id, known := t.s.nodeAt(ap)
		if known && (id == t.s.self || connected[id] || t.banned[id] || t.shunned(id)) {
			a.tries, a.next = 0, time.Time{}
			continue
		}
		// A member that answers there only does not know the blob yet.
		if missing++; !known && now.Before(a.next) {
			continue
		}
		a.tried(now)
		infos = append(infos, torrent.PeerInfo{Addr: a.addr, Source: torrent.PeerSourceDirect, Trusted: true})
	}
	// The library dials for a torrent that wants something, or that has something and seeds.
	idle := len(t.wanted) == 0 && !(t.s.seed && t.missing < t.pieces)
	need := idle && missing > 0 // one connection is not enough: that peer may send nothing
	next := lure
	switch {
	case need && (lure < 0 || t.held[lure]):
		next = t.someMissing()
	case !need:
		next = -1
	}
	drop := lure >= 0 && lure != next && !t.wanted[lure]
	t.mu.Unlock()

	if drop {
		t.setPriority(lure, false)
	}
	if next >= 0 && next != lure {
		t.setPriority(next, true)
	}
	if len(infos) > 0 {
		t.lib.AddPeers(infos)
	}
	return next
}

// someMissing is the index of a piece that is not held, at random; −1 when all are. Needs mu.
func (t *Torrent) someMissing() int {
	from := rand.IntN(t.pieces)
	for k := range t.pieces {
		if i := (from + k) % t.pieces; !t.held[i] {
			return i
		}
	}
	return -1
}
