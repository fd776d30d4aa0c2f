package fetcher

import (
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

const (
	// wantShared and wantAlone are how many segments a node likes to have on loan:
	// one for each stream and the next; alone, enough for requests of runAlone.
	wantShared = streamsPerBlob + 1
	wantAlone  = 2 * runAlone
)

// lease is a segment that the blob's keeper lent this node, to get it from the
// registry.
type lease struct {
	anyway bool // also pieces that peers have: they are too slow
}

// keeper is what the member that keeps a blob's list said last.
type keeper struct {
	answered time.Time     // when; zero: not yet
	asked    time.Time     // when an announcement last went out
	next     time.Duration // how long it may take to the next one
	owners   []cluster.Member
	nodes    int // that take part, this one among them
	complete int // that hold everything
	lent     int // segments lent so far, to all
	looks    int // how often it was asked who holds a blob that is only read
	refused  bool
}

// announcementDue reports whether the keeper is to be told something now: its
// interval is over, or this node could take a segment. Called with d.mu held.
func (d *download) announcementDue(now time.Time) bool {
	if d.noPeers {
		return false
	}
	if d.announce {
		return false // one is under way; its answer says more
	}
	k := &d.keeper
	p := cluster.Pace{Asked: k.asked, Next: k.next, Refused: k.refused}
	return p.Due(now, d.wants(now))
}

// wants is how many segments this node would take on loan now. Called with d.mu
// held.
func (d *download) wants(now time.Time) int {
	if d.noPeers || d.noRange || d.run == nil || d.state == Complete || !d.originUsable(now) || d.holdsBack() && d.f.hot(startQuiet) {
		return 0
	}
	most := wantShared
	if d.keeper.nodes <= 1 {
		most = wantAlone
	}
	stalled := d.swarmStalled(now)
	for s, l := range d.leases {
		if d.segmentHeld(s) {
			delete(d.leases, s)
		} else if d.claims[s] || d.anyToAsk(s, l.anyway || stalled) {
			most--
		}
	}
	return max(most, 0)
}

// share is one look at what this node is to get from the registry.
type share struct {
	d        *download
	alone    bool // no one else can: everything
	distrust bool // what peers say they have does not come
	idle     time.Duration
	members  int // this node among them
}

// shareOf computes the current share. Called with d.mu.
func (d *download) shareOf(now time.Time) *share {
	w := &share{d: d}
	if d.noPeers || len(d.f.cluster.Members()) == 0 && d.keeper.nodes <= 1 {
		w.alone = true
		return w
	}
	w.distrust = d.swarmStalled(now)
	w.idle = d.lastPiece.before(now)
	if heard := d.keeper.answered; heard.IsZero() {
		w.idle = max(w.idle, d.begun.before(now)-keeperSilent+stalledAfter)
	}
	w.members = len(d.f.cluster.Members()) + 1
	return w
}

// mine reports whether this node should ask the registry for a segment now:
// because it was lent it, or because nothing comes from anywhere. Then the nodes
// take turns.
func (w *share) mine(s int) bool {
	if _, lent := w.d.leases[s]; lent || w.alone {
		return true
	}
	d := w.d
	return cluster.InTurn(d.desc.Digest, s, d.f.cluster.ID(), d.keeper.owners, w.members, w.idle)
}

// anyway reports whether a segment's pieces are asked of the registry although
// peers have them.
func (w *share) anyway(s int) bool {
	return w.alone || w.distrust || w.d.leases[s].anyway
}

// hungry reports whether the swarm has what is missing and delivers it more
// slowly than a registry would. Called with d.mu held.
func (d *download) hungry(now time.Time) bool {
	if now.Sub(d.eaten.at) >= hungryOver {
		have := d.st.Have()
		d.eaten.slow = len(d.wanted) > 0 && !d.eaten.at.IsZero() && now.Sub(d.eaten.at) < 2*hungryOver &&
			float64(have-d.eaten.have) < d.slowBelow()*now.Sub(d.eaten.at).Seconds()
		d.eaten.at, d.eaten.have = now, have
	}
	return d.eaten.slow
}

// meal is how much had come when it was last looked at.
type meal struct {
	at   time.Time
	have int64
	slow bool
}
