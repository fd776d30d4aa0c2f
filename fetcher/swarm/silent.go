package swarm

import (
	"maps"
	"slices"
	"time"

	"github.com/anacrolix/torrent"
)

const (
	// silentAfter is how long a peer that was asked for data may send next to none of it before its connection is closed, so that
	// others are asked: the library never takes a request back, and a peer that says it holds everything and sends nothing kept a
	// fetch from ending. Each time the same peer is waited for twice as long, so that one on a slow link gets its turn.
	silentAfter = 3 * time.Second
	// silentBelow is what counts as next to nothing, in bytes since the last look that saw more.
	silentBelow = 16 << 10
	// silentShare of that time the connection was read in vain: when this node itself is what does not read (its disk, its
	// limits), the peer is not to blame.
	silentShare = 0.8
	// shunFor is how long such a peer has no connection, twice as long each time.
	shunFor = 5 * time.Second
	// shunDoublings bounds both: 48 s and 80 s.
	shunDoublings = 4
)

// asked is what a torrent knows of its requests to one peer.
type asked struct {
	out  int // requests that are not answered
	at   time.Time
	got  int64         // bytes read of the connection until then
	idle time.Duration // and how long that waited for the peer
	// times it was shunned, and until when.
	times int
	until time.Time
}

// requested is called by the library, under its lock, for each request that was sent (1) or is answered or given up (-1).
func (s *Swarm) requested(e torrent.PeerRequestEvent, n int) {
	pc, ok := e.Peer.TryAsPeerConn()
	if !ok {
		return
	}
	t := s.torrent(e.Peer.Torrent().InfoHash())
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	a := t.asked[pc.PeerID]
	if a == nil {
		a = &asked{}
		t.asked[pc.PeerID] = a
	}
	if a.out = max(a.out+n, 0); a.out == 0 || a.out == 1 && n > 0 {
		a.at = time.Time{} // measured from the next look on
	}
}

// shunSilent closes the connections of peers that were asked and do not answer. The only peer is left alone: nobody would be asked
// instead.
func (t *Torrent) shunSilent(now time.Time) {
	conns := t.s.connsOf(t)
	if len(conns) < 2 {
		return
	}
	var silent []*conn
	t.mu.Lock()
	for _, c := range conns {
		a := t.asked[c.peer]
		if a == nil || a.out == 0 {
			continue
		}
		got, idle := c.got.Load(), c.idle(now)
		limit := silentAfter << min(a.times, shunDoublings)
		switch since := now.Sub(a.at); {
		case a.at.IsZero(), got < a.got, got-a.got >= silentBelow:
			a.at, a.got, a.idle = now, got, idle
		case since >= limit && float64(idle-a.idle) >= silentShare*float64(since):
			a.until = now.Add(shunFor << min(a.times, shunDoublings))
			a.times++
			a.at = time.Time{}
			silent = append(silent, c)
		case since >= limit:
			a.at = time.Time{}
		}
	}
	t.mu.Unlock()
	for _, c := range silent {
		t.s.log.Info("a peer was asked for pieces and sends nothing: others are asked", "blob", t.digest, "peer", nodeOf(c.peer))
		c.Close()
	}
}

// shunned reports whether a peer has no connection for a time. Needs mu.
func (t *Torrent) shunned(id torrent.PeerID) bool {
	a := t.asked[id]
	return a != nil && time.Now().Before(a.until)
}

// connsOf are the connections that belong to a torrent.
func (s *Swarm) connsOf(t *Torrent) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var cs []*conn
	for c := range s.conns {
		if c.torrent.Load() == t {
			cs = append(cs, c)
		}
	}
	return cs
}

// idle is how long the connection waited for its peer to send something, in all.
func (c *conn) idle(now time.Time) time.Duration {
	d := time.Duration(c.waited.Load())
	if since := c.waiting.Load(); since != 0 {
		d += max(now.Sub(time.Unix(0, since)), 0)
	}
	return d
}

// receive reads from the peer and keeps count.
func (c *conn) receive(p []byte) (int, error) {
	begun := time.Now().UnixNano()
	c.waiting.Store(begun)
	n, err := c.Conn.Read(p)
	c.waited.Add(time.Now().UnixNano() - begun)
	c.waiting.Store(0)
	c.got.Add(int64(n))
	return n, err
}

// progress is how much of use a torrent had received when it was last seen to grow. It belongs to run.
type progress struct {
	got int64
	at  time.Time
}

// nudge has the library look for something to request when nothing of what is wanted has come for silentAfter: it never asks
// again by itself for what a peer rejected.
func (p *progress) nudge(t *Torrent, now time.Time) {
	t.mu.Lock()
	wanted := slices.Collect(maps.Keys(t.wanted))
	t.mu.Unlock()
	stats := t.lib.Stats()
	got := stats.BytesReadUsefulData.Int64()
	if got != p.got || len(wanted) == 0 || p.at.IsZero() {
		p.got, p.at = got, now
		return
	}
	if now.Sub(p.at) < silentAfter {
		return
	}
	p.at = now
	for _, i := range wanted {
		t.setPriority(i, false)
		t.setPriority(i, true)
	}
}
