package gossip

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// announceWait is how long memberlist may hold up its caller to announce a change; it announces it all the same afterwards.
const announceWait = time.Millisecond

// self is what this node says of itself.
type self struct {
	id    *trust.Identity
	port  uint16
	fixed bool // the address was given
	// mine reports whether an address is one of this machine's.
	mine func(netip.Addr) bool
	// changed announces the new description; called without mu held.
	changed func()

	mu   sync.Mutex // guards following
	node Node
	seq  uint64
	meta []byte
}

func (s *self) get() Node {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.node
}

func (s *self) addr() netip.Addr { return s.get().Addr.Addr() }

func (s *self) text() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.meta
}

// update changes the description and announces it, if f says that it changed anything.
func (s *self) update(f func(*Node) bool) {
	s.mu.Lock()
	ok := f(&s.node)
	if ok {
		s.signLocked()
	}
	s.mu.Unlock()
	if ok {
		s.changed()
	}
}

func (s *self) signLocked() {
	s.seq++
	s.meta = encodeMeta(s.id, s.node, s.seq)
}

// learn considers the local end of a stream as this node's address. The first one counts; a better one is one that other
// machines can use, too; and another one when the machine has not the old one any more. A machine on several networks
// keeps its first, so that it does not change its address with every peer.
func (s *self) learn(ip netip.Addr) {
	if s.fixed || ip.Is6() && ip.IsLinkLocalUnicast() || checkAddr(netip.AddrPortFrom(ip, s.port), netip.Addr{}) != nil {
		return
	}
	have := s.addr()
	if have == ip || have.IsValid() && (!have.IsLoopback() || ip.IsLoopback()) && s.mine(have) {
		return
	}
	s.update(func(n *Node) bool {
		if n.Addr.Addr() != have {
			return false // another stream was quicker
		}
		n.Addr = netip.AddrPortFrom(ip, s.port)
		return true
	})
}

// gone reports whether the machine has lost the address that this node advertises.
func (s *self) gone() bool {
	a := s.addr()
	return !s.fixed && a.IsValid() && !s.mine(a)
}

// machineHas reports whether an address is one of this machine's; true when it cannot tell.
func machineHas(ip netip.Addr) bool {
	if ip.IsLoopback() {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	for _, a := range addrs {
		if p, ok := a.(*net.IPNet); ok {
			if have, ok := netip.AddrFromSlice(p.IP); ok && have.Unmap() == ip {
				return true
			}
		}
	}
	return false
}
