package open

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"time"
)

const (
	// maxPeers bounds the addresses kept of one torrent. Trackers name 50 at a time, a torrent connects to 50.
	maxPeers = 200
	// firstRetry and lastRetry bound the pause before a peer is dialled again, which doubles each time. The library's dials
	// are one-shot, and the first may come before the peer knows of the torrent.
	firstRetry = 2 * time.Second
	lastRetry  = 10 * time.Minute
	// maxTries is after how many dials in vain an address is forgotten: 17 minutes after it was found.
	maxTries = 9
)

// addressBook is the peers of one torrent that it dials. It is not safe for concurrent use.
type addressBook struct {
	peers map[netip.AddrPort]*contact
}

// contact is how dialling a peer went.
type contact struct {
	addr  *net.TCPAddr
	tries int // dials since it was last connected
	next  time.Time
}

func newAddressBook() addressBook { return addressBook{make(map[netip.AddrPort]*contact)} }

func (b addressBook) len() int { return len(b.peers) }

// add notes an address; whether it is new. When the book is full, it takes the place of one that was dialled in vain, if there is one.
func (b addressBook) add(ap netip.AddrPort) bool {
	if b.peers[ap] != nil {
		return false
	}
	if len(b.peers) >= maxPeers && !b.makeRoom() {
		return false
	}
	b.peers[ap] = &contact{addr: net.TCPAddrFromAddrPort(ap)}
	return true
}

func (b addressBook) makeRoom() bool {
	for ap, c := range b.peers {
		if c.tries > 1 {
			delete(b.peers, ap)
			return true
		}
	}
	return false
}

// due is the addresses to dial now, and when to ask again. A node that has everything calls on each peer once: who misses pieces
// dials.
func (b addressBook) due(now time.Time, connected map[string]bool, complete bool) (addrs []*net.TCPAddr, next time.Time) {
	next = now.Add(idleStep)
	for ap, c := range b.peers {
		switch {
		case connected[ap.String()]:
			c.tries, c.next = 0, now.Add(firstRetry)
			continue // its end is told by the library
		case complete && c.tries > 0:
			continue
		case c.tries >= maxTries:
			delete(b.peers, ap)
			continue
		case !now.Before(c.next):
			addrs = append(addrs, c.addr)
			pause := min(firstRetry<<c.tries, lastRetry)
			c.tries++
			c.next = now.Add(pause*3/4 + rand.N(pause/2)) // so that two nodes do not keep dialling each other at once
		}
		if c.next.Before(next) {
			next = c.next
		}
	}
	return addrs, next
}
