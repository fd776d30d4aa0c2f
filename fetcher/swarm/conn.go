package swarm

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// dialer gives the library its outgoing connections.
type dialer struct{ s *Swarm }

var _ torrent.Dialer = dialer{}

func (d dialer) DialerNetwork() string { return "tcp" }

func (d dialer) Dial(ctx context.Context, addr string) (net.Conn, error) {
	s := d.s
	s.mu.Lock()
	full := s.fullLocked()
	s.mu.Unlock()
	if full {
		return nil, errFull
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.ctx, cancel)()
	raw, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		s.unlearn(addr)
		return nil, err
	}
	tc := tls.Client(raw, s.tls)
	if err := tc.HandshakeContext(ctx); err != nil {
		raw.Close()
		s.unlearn(addr)
		if trust.Foreign(err) {
			s.warnForeign(addr, err)
		}
		return nil, err
	}
	c, err := s.newConn(tc)
	if err != nil {
		raw.Close()
		return nil, err
	}
	if ap, err := netip.ParseAddrPort(addr); err == nil {
		s.learn(ap, c.peer)
	}
	if c.peer == s.self {
		c.Close()
		return nil, fmt.Errorf("%s is this node itself", addr)
	}
	return c, nil
}

// learn records who answers at an address.
func (s *Swarm) learn(ap netip.AddrPort, id torrent.PeerID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.nodes[ap]; !known && len(s.nodes) >= maxNodes {
		clear(s.nodes)
	}
	s.nodes[ap] = id
}

// unlearn forgets who answered at an address: nobody does now.
func (s *Swarm) unlearn(addr string) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.nodes, ap)
}

// nodeAt is who answered at an address when it was last dialled.
func (s *Swarm) nodeAt(ap netip.AddrPort) (torrent.PeerID, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.nodes[ap]
	return id, ok
}

// warnForeign tells, once per address, that a configured peer is of another cluster.
func (s *Swarm) warnForeign(addr string, err error) {
	s.mu.Lock()
	told := s.warned[addr]
	s.warned[addr] = true
	s.mu.Unlock()
	if !told {
		s.log.Warn("a peer does not have this node's cluster secret: copy the same secret file to both, or remove the peer",
			"peer", addr, "error", err)
	}
}

// listener gives the library its incoming connections.
type listener struct{ s *Swarm }

var _ torrent.Listener = listener{}

func (l listener) Addr() net.Addr { return l.s.ln.Addr() }

// Accept returns an error only when the library is closed: it would call again at once, for ever.
func (l listener) Accept() (net.Conn, error) {
	for {
		nc, err := l.s.ln.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			<-l.s.done
			return nil, err
		case err != nil:
			select {
			case <-l.s.done:
				return nil, err
			case <-time.After(50 * time.Millisecond): // out of descriptors: closing connections is what helps
			}
			continue
		}
		tc, ok := nc.(*tls.Conn)
		if !ok {
			nc.Close()
			continue
		}
		c, err := l.s.newConn(tc)
		if err != nil {
			nc.Close()
			continue
		}
		return c, nil
	}
}

// conn is a TLS connection to a member, as the library sees it. It
//
//   - holds the peer to its identity: the peer ID in its BitTorrent handshake must be that of its certificate,
//   - cuts connections of banned peers in that handshake, where the torrent is first named,
//   - never fails to set a deadline: the library panics on that, and a connection may be closed at any time. The read
//     or write that follows fails anyway.
type conn struct {
	*tls.Conn
	s    *Swarm
	peer torrent.PeerID // proven
	once sync.Once

	// handshake holds what was read of the peer's BitTorrent handshake; nil when it has been checked. It is used by one
	// reader at a time.
	handshake []byte
}

// newConn wraps a connection whose TLS handshake is done. The caller closes tc on error.
func (s *Swarm) newConn(tc *tls.Conn) (*conn, error) {
	node, err := trust.PeerID(tc.ConnectionState())
	if err != nil {
		return nil, err
	}
	peer, err := peerIDOf(node)
	if err != nil {
		return nil, err
	}
	c := &conn{Conn: tc, s: s, peer: peer, handshake: make([]byte, 0, handshakeSize)}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	if s.fullLocked() {
		return nil, errFull
	}
	s.conns[c] = struct{}{}
	return c, nil
}

// The BitTorrent handshake (BEP 3): protocol name, 8 bytes of extension bits, infohash, peer ID.
const (
	handshakeHash = len(pp.Protocol) + 8
	handshakePeer = handshakeHash + 20
	handshakeSize = handshakePeer + 20
)

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.handshake != nil && n > 0 {
		c.handshake = append(c.handshake, p[:min(n, handshakeSize-len(c.handshake))]...)
		if len(c.handshake) == handshakeSize {
			if err := c.check(c.handshake); err != nil {
				c.Close()
				return 0, err
			}
			c.handshake = nil
		}
	}
	return n, err
}

// check judges the peer's whole BitTorrent handshake.
func (c *conn) check(h []byte) error {
	if string(h[:len(pp.Protocol)]) != pp.Protocol {
		return errors.New("the peer does not speak BitTorrent")
	}
	if torrent.PeerID(h[handshakePeer:]) != c.peer {
		return fmt.Errorf("node %s calls itself another peer", nodeOf(c.peer))
	}
	hash := metainfo.Hash(h[handshakeHash:handshakePeer])
	t := c.s.torrent(hash)
	if t == nil && c.s.ask != nil && c.s.ask(hash) {
		t = c.s.torrent(hash)
	}
	if t != nil && t.isBanned(c.peer) {
		return fmt.Errorf("node %s is banned from %s", nodeOf(c.peer), t.digest)
	}
	return nil
}

func (c *conn) Close() error {
	var err error
	c.once.Do(func() {
		err = c.Conn.Close()
		c.s.mu.Lock()
		delete(c.s.conns, c)
		c.s.mu.Unlock()
	})
	return err
}

func (c *conn) SetDeadline(t time.Time) error      { c.Conn.SetDeadline(t); return nil }
func (c *conn) SetReadDeadline(t time.Time) error  { c.Conn.SetReadDeadline(t); return nil }
func (c *conn) SetWriteDeadline(t time.Time) error { c.Conn.SetWriteDeadline(t); return nil }
