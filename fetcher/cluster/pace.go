package cluster

import (
	"math"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// askAgain is how soon a keeper is asked for segments again when it had none
	// to lend; in a large swarm, at a quarter of the interval between
	// announcements.
	askAgain = 250 * time.Millisecond
	// idleBefore is how long nothing may come from anywhere before a node asks the
	// registry for what it was not lent.
	idleBefore = 3 * time.Second
	// takeover is how much later each next rank does so.
	takeover = 3 * time.Second
	// aloneAfter is how long a node that has never heard from a keeper waits for
	// others at most.
	aloneAfter = 15 * time.Second
	// fewMembers need no turns then: a copy for each is no harm.
	fewMembers = 8
)

// KeptOpen is the longest interval between two announcements for which the
// connection is kept: in a crowd each node speaks rarely, and a keeper should not
// hold a connection to each of thousands for that.
const KeptOpen = 5 * time.Second

// Pace says when a fetch tells its keeper of its progress again.
type Pace struct {
	Asked   time.Time     // when an announcement last went out
	Next    time.Duration // after how long the keeper wants the next one; 0: it has not said
	Refused bool          // it was asked for segments and lent none
}

// Heard takes in a keeper's reply to an announcement that asked for want segments.
func (p *Pace) Heard(ans Reply, want int) {
	p.Next, p.Refused = ans.Next, want > 0 && len(ans.Granted) == 0
}

// Due reports whether the keeper is to be told something now: its interval is
// over, or the node would take want segments, and may ask again.
func (p *Pace) Due(now time.Time, want int) bool {
	since := now.Sub(p.Asked)
	if since > max(p.Next, announceEvery) {
		return true
	}
	return want > 0 && (!p.Refused || since > max(askAgain, p.Next/4))
}

// InTurn reports whether a node (self) asks the registry for a segment that it
// was not lent, after nothing came from anywhere for the time idle. Those that the
// keeper named (Reply.Owners) take turns, and everybody else after them. When no
// keeper has said a word, owners is empty and all of so many members are taken to
// be in the same position: by chance, the same at each look, one of them asks for
// the segment at once, another one after each takeover, and this node after
// aloneAfter at the latest; a few members do so all at once. Without that, a crowd that is too much for its
// keeper would be too much for the registry next.
func InTurn(d digest.Digest, segment int, self string, owners []Member, members int, idle time.Duration) bool {
	if idle < idleBefore {
		return false
	}
	if len(owners) == 0 && members <= fewMembers {
		return true
	}
	if len(owners) == 0 {
		turn := float64(weight(d, segment, self)) / (1 << 64) * float64(members) // 0 to members
		wait := takeover.Seconds() * math.Floor(turn)
		return idle.Seconds() >= min(idleBefore.Seconds()+wait, aloneAfter.Seconds())
	}
	ids := make([]string, len(owners))
	for i, o := range owners {
		ids[i] = o.ID
	}
	return idleBefore+time.Duration(Rank(d, segment, self, ids))*takeover <= idle
}
