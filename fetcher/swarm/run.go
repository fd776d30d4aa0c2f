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
	due := false
	for {
		t.settle()
		complete, fresh := t.state()
		switch {
		case complete:
			retry.Stop()
		case due && t.cutLost():
			retry.Reset(lostPause) // until the connections are gone
		case due:
			t.connect()
			retry.Reset(retryPeers*3/4 + rand.N(retryPeers/2))
		case fresh:
			t.connect()
		}
		due = false
		select {
		case <-t.ctx.Done():
			return
		case <-t.kick:
			if complete { // it has no timer, and needs one if it is so no longer
				retry.Reset(lostPause)
			}
		case <-retry.C:
			due = true
		}
	}
}

func (t *Torrent) state() (complete, newPeers bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	newPeers, t.newPeers = t.newPeers, false
	return t.missing == 0, newPeers
}

// settle tells the library which pieces have come or gone since it was last told, and the library tells peers of those that have come.
func (t *Torrent) settle() {
	for {
		t.mu.Lock()
		changed := t.changed
		if len(changed) == 0 {
			t.mu.Unlock()
			return
		}
		t.changed = make(map[int]bool)
		t.mu.Unlock()
		for i := range changed {
			t.lib.Piece(i).UpdateCompletion()
		}
	}
}

// want has the library look for peers that have the pieces missing now, see the package comment. While downloads are forbidden it forgets
// the wish for each piece that comes, and makes none for one that goes.
func (t *Torrent) want() {
	t.lib.AllowDataDownload()
	t.lib.DownloadAll()
	t.lib.DisallowDataDownload()
}

// cutLost closes the torrent's connections if peers were told of pieces that are gone, and reports whether it did.
func (t *Torrent) cutLost() bool {
	t.mu.Lock()
	lost := len(t.lost) > 0
	clear(t.lost)
	t.mu.Unlock()
	if !lost {
		return false
	}
	t.settle() // first: who comes back must not hear the same again
	for _, pc := range t.lib.PeerConns() {
		pc.Close()
	}
	t.want()
	return true
}

// connect has the library dial the peers that are not connected.
func (t *Torrent) connect() {
	conns := t.lib.PeerConns()
	connected := make(map[torrent.PeerID]bool, len(conns))
	for _, pc := range conns {
		connected[pc.PeerID] = true
	}

	now := time.Now()
	t.mu.Lock()
	infos := make([]torrent.PeerInfo, 0, len(t.peers))
	for ap, a := range t.peers {
		id, known := t.s.nodeAt(ap)
		if known && (id == t.s.self || connected[id] || t.banned[id]) {
			a.tries, a.next = 0, time.Time{}
			continue
		}
		// A member that answers there only does not know the blob yet.
		if !known && now.Before(a.next) {
			continue
		}
		a.tried(now)
		infos = append(infos, torrent.PeerInfo{Addr: a.addr, Source: torrent.PeerSourceDirect, Trusted: true})
	}
	t.mu.Unlock()
	if len(infos) > 0 {
		t.lib.AddPeers(infos)
	}
}
