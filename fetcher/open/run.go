package open

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

// run does everything that needs the library's lock, on behalf of methods that must not wait for it, keeps the torrent connected and
// its trackers told. It is in one of three states: working, paused (the storage failed a moment ago) and ended (ErrMismatch, for good).
func (t *Torrent) run() {
	defer close(t.stopped)
	defer t.trackers.stop()
	l := &loop{t: t, asked: make(map[int]bool), lure: -1}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		next := l.step()
		timer.Reset(time.Until(next))
		select {
		case <-t.ctx.Done():
			return
		case <-t.kick:
		case <-timer.C:
		}
	}
}

// loop is what run remembers between its steps.
type loop struct {
	t      *Torrent
	asked  map[int]bool // metainfo pieces that the library was told to get
	lure   int          // the metainfo piece wanted only to be let connect; -1 when none
	paused bool         // downloads are off
	over   bool         // the torrent has ended
	dhtDue time.Time
	got    int64     // bytes of use, when that last changed,
	gotAt  time.Time // and when it did
	seen   time.Time // when the storage was last looked at for pieces that it got unannounced
}

const (
	// idleStep is how often a torrent to which nothing happens is looked at.
	idleStep = 10 * time.Minute
	// rescan is how often, at most, the storage of an incomplete torrent is looked at for pieces that it got without Have being called:
	// while Add ran, the caller had nothing to call it on.
	rescan = 2 * time.Second
	// stall is how long nothing of use arrives before the library is told once more what to get. It does not ask again for what a peer
	// has rejected, which transmission does to the last request of a burst: without this, such a download never ends.
	stall = 3 * time.Second
)

// step does what is due, and says when to look again.
func (l *loop) step() time.Time {
	t := l.t
	now := time.Now()
	next := now.Add(idleStep)
	until := func(at time.Time) {
		if at.Before(next) {
			next = at
		}
	}
	t.mu.Lock()
	ended, failed, missing := t.ended, t.failed, t.pieces.missing
	t.mu.Unlock()
	if ended != nil {
		l.finish()
		return next
	}
	if l.pause(now, failed) {
		until(failed.Add(retryStorage))
	}
	if missing > 0 {
		if now.Sub(l.seen) >= rescan {
			first := l.seen.IsZero()
			l.seen = now
			l.resync()
			if first {
				until(now.Add(rescan))
			}
		} else {
			until(l.seen.Add(rescan))
		}
	}
	l.deliver()
	l.tell()
	l.ask()
	until(l.connect(now))
	conns := len(t.lib.PeerConns())
	if len(l.asked) > 0 && conns > 0 {
		until(l.nudge(now))
	}
	until(t.trackers.due(now, missing == 0, conns == 0))
	if t.s.public(t) {
		if !now.Before(l.dhtDue) {
			t.s.dht.announce(t)
			l.dhtDue = now.Add(dhtInterval)
		}
		until(l.dhtDue)
	}
	return next
}

// finish ends everything between the library and a torrent that is not of its layer.
func (l *loop) finish() {
	if l.over {
		return
	}
	l.over = true
	t := l.t
	t.lib.DisallowDataDownload()
	t.lib.DisallowDataUpload()
	t.lib.SetMaxEstablishedConns(0)
	t.trackers.stop()
}

// pause turns downloads off after the storage failed, and on again; whether they are off.
func (l *loop) pause(now, failed time.Time) bool {
	t := l.t
	if failed.IsZero() {
		return false
	}
	if !l.paused {
		t.lib.DisallowDataDownload()
		l.paused = true
	}
	if now.Sub(failed) < retryStorage {
		return true
	}
	t.mu.Lock()
	t.failed = time.Time{}
	t.mu.Unlock()
	t.lib.AllowDataDownload()
	l.paused = false
	return false
}

// resync finds pieces that the storage got without Have being called.
func (l *loop) resync() {
	t := l.t
	if !t.enter() {
		return
	}
	defer t.leave()
	t.mu.Lock()
	var missing []int
	for i, has := range t.pieces.stored {
		if !has {
			missing = append(missing, i)
		}
	}
	t.mu.Unlock()
	for _, i := range missing {
		if t.st.Has(i) {
			t.mu.Lock()
			t.setHave(i)
			t.mu.Unlock()
		}
	}
}

// deliver writes pieces whose content was in memory before they were wished for, or when the storage failed.
func (l *loop) deliver() {
	t := l.t
	t.mu.Lock()
	var ready []int
	for _, i := range t.pieces.wanted {
		if t.pieces.deliverable(i) {
			ready = append(ready, i)
		}
	}
	t.mu.Unlock()
	if len(ready) == 0 || !t.enter() {
		return
	}
	defer t.leave()
	for _, i := range ready {
		t.deliver(i)
	}
}

// tell has the library look at the pieces whose completion changed: it tells peers, and hashes nothing.
func (l *loop) tell() {
	t := l.t
	for {
		t.mu.Lock()
		changed := t.changed
		if len(changed) == 0 {
			t.mu.Unlock()
			return
		}
		t.changed = make(map[int]bool)
		t.mu.Unlock()
		for j := range changed {
			t.lib.Piece(j).UpdateCompletion()
		}
	}
}

// ask has the library get what the plan says, and no more what it said before.
func (l *loop) ask() {
	t := l.t
	budget := t.s.share()
	t.mu.Lock()
	now, dropped := t.pieces.plan(budget)
	t.mu.Unlock()
	for _, j := range dropped {
		t.lib.Piece(j).UpdateCompletion()
	}
	for j := range l.asked {
		if !now[j] && j != l.lure {
			t.lib.Piece(j).SetPriority(torrent.PiecePriorityNone)
		}
	}
	for j := range now {
		if !l.asked[j] {
			t.lib.Piece(j).SetPriority(torrent.PiecePriorityNormal)
		}
	}
	l.asked = now
}

// nudge has the library look for something to request, when nothing has come for a while; it says when to look again.
func (l *loop) nudge(now time.Time) time.Time {
	got := l.t.lib.Stats().BytesReadUsefulData
	if n := got.Int64(); n != l.got || now.Sub(l.gotAt) > 2*stall {
		l.got, l.gotAt = n, now
	}
	if now.Sub(l.gotAt) >= stall {
		l.gotAt = now
		for j := range l.asked {
			l.t.lib.Piece(j).SetPriority(torrent.PiecePriorityNone)
			l.t.lib.Piece(j).SetPriority(torrent.PiecePriorityNormal)
		}
	}
	return l.gotAt.Add(stall)
}

// connect has the library dial peers that are due and not connected, and says when to do so again.
//
// The library connects to nobody for a torrent that neither wishes for anything nor has anything to seed. A caller that waits for
// Availability before it wishes would wait for ever; so in that state one missing piece, the lure, is wished for until the first peer
// is there. It may arrive, and is then in memory.
func (l *loop) connect(now time.Time) time.Time {
	t := l.t
	conns := t.lib.PeerConns()
	connected := make(map[string]bool, len(conns))
	for _, pc := range conns {
		connected[pc.RemoteAddr.String()] = true
	}
	t.mu.Lock()
	complete := t.pieces.missing == 0
	idle := len(t.pieces.wanted) == 0 && !complete && !(t.s.o.Seed && t.pieces.missing < t.pieces.storePieces())
	due, next := t.book.due(now, connected, complete)
	lure := -1
	if idle && len(conns) == 0 && t.book.len() > 0 {
		lure = l.lure
		if lure < 0 || t.pieces.complete(lure) {
			lure = t.someAbsent()
		}
	}
	t.mu.Unlock()

	if lure != l.lure {
		if l.lure >= 0 && !l.asked[l.lure] {
			t.lib.Piece(l.lure).SetPriority(torrent.PiecePriorityNone)
		}
		if lure >= 0 {
			t.lib.Piece(lure).SetPriority(torrent.PiecePriorityNormal)
		}
		l.lure = lure
	}
	if len(due) > 0 {
		infos := make([]torrent.PeerInfo, 0, len(due))
		for _, addr := range due {
			infos = append(infos, torrent.PeerInfo{Addr: addr, Source: torrent.PeerSourceTracker})
		}
		t.lib.AddPeers(infos)
	}
	return next
}

// someAbsent is a metainfo piece that is not there, at random; −1 when all are. Needs mu.
func (t *Torrent) someAbsent() int {
	n := len(t.pieces.state)
	from := rand.IntN(n)
	for k := range n {
		if j := (from + k) % n; !t.pieces.complete(j) {
			return j
		}
	}
	return -1
}
