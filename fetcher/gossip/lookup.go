package gossip

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"
)

const (
	// maxPeers bounds the configured peers, maxAddrs the addresses that one name stands for.
	maxPeers = 1024
	maxAddrs = 1024
	// lookupEvery is how often DNS names are looked up again, each retryAlone while nobody was found; lookupTime bounds one.
	lookupEvery = 30 * time.Second
	lookupTime  = 5 * time.Second
)

// peer is one of Options.Peers.
type peer struct {
	given string
	host  string
	port  uint16

	fixed    bool // host is an address
	addrs    []netip.AddrPort
	err      error // of the last lookup
	looked   bool
	looking  bool
	nextLook time.Time
}

// parsePeer reads host:port, or host when there is a default port.
func parsePeer(given string, port uint16) (*peer, error) {
	host, digits, err := net.SplitHostPort(given)
	switch {
	case err == nil:
		n, err := strconv.ParseUint(digits, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("peer %q: %q is not a port from 1 to 65535", given, digits)
		}
		port = uint16(n)
	case port == 0:
		return nil, fmt.Errorf("peer %q: write HOST:PORT", given)
	default:
		host = given
		if n := len(host); n > 2 && host[0] == '[' && host[n-1] == ']' {
			host = host[1 : n-1]
		}
	}
	if host == "" || len(host) > 253 { // RFC 1035 §2.3.4
		return nil, fmt.Errorf("peer %q: write HOST:PORT", given)
	}
	c := &peer{given: given, host: host, port: port}
	if ip, err := netip.ParseAddr(host); err == nil {
		c.fixed, c.looked = true, true
		c.addrs = []netip.AddrPort{netip.AddrPortFrom(ip.Unmap(), port)}
		if ip.IsUnspecified() || ip.IsMulticast() {
			return nil, fmt.Errorf("peer %q: %s is not the address of a node", given, ip)
		}
	}
	return c, nil
}

// look looks a name up and sets its targets.
func (p *peers) look(ctx context.Context, c *peer) {
	lctx, cancel := context.WithTimeout(ctx, lookupTime)
	ips, err := p.g.o.hooks.lookup(lctx, c.host)
	cancel()
	if ctx.Err() != nil {
		return
	}
	every := p.g.o.hooks.lookupEvery
	if p.g.members.count() == 0 {
		every = min(every, retryAlone)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.looking, c.looked, c.err = false, true, err
	c.nextLook = time.Now().Add(jitter(every))
	if err == nil {
		c.addrs = nil
		for _, ip := range ips {
			if len(c.addrs) < maxAddrs && !ip.IsUnspecified() && !ip.IsMulticast() {
				c.addrs = append(c.addrs, netip.AddrPortFrom(ip.Unmap(), c.port))
			}
		}
		if len(c.addrs) == 0 {
			c.err = fmt.Errorf("%s stands for no address of a node", c.host)
		}
		p.aimAllLocked()
	}
	p.poke()
}

// aimAllLocked makes exactly the addresses of the configured peers configured targets.
func (p *peers) aimAllLocked() {
	want := map[netip.AddrPort]bool{}
	for _, c := range p.configured {
		for _, a := range c.addrs {
			want[a] = true
			p.aimLocked(a, asConfigured, "")
		}
	}
	for a, t := range p.targets {
		if t.kind == asConfigured && !want[a] && !t.dialled {
			delete(p.targets, a)
		}
	}
}
