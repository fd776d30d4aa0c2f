package open

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// maxTiers and maxPerTier bound the trackers of one torrent: a metainfo is somebody else's word, and each tracker costs a connection
	// now and then.
	maxTiers   = 8
	maxPerTier = 8

	// defaultInterval is between two announces when the tracker does not say; what most say.
	defaultInterval = 30 * time.Minute
	// maxInterval: a tracker forgets who it has not heard of for an hour or two.
	maxInterval = time.Hour
	// minInterval is the shortest pause, whatever a tracker says and however much peers are needed.
	minInterval = time.Minute
	// firstBackoff and lastBackoff bound the pause after a tier has failed, which doubles each time.
	firstBackoff = 15 * time.Second
	lastBackoff  = 30 * time.Minute

	// announceTimeout bounds one announce, with all its redirects.
	announceTimeout = 15 * time.Second
	// stopTimeout bounds the last one: a node that goes down does not wait for a dead tracker.
	stopTimeout = 2 * time.Second
)

// The events of an announce (BEP 3).
const (
	eventNone      = ""
	eventStarted   = "started"
	eventCompleted = "completed"
	eventStopped   = "stopped"
)

// TrackerStatus is how announcing to one tier goes.
type TrackerStatus struct {
	// Tracker is scheme and host of the tracker in use: the rest of the URL may hold a token.
	Tracker string
	// Peers, Seeders and Leechers are what it said last: addresses given, and what it counts.
	Peers, Seeders, Leechers int
	// Next is when it is asked again.
	Next time.Time
	// Err is why the last announce failed, nil when it did not.
	Err error
}

// announcer tells a torrent's trackers of this node and takes in the peers that they name. Every tier is announced to, and within one the
// first tracker that answers (BEP 12). Its methods are called by the torrent's run, but status.
type announcer struct {
	t           *Torrent
	tiers       []*tier
	wasComplete bool // when the torrent was added: "completed" is then never sent

	mu      sync.Mutex // guards what tiers say and following
	stopped bool
}

// tier is trackers of which one is enough. It moves
//
//	waiting → announcing   its time has come
//	announcing → waiting   it was answered, or no tracker of it works
//	any → stopped          the torrent is dropped
type tier struct {
	urls      []string // the one that answered last is first
	busy      bool     // announcing
	started   bool     // "started" was answered, so "stopped" is owed
	completed bool     // "completed" was answered, or is not to be sent
	id        string   // tracker id, to be sent back
	fails     int      // in a row
	last      time.Time
	interval  time.Duration
	least     time.Duration // the shortest pause that the tracker allows
	next      time.Time
	status    TrackerStatus
}

// newAnnouncer takes what is a tracker's URL out of tiers; what is not, is left out.
func newAnnouncer(t *Torrent, tiers [][]string) *announcer {
	a := &announcer{t: t}
	for _, urls := range tiers {
		x := &tier{least: minInterval}
		for _, u := range urls {
			if _, err := parseTracker(u); err != nil {
				t.s.log.Warn("a tracker of the torrent cannot be used", "torrent", t.infohash, "error", err)
				continue
			}
			if len(x.urls) < maxPerTier {
				x.urls = append(x.urls, u)
			}
		}
		if len(x.urls) == 0 || len(a.tiers) == maxTiers {
			continue
		}
		rand.Shuffle(len(x.urls), func(i, j int) { x.urls[i], x.urls[j] = x.urls[j], x.urls[i] }) // BEP 12
		x.status.Tracker = redact(x.urls[0])
		a.tiers = append(a.tiers, x)
	}
	return a
}

// status is a snapshot.
func (a *announcer) status() []TrackerStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]TrackerStatus, 0, len(a.tiers))
	for _, x := range a.tiers {
		s := x.status
		s.Next = x.next
		all = append(all, s)
	}
	return all
}

// due starts the announces whose time has come, and says when to call again. Complete: the torrent has everything; lonely: it has no peer.
func (a *announcer) due(now time.Time, complete, lonely bool) time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := now.Add(idleStep)
	if a.stopped {
		return next
	}
	for _, x := range a.tiers {
		if x.busy {
			continue // it wakes run when it is done
		}
		if a.wasComplete {
			x.completed = true
		}
		at := x.next
		if x.fails == 0 && x.started {
			switch {
			case complete && !x.completed: // news, but no reason to hurry a tracker
				at = x.last.Add(time.Second)
			case !complete && lonely:
				at = x.last.Add(x.least)
			}
		}
		if !now.Before(at) {
			x.busy = true
			a.t.s.wg.Go(func() { a.announce(x, complete) })
			continue
		}
		if at.Before(next) {
			next = at
		}
	}
	return next
}

// announce asks a tier's trackers in turn until one answers.
func (a *announcer) announce(x *tier, complete bool) {
	t := a.t
	defer t.wake()
	select { // a place among all announces
	case t.s.announce <- struct{}{}:
		defer func() { <-t.s.announce }()
	case <-t.ctx.Done():
		return
	}
	a.mu.Lock()
	event := eventNone
	switch {
	case !x.started:
		event = eventStarted
	case complete && !x.completed:
		event = eventCompleted
	}
	urls, id := append([]string(nil), x.urls...), x.id
	a.mu.Unlock()

	q := a.query(event, id)
	var res answer
	var err error
	for k, u := range urls {
		ctx, cancel := context.WithTimeout(t.ctx, announceTimeout)
		res, err = t.s.ask(ctx, u, q)
		cancel()
		if t.ctx.Err() != nil {
			break
		}
		if err == nil {
			a.answered(x, k, event, complete, res)
			t.found(res.peers, res.near)
			return
		}
	}
	a.failed(x, err)
}

// answered notes that tracker k of the tier answered.
func (a *announcer) answered(x *tier, k int, event string, complete bool, res answer) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	u := x.urls[k]
	copy(x.urls[1:], x.urls[:k]) // to the front (BEP 12)
	x.urls[0] = u
	x.busy, x.fails, x.last = false, 0, now
	x.started = true
	if event == eventCompleted || event == eventStarted && complete {
		x.completed = true // who starts complete has nothing to tell later
	}
	if res.id != "" {
		x.id = res.id
	}
	x.interval = min(max(res.interval, minInterval), maxInterval)
	x.least = min(max(res.least, minInterval), x.interval)
	x.next = now.Add(x.interval)
	x.status = TrackerStatus{Tracker: redact(u), Peers: len(res.peers), Seeders: res.seeders, Leechers: res.leechers}
	if res.warning != "" {
		a.t.s.log.Warn("a tracker has something to say", "torrent", a.t.infohash, "tracker", x.status.Tracker, "warning", res.warning)
	}
}

// failed notes that no tracker of the tier works.
func (a *announcer) failed(x *tier, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	x.busy = false
	x.fails++
	pause := lastBackoff
	if x.fails < 10 {
		pause = min(firstBackoff<<(x.fails-1), lastBackoff)
	}
	pause = max(pause*3/4+rand.N(pause/2), min(retryAfter(err), maxInterval))
	x.next = time.Now().Add(pause)
	x.status.Err = err
	x.status.Tracker = redact(x.urls[0])
	if a.t.ctx.Err() == nil && x.fails == 1 {
		a.t.s.log.Warn("a tracker does not answer as it should; trying again later",
			"torrent", a.t.infohash, "tracker", x.status.Tracker, "error", err, "wait", pause.Round(time.Second))
	}
}

// stop tells the trackers that know of this node that it leaves, in the background and once. Later calls of due do nothing.
func (a *announcer) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.stopped {
		return
	}
	a.stopped = true
	for _, x := range a.tiers {
		if !x.started {
			continue
		}
		u, q := x.urls[0], a.query(eventStopped, x.id)
		a.t.s.wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
			defer cancel()
			select {
			case a.t.s.announce <- struct{}{}:
				defer func() { <-a.t.s.announce }()
			case <-ctx.Done():
				return
			}
			a.t.s.ask(ctx, u, q) // nobody is left to do something about an error
		})
	}
}

// query is what a tracker is told.
func (a *announcer) query(event, id string) query {
	q := query{infohash: a.t.infohash, peer: a.t.s.lib.PeerID(), port: a.t.s.port, key: a.t.s.key, event: event, id: id, want: wantPeers}
	q.down, q.up, q.left = a.t.progress()
	if event == eventStopped {
		q.want = 0
	}
	return q
}
