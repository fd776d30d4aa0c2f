package gossip

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// packetSize is what memberlist puts into one packet, in bytes: with the seal and the headers of IPv6 and UDP it fills
	// 1280 bytes, which every network carries (RFC 8200 §5), also one inside a tunnel.
	packetSize = 1280 - 40 - 8 - sealOverhead
	// maxPacket is the largest packet that is read; longer ones are cut and so refused.
	maxPacket = 2048
	// packetQueue bounds the packets that memberlist has not taken yet. It takes them in microseconds.
	packetQueue = 256
	// maxStreams bounds the streams of others in progress, maxStreamsPer those of one of them. A stream takes milliseconds;
	// one that is refused is tried again.
	maxStreams    = 96
	maxStreamsPer = 8
	// packetRetry is the pause after reading packets failed for another reason than the end.
	packetRetry = 50 * time.Millisecond
)

var (
	errClosed  = errors.New("membership has ended")
	errNoRoute = errors.New("no address is known of that node")
)

// transport carries memberlist's packets and streams by node ID.
type transport struct {
	id      *trust.Identity
	self    nodeID
	streams net.Listener
	packets net.PacketConn
	tls     *tls.Config
	sealer  *sealer
	opener  *opener
	log     *slog.Logger

	dialTCP func(context.Context, netip.AddrPort) (net.Conn, error)
	// route tells where a member is.
	route func(name string) (netip.AddrPort, bool)
	// local is told the local end of every stream before the stream is used.
	local func(netip.Addr)

	packetCh chan *memberlist.Packet
	streamCh chan net.Conn
	ctx      context.Context
	stop     context.CancelFunc
	wg       sync.WaitGroup
	held     atomic.Int64 // bytes of the open streams of others

	mu       sync.Mutex // guards following
	open     map[*stream]struct{}
	inbound  map[string]int     // open streams of others, by node
	prepared map[string]*stream // dialled for memberlist, by node
}

var _ memberlist.NodeAwareTransport = (*transport)(nil)

// start begins to take packets and streams; memberlist must be there by then.
func (t *transport) start() {
	t.wg.Go(t.readPackets)
	t.wg.Go(t.accept)
}

// FinalAdvertiseAddr is the node's overlay address.
func (t *transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.self.overlay(), overlayPort, nil
}

func (t *transport) PacketCh() <-chan *memberlist.Packet { return t.packetCh }
func (t *transport) StreamCh() <-chan net.Conn           { return t.streamCh }

// WriteTo and DialTimeout are never called: memberlist knows the name of everybody it speaks to.
func (t *transport) WriteTo([]byte, string) (time.Time, error) { return time.Time{}, errNoRoute }

func (t *transport) DialTimeout(string, time.Duration) (net.Conn, error) { return nil, errNoRoute }

// WriteToAddress seals and sends a packet.
func (t *transport) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	id, err := parseID(a.Name)
	if err != nil {
		return time.Time{}, err
	}
	to, ok := t.route(a.Name)
	if !ok {
		// It asks and is not, or no longer, on the list here: the answer is what brings it back.
		if to, ok = t.opener.last(id); !ok {
			return time.Time{}, errNoRoute
		}
	}
	_, err = t.packets.WriteTo(t.sealer.seal(id, b), net.UDPAddrFromAddrPort(to))
	return time.Now(), err
}

func (t *transport) readPackets() {
	buf := make([]byte, maxPacket)
	for {
		n, from, err := t.packets.ReadFrom(buf)
		if t.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			select {
			case <-t.ctx.Done():
				return
			case <-time.After(packetRetry):
			}
			continue
		}
		now := time.Now()
		addr, ok := from.(*net.UDPAddr)
		if !ok {
			continue
		}
		ap := addr.AddrPort()
		msg, ok := t.opener.open(buf[:n], netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
		if !ok || !plainPacket(msg) {
			continue
		}
		select {
		case t.packetCh <- &memberlist.Packet{Buf: msg, From: from, Timestamp: now}:
		default: // as lost as on the network
		}
	}
}

// DialAddressTimeout opens a stream to a member, or returns the one that join opened.
func (t *transport) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	t.mu.Lock()
	s := t.prepared[a.Name]
	delete(t.prepared, a.Name)
	t.mu.Unlock()
	if s != nil {
		return s, nil
	}
	to, ok := t.route(a.Name)
	if !ok {
		return nil, errNoRoute
	}
	ctx, cancel := context.WithTimeout(t.ctx, min(timeout, dialTimeout))
	defer cancel()
	s, err := t.dial(ctx, to)
	if err != nil {
		return nil, err
	}
	if s.peer != a.Name {
		s.Close()
		return nil, fmt.Errorf("another node, %s, answers at %s", s.peer, to)
	}
	return s, nil
}

// dial opens a stream to whichever member is at an address. The error satisfies trust.Foreign when it is not a member.
func (t *transport) dial(ctx context.Context, to netip.AddrPort) (*stream, error) {
	raw, err := t.dialTCP(ctx, to)
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, t.tls)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	peer, err := trust.PeerID(c.ConnectionState())
	if err != nil {
		raw.Close()
		return nil, err
	}
	s := &stream{Conn: c, peer: peer, answer: true}
	s.done = func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.open, s)
	}
	t.mu.Lock()
	if t.ctx.Err() != nil {
		t.mu.Unlock()
		raw.Close()
		return nil, errClosed
	}
	t.open[s] = struct{}{}
	t.mu.Unlock()
	t.sawLocal(raw)
	return s, nil
}

// prepare keeps a dialled stream for memberlist's next dial of that node; false when one waits already.
func (t *transport) prepare(s *stream) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.prepared[s.peer] != nil {
		return false
	}
	t.prepared[s.peer] = s
	return true
}

// unprepare takes back what memberlist did not take.
func (t *transport) unprepare(s *stream) {
	t.mu.Lock()
	if t.prepared[s.peer] == s {
		delete(t.prepared, s.peer)
	}
	t.mu.Unlock()
	s.Close()
}

func (t *transport) sawLocal(c net.Conn) {
	if a, ok := c.LocalAddr().(*net.TCPAddr); ok {
		t.local(a.AddrPort().Addr().Unmap())
	}
}

// accept hands the streams of others to memberlist.
func (t *transport) accept() {
	for {
		c, err := t.streams.Accept()
		if err != nil {
			if t.ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				t.log.Error("no more membership streams are accepted", "err", err)
			}
			return
		}
		s := t.admit(c)
		if s == nil {
			c.Close()
			continue
		}
		t.sawLocal(c)
		select {
		case t.streamCh <- s:
		case <-t.ctx.Done():
			s.Close()
			return
		}
	}
}

// admit makes a stream of an accepted connection; nil when there are too many or it is not a member's.
func (t *transport) admit(c net.Conn) *stream {
	tc, ok := c.(*tls.Conn)
	if !ok {
		return nil
	}
	peer, err := trust.PeerID(tc.ConnectionState())
	if err != nil {
		return nil
	}
	s := &stream{Conn: c, peer: peer, total: &t.held}
	s.done = func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.open, s)
		if t.inbound[peer]--; t.inbound[peer] == 0 {
			delete(t.inbound, peer)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ctx.Err() != nil || len(t.open) >= maxStreams || t.inbound[peer] >= maxStreamsPer {
		return nil
	}
	t.open[s] = struct{}{}
	t.inbound[peer]++
	return s
}

// Shutdown ends all streams and waits for what start began.
func (t *transport) Shutdown() error {
	t.stop()
	t.streams.Close()
	t.packets.Close()
	t.mu.Lock()
	open := make([]*stream, 0, len(t.open))
	for s := range t.open {
		open = append(open, s)
	}
	t.mu.Unlock()
	for _, s := range open {
		s.Close()
	}
	t.wg.Wait()
	return nil
}
