package trust

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	// handshakeTimeout is how long a new connection may take to prove itself: several round trips around the world and
	// a busy machine; a connection that says nothing is gone soon.
	handshakeTimeout = 5 * time.Second

	// maxPending bounds the handshakes in progress, and with them what strangers can make the node hold (about 20 KiB
	// each). One more connection drops the oldest: silent strangers then cannot keep members out, as a member needs
	// its place for milliseconds only.
	maxPending = 128

	// maxQueued bounds the members' connections that passed the handshake and that the program has not accepted yet.
	maxQueued = 128

	// acceptRetry is the pause after accept failed for want of descriptors or memory; closing connections is what helps.
	acceptRetry = 50 * time.Millisecond

	// anyPortTries is how often a port that the kernel chose for TCP may turn out to be taken for UDP.
	anyPortTries = 16
)

// Listener is a node's one port. It performs handshakes side by side, drops whoever is not a member, and hands each
// connection to the net.Listener of the protocol it negotiated. Connections that it hands out are *tls.Conn with the
// handshake done and belong to whoever accepted them. The UDP port of the same number is the node's, too: see Packets.
type Listener struct {
	tcp    net.Listener
	udp    net.PacketConn
	config *tls.Config
	swarm  *protoListener
	http   *protoListener
	gossip *protoListener

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	wg   sync.WaitGroup // the accept loop and handshakes

	mu      sync.Mutex
	pending []net.Conn // handshakes in progress, oldest first; guarded by mu
}

// Listen opens the node's port on addr: a host or IP address ("" and "0.0.0.0", "[::]" for all), which may carry a port
// that then counts instead of ports. Of ports, the first that is free, for TCP and for UDP, is taken.
func Listen(addr string, ports PortRange, id *Identity) (*Listener, error) {
	host := addr
	if h, p, err := net.SplitHostPort(addr); err == nil {
		if ports, err = ParsePortRange(p); err != nil {
			return nil, err
		}
		host = h
	} else if len(addr) > 2 && addr[0] == '[' && addr[len(addr)-1] == ']' {
		host = addr[1 : len(addr)-1]
	}
	tcp, udp, err := listenBoth(host, ports)
	if err != nil {
		return nil, err
	}
	l := &Listener{tcp: tcp, udp: udp, config: id.Server(ProtoSwarm, ProtoGossip, ProtoHTTP, ProtoHTTP1)}
	l.swarm = newProtoListener(tcp.Addr())
	l.http = newProtoListener(tcp.Addr())
	l.gossip = newProtoListener(tcp.Addr())
	l.ctx, l.stop = context.WithCancel(context.Background())
	l.wg.Add(1)
	go l.accept()
	return l, nil
}

// listenBoth opens the first of ports that is free for TCP and for UDP.
func listenBoth(host string, ports PortRange) (net.Listener, net.PacketConn, error) {
	family := ""
	if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
		family = "4" // else Go takes 0.0.0.0 for "IPv6, too"
	}
	tries := 1
	if ports == (PortRange{}) {
		tries = anyPortTries
	}
	for port := int(ports.First); port <= int(ports.Last); port++ {
		for range tries {
			tcp, err := net.Listen("tcp"+family, net.JoinHostPort(host, strconv.Itoa(port)))
			if errors.Is(err, syscall.EADDRINUSE) {
				break
			}
			if err != nil {
				return nil, nil, fmt.Errorf("cannot listen for peers: %w", err)
			}
			udp, err := net.ListenPacket("udp"+family, tcp.Addr().String())
			if err == nil {
				return tcp, udp, nil
			}
			tcp.Close()
			if !errors.Is(err, syscall.EADDRINUSE) {
				return nil, nil, fmt.Errorf("cannot listen for peers: %w", err)
			}
		}
	}
	return nil, nil, fmt.Errorf("cannot listen for peers: no port of %v is free on %q for TCP and UDP; choose another range, or 0 for any port: %w",
		ports, host, syscall.EADDRINUSE)
}

// Addr is the address listened on; its IP is unspecified (0.0.0.0, ::) when that was asked for.
func (l *Listener) Addr() netip.AddrPort {
	ap := l.tcp.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// Swarm yields the connections that speak ProtoSwarm. Closing it drops those, and leaves HTTP alone.
func (l *Listener) Swarm() net.Listener { return l.swarm }

// HTTP yields the connections that speak HTTP/2 or HTTP/1.1, ready for http.Server.Serve.
func (l *Listener) HTTP() net.Listener { return l.http }

// Gossip yields the connections that speak ProtoGossip.
func (l *Listener) Gossip() net.Listener { return l.gossip }

// Packets is the UDP socket on the port number of Addr. Unlike connections, packets arrive as anybody sent them: whoever
// reads them has to check them. The reader may close it; Close does in any case. A nil Listener has none.
func (l *Listener) Packets() net.PacketConn {
	if l == nil {
		return nil
	}
	return l.udp
}

// Close stops listening, ends handshakes in progress, closes connections that nobody accepted, and waits for all that
// it started. It can be called more than once.
func (l *Listener) Close() error {
	l.stop()
	err := l.tcp.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	l.wg.Wait()
	l.swarm.Close()
	l.http.Close()
	l.gossip.Close()
	if e := l.udp.Close(); err == nil && !errors.Is(e, net.ErrClosed) {
		err = e
	}
	return err
}

func (l *Listener) accept() {
	defer l.wg.Done()
	for {
		c, err := l.tcp.Accept()
		if err == nil {
			l.admit(c)
			l.wg.Add(1)
			go l.handshake(c)
			continue
		}
		if l.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		select {
		case <-l.ctx.Done():
			return
		case <-time.After(acceptRetry):
		}
	}
}

// admit gives c a place among the pending handshakes, if need be that of the oldest.
func (l *Listener) admit(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending) >= maxPending {
		l.pending[0].Close() // its handshake fails and leaves
		l.pending = l.pending[1:]
	}
	l.pending = append(l.pending, c)
}

// leave ends c's time as a pending handshake.
func (l *Listener) leave(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, p := range l.pending {
		if p == c {
			l.pending = append(l.pending[:i], l.pending[i+1:]...)
			return
		}
	}
}

// handshake makes c prove itself and hands it on; whatever goes wrong, c is closed.
func (l *Listener) handshake(c net.Conn) {
	defer l.wg.Done()
	defer l.leave(c)
	ctx, cancel := context.WithTimeout(l.ctx, handshakeTimeout)
	defer cancel()
	tc := tls.Server(c, l.config)
	if err := tc.HandshakeContext(ctx); err != nil {
		c.Close() // not tc: no alert is owed, and writing one could block
		return
	}
	switch tc.ConnectionState().NegotiatedProtocol {
	case ProtoSwarm:
		l.swarm.put(tc)
	case ProtoHTTP, ProtoHTTP1:
		l.http.put(tc)
	case ProtoGossip:
		l.gossip.put(tc)
	default:
		c.Close()
	}
}

// protoListener is the net.Listener of one protocol, fed by a Listener.
type protoListener struct {
	addr  net.Addr
	conns chan net.Conn

	mu     sync.Mutex
	closed chan struct{} // closed, under mu, by Close
}

func newProtoListener(addr net.Addr) *protoListener {
	return &protoListener{addr: addr, conns: make(chan net.Conn, maxQueued), closed: make(chan struct{})}
}

// put queues c, or closes it when nobody will accept it.
func (p *protoListener) put(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.closed:
		c.Close()
		return
	default:
	}
	select {
	case p.conns <- c:
	default:
		c.Close()
	}
}

func (p *protoListener) Accept() (net.Conn, error) {
	select {
	case <-p.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *protoListener) Addr() net.Addr { return p.addr }

func (p *protoListener) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.closed:
		return nil
	default:
	}
	close(p.closed)
	for {
		select {
		case c := <-p.conns:
			c.Close()
		default:
			return nil
		}
	}
}
