package gossip

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// How memberlist is set up. A member that dies in a cluster of up to ten is asked within 1.2 s on average by one of the
// others, suspected 0.6 s later, and dropped after another 2.4 s (4 · log10(members), at least 1, · 0.6 s): 3 to 5 s. A node
// sends and receives two packets each 0.6 s when nothing happens.
const (
	probeEvery = 600 * time.Millisecond
	// probeWait is how long a ping may take before others and a stream are tried as well. It is that long because a link
	// that a blob is being sent over can hold a packet up for 100 ms and more.
	probeWait = 300 * time.Millisecond
	// suspicionMult gives a suspected member the time to object; with less, a node that was busy for two seconds is dropped.
	suspicionMult = 4
	// suspicionMax is by how much that time is longer while nobody else has found the member silent.
	suspicionMax = 2
	// gossipEvery and gossipTo are how often news are sent, and to how many: to all of ten members in 0.3 s.
	gossipEvery = 100 * time.Millisecond
	gossipTo    = 3
	// pushPullEvery is how often a node compares its whole list with another's; memberlist makes it rarer above 32 members
	// (1,000: every 90 s, 300 KB).
	pushPullEvery = 15 * time.Second
	// deadFor is how long a dead member is told that it is taken for dead, so that it can object.
	deadFor = 30 * time.Second
	// streamTime bounds a stream of memberlist's.
	streamTime = 5 * time.Second
	// leaveTime bounds the goodbye.
	leaveTime = 500 * time.Millisecond
)

// Options says who this node is and whom it looks for. Identity, Key, Streams and Packets are required.
type Options struct {
	Identity *trust.Identity
	// Key is the cluster's: trust.Secret.GossipKey.
	Key []byte
	// Streams yields connections of members that speak trust.ProtoGossip (trust.Listener.Gossip), Packets is the UDP socket
	// on the same port number (trust.Listener.Packets). Start owns both, and closes them also when it fails.
	Streams net.Listener
	Packets net.PacketConn
	// Advertise is where others reach this node, for TLS and UDP. The zero value finds it out.
	Advertise netip.AddrPort
	// Self is what this node says of itself; ID and Addr are not taken from it.
	Self Node
	// Peers are addresses of members, host:port. A DNS name stands for all its addresses, now and later.
	Peers []string
	// DefaultPort is for peers that name none; 0 makes the port necessary.
	DefaultPort uint16
	// LocalDiscovery announces the node on its networks (BEP 14) and dials whoever announces itself as one of this cluster.
	LocalDiscovery bool
	// OnMessage receives what members broadcast, one at a time; b is its own. While it does not return, messages are lost.
	OnMessage func(from string, b []byte)
	Log       *slog.Logger

	hooks hooks
}

// hooks are what tests replace.
type hooks struct {
	dial        func(context.Context, netip.AddrPort) (net.Conn, error)
	mine        func(netip.Addr) bool
	lookup      func(ctx context.Context, host string) ([]netip.Addr, error)
	lookupEvery time.Duration
	multicast   func() (multicast, error)
	tune        func(*memberlist.Config)
}

// Gossip is this node's membership. It is safe for concurrent use.
type Gossip struct {
	o         Options
	log       *slog.Logger
	self      *self
	members   *members
	transport *transport
	list      *memberlist.Memberlist
	peers     *peers
	casts     *casts

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	closing sync.Once

	announcing sync.Mutex // memberlist takes one change of this node's entry at a time; guards following
	left       bool
}

// Start makes the node a member and begins to look for others; it does not wait for them. ctx is not kept. The error says
// which option is wrong.
func Start(ctx context.Context, o Options) (_ *Gossip, err error) {
	defer func() {
		if err != nil {
			for _, c := range []interface{ Close() error }{o.Streams, o.Packets} {
				if c != nil {
					c.Close()
				}
			}
		}
	}()
	if o.Identity == nil || o.Streams == nil || o.Packets == nil {
		return nil, errors.New("gossip: no identity, streams or packets")
	}
	if len(o.Key) != 32 {
		return nil, fmt.Errorf("gossip: a key of %d bytes, not 32", len(o.Key))
	}
	if err := CheckZone(o.Self.Zone); err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.hooks.defaults()
	id, err := parseID(o.Identity.ID())
	if err != nil {
		return nil, err
	}
	g := &Gossip{o: o, log: o.Log}
	if g.self, err = newSelf(o); err != nil {
		return nil, err
	}
	g.self.changed = g.announce
	g.members = newMembers(id.String(), o.Log)
	g.members.own = g.self.addr
	g.members.joined = func() { g.peers.poke() }
	g.members.lost = func(n Node) { g.peers.remember(n) }
	g.ctx, g.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err != nil {
			g.cancel()
			if g.transport != nil {
				g.transport.stop()
			}
		}
	}()
	g.transport = &transport{
		id: o.Identity, self: id, streams: o.Streams, packets: o.Packets,
		tls: o.Identity.Client(trust.ProtoGossip), sealer: newSealer(o.Key, id), opener: newOpener(o.Key, id), log: o.Log,
		dialTCP: o.hooks.dial, route: g.members.route, local: g.self.learn,
		packetCh: make(chan *memberlist.Packet, packetQueue), streamCh: make(chan net.Conn),
		open: map[*stream]struct{}{}, inbound: map[string]int{}, prepared: map[string]*stream{},
	}
	g.transport.ctx, g.transport.stop = context.WithCancel(context.WithoutCancel(ctx)) // lives through the goodbye
	if g.peers, err = newPeers(g); err != nil {
		return nil, err
	}
	g.casts = newCasts(g)
	if g.list, err = memberlist.Create(g.config()); err != nil {
		return nil, fmt.Errorf("gossip: %w", err)
	}
	g.transport.start()
	g.wg.Go(func() { g.casts.deliver(g.ctx) })
	g.wg.Go(func() { g.peers.run(g.ctx) })
	if o.LocalDiscovery {
		g.wg.Go(func() { g.discover(g.ctx) })
	}
	return g, nil
}

func (h *hooks) defaults() {
	if h.dial == nil {
		d := &net.Dialer{Timeout: dialTimeout}
		h.dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", a.String())
		}
	}
	if h.mine == nil {
		h.mine = machineHas
	}
	if h.lookup == nil {
		h.lookup = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if h.lookupEvery == 0 {
		h.lookupEvery = lookupEvery
	}
	if h.multicast == nil {
		h.multicast = openMulticast
	}
}

// newSelf finds the address that is known from the start: the one given, or the one listened on.
func newSelf(o Options) (*self, error) {
	port, ok := o.Packets.LocalAddr().(*net.UDPAddr)
	if !ok {
		return nil, fmt.Errorf("gossip: packets at %v, which is no UDP address", o.Packets.LocalAddr())
	}
	s := &self{id: o.Identity, port: uint16(port.Port), mine: o.hooks.mine}
	s.node = Node{ID: o.Identity.ID(), Zone: o.Self.Zone, Ephemeral: o.Self.Ephemeral, Origin: o.Self.Origin}
	a := netip.AddrPortFrom(port.AddrPort().Addr().Unmap(), s.port)
	if o.Advertise.IsValid() {
		a = netip.AddrPortFrom(o.Advertise.Addr().Unmap(), o.Advertise.Port())
	}
	if !a.Addr().IsUnspecified() || o.Advertise.IsValid() {
		if err := checkAddr(a, netip.Addr{}); err != nil {
			return nil, fmt.Errorf("other nodes cannot reach this one at %s: %w", a, err)
		}
		s.fixed, s.node.Addr = true, a
	}
	s.signLocked()
	return s, nil
}

// config is memberlist's configuration. Its own encryption is off: the transport seals every packet, and streams are TLS.
func (g *Gossip) config() *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name = g.transport.self.String()
	c.Transport = g.transport
	c.Delegate, c.Events, c.Alive = (*delegate)(g), g.members, g.members
	c.RequireNodeNames = true
	c.BindPort, c.AdvertisePort = overlayPort, overlayPort
	c.EnableCompression = false // entries are mostly keys and signatures
	c.UDPBufferSize = packetSize
	c.TCPTimeout = streamTime
	c.ProbeInterval, c.ProbeTimeout = probeEvery, probeWait
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = suspicionMult, suspicionMax
	// A probe never lasts longer than probeEvery, so that little outlives Close. The price is that an overloaded node takes
	// others for silent as soon as any other would.
	c.AwarenessMaxMultiplier = 1
	c.GossipInterval, c.GossipNodes, c.GossipToTheDeadTime = gossipEvery, gossipTo, deadFor
	c.PushPullInterval = pushPullEvery
	c.Logger = log.New(logWriter{g.log}, "", 0)
	if g.o.hooks.tune != nil {
		g.o.hooks.tune(c)
	}
	return c
}

// announce makes memberlist tell the members what this node says of itself now.
func (g *Gossip) announce() {
	g.announcing.Lock()
	defer g.announcing.Unlock()
	if g.left {
		return
	}
	if err := g.list.UpdateNode(announceWait); err != nil {
		g.log.Debug("announced later", "err", err)
	}
}

// Ready waits until every configured peer was tried, a few times if none answers, or until ctx ends.
func (g *Gossip) Ready(ctx context.Context) {
	select {
	case <-g.peers.ready:
	case <-ctx.Done():
	case <-g.ctx.Done():
	}
}

// Self is what this node says of itself. Its address is invalid as long as it has spoken to nobody and was given none.
func (g *Gossip) Self() Node { return g.self.get() }

// Members is the other live members in the order of their IDs. It must not be changed; it costs nothing while nothing
// changes.
func (g *Gossip) Members() []Node { return g.members.list() }

// Changed is closed at the next change of Members: take it first, then read Members.
func (g *Gossip) Changed() <-chan struct{} { return g.members.change() }

// SetOrigin says whether this node can reach registries.
func (g *Gossip) SetOrigin(ok bool) {
	g.self.update(func(n *Node) bool {
		was := n.Origin
		n.Origin = ok
		return was != ok
	})
}

// Silent is those of the configured peers, as they were given, that did not answer when they were tried last, and why:
// trust.Foreign tells those of another cluster.
func (g *Gossip) Silent() map[string]error { return g.peers.silent() }

// Close says goodbye, which takes half a second at most, and ends what Start began. A ping of memberlist's that is waiting for
// its answer stays for up to 0.6 s more and does nothing then.
func (g *Gossip) Close() error {
	var err error
	g.closing.Do(func() {
		g.cancel()
		g.announcing.Lock()
		g.left = true
		g.announcing.Unlock()
		if e := g.list.Leave(leaveTime); e != nil {
			g.log.Debug("left without being heard by all", "err", e)
		}
		err = g.list.Shutdown() // ends the streams that the loops may wait for
		g.wg.Wait()
	})
	return err
}

// delegate is Gossip as memberlist sees it.
type delegate Gossip

var _ memberlist.Delegate = (*delegate)(nil)

func (d *delegate) NodeMeta(int) []byte { return d.self.text() }

func (d *delegate) NotifyMsg(b []byte) { d.casts.receive(b) }

func (d *delegate) GetBroadcasts(overhead, limit int) [][]byte {
	return d.casts.queue.GetBroadcasts(overhead, limit)
}

// There is no state beyond the list.
func (d *delegate) LocalState(bool) []byte        { return nil }
func (d *delegate) MergeRemoteState([]byte, bool) {}

// logWriter takes memberlist's log, a line a Write.
type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(b []byte) (int, error) {
	if w.log.Enabled(context.Background(), slog.LevelDebug) {
		line := strings.TrimSpace(string(b))
		line = strings.Replace(line, "memberlist: ", "", 1)
		w.log.Debug(line)
	}
	return len(b), nil
}
