package open

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/anacrolix/torrent"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// anyPortTries is how often a port that the kernel chose for TCP may turn out to be taken for UDP.
	anyPortTries = 16
	// maxNearby bounds the loopback addresses that trackers and callers made known.
	maxNearby = 256
)

// listen opens the first of ports that is free, for UDP, too, when wanted.
func listen(host string, ports trust.PortRange, withUDP bool) (net.Listener, net.PacketConn, error) {
	family := ""
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
		family = "4" // else Go takes 0.0.0.0 for "IPv6, too"
	}
	tries := 1
	if ports == (trust.PortRange{}) {
		tries = anyPortTries
	}
	for port := int(ports.First); port <= int(ports.Last); port++ {
		for range tries {
			tcp, err := net.Listen("tcp"+family, net.JoinHostPort(host, strconv.Itoa(port)))
			if errors.Is(err, syscall.EADDRINUSE) {
				break
			}
			if err != nil {
				return nil, nil, fmt.Errorf("cannot listen for BitTorrent peers: %w", err)
			}
			if !withUDP {
				return tcp, nil, nil
			}
			udp, err := net.ListenPacket("udp"+family, tcp.Addr().String())
			if err == nil {
				return tcp, udp, nil
			}
			tcp.Close()
			if !errors.Is(err, syscall.EADDRINUSE) {
				return nil, nil, fmt.Errorf("cannot listen for DHT nodes: %w", err)
			}
		}
	}
	return nil, nil, fmt.Errorf("cannot listen for BitTorrent peers: every port of %s is taken; choose others", ports)
}

// dialer gives the library its outgoing connections.
type dialer struct{ s *Swarm }

var _ torrent.Dialer = dialer{}

func (d dialer) DialerNetwork() string { return "tcp" }

func (d dialer) Dial(ctx context.Context, addr string) (net.Conn, error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	if !d.s.dialable(ap) {
		return nil, fmt.Errorf("%s is no address of a BitTorrent peer", addr)
	}
	if !d.s.takeSlot() {
		return nil, errTooMany
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	defer context.AfterFunc(d.s.ctx, cancel)()
	raw, err := d.s.dial(ctx, ap)
	if err != nil {
		d.s.freeSlot()
		return nil, err
	}
	return d.s.newConn(raw)
}

// dial connects from the address that peers know, when Options.Listen names one.
func (s *Swarm) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	var from net.Dialer
	if s.from.IsValid() && s.from.Is4() == to.Addr().Unmap().Is4() {
		from.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(s.from, 0))
	}
	return from.DialContext(ctx, "tcp", to.String())
}

// dialable tells whether a stranger's word is enough to connect there. Trackers and peers could otherwise have this node knock at
// services of its own machine.
func (s *Swarm) dialable(ap netip.AddrPort) bool {
	a := ap.Addr().Unmap()
	switch {
	case ap.Port() == 0 || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return false
	case a.IsLinkLocalUnicast():
		return false // not of use without a zone, and where clouds keep their secrets
	case a.IsLoopback() && !s.loopback:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.nearby[netip.AddrPortFrom(a, ap.Port())]
	}
	return true
}

// allowNearby lets a loopback address be dialled: the caller named it, or a tracker on loopback.
func (s *Swarm) allowNearby(ap netip.AddrPort) {
	if !ap.Addr().IsLoopback() {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.nearby) < maxNearby {
		s.nearby[ap] = true
	}
}

var errTooMany = errors.New("too many connections")

// takeSlot counts a connection that is about to be; balance with freeSlot, or newConn, which hands that to the connection.
func (s *Swarm) takeSlot() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.slots >= s.o.MaxConnections {
		return false
	}
	s.slots++
	return true
}

func (s *Swarm) freeSlot() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slots--
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
		if !l.s.takeSlot() {
			nc.Close()
			continue
		}
		if c, err := l.s.newConn(nc); err == nil {
			return c, nil
		}
	}
}

// conn is a connection to a peer, as the library sees it. It
//
//   - counts as one of Options.MaxConnections,
//   - ends when nothing is heard for long, so that silent strangers cannot hold the places,
//   - applies the download limit,
//   - never fails to set a deadline: the library panics on that, and a connection may be closed at any time. The read
//     or write that follows fails anyway.
type conn struct {
	net.Conn
	s      *Swarm
	ctx    context.Context
	cancel context.CancelFunc // by Close
	once   sync.Once

	mu       sync.Mutex
	deadline time.Time // for reads, of the library; zero: none. Guarded by mu
}

// newConn wraps nc, for which a slot was taken. It closes nc and frees the slot on error.
func (s *Swarm) newConn(nc net.Conn) (net.Conn, error) {
	c := &conn{Conn: nc, s: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		s.slots--
		nc.Close()
		return nil, ErrClosed
	}
	c.ctx, c.cancel = context.WithCancel(s.ctx)
	s.conns[c] = struct{}{}
	return c, nil
}

func (c *conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	until := time.Now().Add(idleTimeout)
	if !c.deadline.IsZero() && c.deadline.Before(until) {
		until = c.deadline
	}
	c.Conn.SetReadDeadline(until)
	c.mu.Unlock()
	n, err := c.Conn.Read(p)
	if c.s.o.DownloadLimit != nil {
		c.pace(n)
	}
	return n, err
}

// pace waits until n more bytes are within the download limit, or the connection is closed.
func (c *conn) pace(n int) {
	limit := c.s.o.DownloadLimit
	for n > 0 {
		k := n
		if burst := limit.Burst(); burst > 0 {
			k = min(k, burst)
		}
		if limit.WaitN(c.ctx, k) != nil {
			return
		}
		n -= k
	}
}

func (c *conn) Close() error {
	var err error
	c.once.Do(func() {
		c.cancel()
		err = c.Conn.Close()
		c.s.mu.Lock()
		delete(c.s.conns, c)
		c.s.slots--
		c.s.mu.Unlock()
	})
	return err
}

func (c *conn) SetDeadline(t time.Time) error {
	c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *conn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	c.Conn.SetReadDeadline(t)
	return nil
}

func (c *conn) SetWriteDeadline(t time.Time) error { c.Conn.SetWriteDeadline(t); return nil }
