package open

import (
	"context"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/anacrolix/dht/v2"
	"github.com/anacrolix/dht/v2/krpc"
	peer_store "github.com/anacrolix/dht/v2/peer-store"
	"github.com/anacrolix/log"
	"github.com/anacrolix/torrent/metainfo"
	"golang.org/x/time/rate"
)

const (
	// dhtInterval is between two announces: nodes keep a peer for half an hour (BEP 5 says tokens live ten minutes, libraries 30–45).
	dhtInterval = 15 * time.Minute
	// dhtTimeout bounds one: a traversal that has not converged by then will not.
	dhtTimeout = time.Minute
	// dhtRate bounds what this node sends as a DHT node, in packets per second: 5 % of it are enough for one that is idle.
	dhtRate = 100
	// maxSwarms and maxPerSwarm bound what it keeps for others, some 40 bytes each, and peerAge for how long: an announcer is back within
	// half of it.
	maxSwarms   = 2000
	maxPerSwarm = 50
	peerAge     = 30 * time.Minute
	// maxTraversals bounds the announces in progress over all torrents: each asks some 50 nodes.
	maxTraversals = 4
)

// dhtNode is this node in the BitTorrent DHT (BEP 5). The library's own use of it would announce private torrents' peers to us, and
// leaves goroutines behind; so it is not given to the library.
type dhtNode struct {
	s      *Swarm
	server *dht.Server
	places chan struct{} // one element per traversal in progress
}

// newDHT starts a node on conn, which it owns from then on.
func newDHT(s *Swarm, conn net.PacketConn) (*dhtNode, error) {
	d := &dhtNode{s: s, places: make(chan struct{}, maxTraversals)}
	config := dht.NewDefaultServerConfig()
	config.Conn = conn
	config.StartingNodes = d.begin
	config.OnAnnouncePeer = d.heard
	config.OnQuery = func(q *krpc.Msg, _ net.Addr) bool { return q.Q != "put" && q.Q != "get" } // BEP 44: data of others, not kept here
	config.PeerStore = &peerStore{swarms: make(map[peer_store.InfoHash]map[netip.AddrPort]time.Time)}
	config.SendLimiter = rate.NewLimiter(dhtRate, dhtRate)
	config.Logger = log.NewLogger() // of no handler: it says nothing
	config.Logger.SetHandlers(log.DiscardHandler)
	var err error
	if d.server, err = dht.NewServer(config); err != nil {
		return nil, err
	}
	s.wg.Go(d.server.TableMaintainer) // it ends with the server
	return d, nil
}

// wellKnown are the routers that most clients begin at.
var wellKnown = []string{"router.utorrent.com:6881", "router.bittorrent.com:6881", "dht.transmissionbt.com:6881", "dht.libtorrent.org:25401"}

// begin is the addresses of the nodes to begin at, when no other is known.
func (d *dhtNode) begin() (nodes []dht.Addr, err error) {
	names := d.s.o.DHTNodes
	if names == nil {
		names = wellKnown
	}
	ctx, cancel := context.WithTimeout(d.s.ctx, dhtTimeout)
	defer cancel()
	for _, name := range names {
		host, port, err := net.SplitHostPort(name)
		if err != nil {
			continue
		}
		ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		n, numErr := strconv.ParseUint(port, 10, 16)
		if err != nil || numErr != nil {
			continue
		}
		for _, ip := range ips {
			nodes = append(nodes, dht.NewAddr(net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip.Unmap(), uint16(n)))))
		}
	}
	if len(nodes) == 0 {
		// The library leaves a goroutine behind each time that there is nobody to begin at. Itself it will not take for another node.
		nodes = append(nodes, dht.NewAddr(&net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(d.s.port)}))
	}
	return nodes, nil
}

func (d *dhtNode) close() { d.server.Close() }

// peerStore is the peers that announced themselves to this node, of any torrent. It is safe for concurrent use.
type peerStore struct {
	mu     sync.Mutex // guards following
	swarms map[peer_store.InfoHash]map[netip.AddrPort]time.Time
}

var _ peer_store.Interface = (*peerStore)(nil)

func (p *peerStore) AddPeer(h peer_store.InfoHash, na krpc.NodeAddr) {
	a, ok := netip.AddrFromSlice(na.IP)
	if !ok || na.Port <= 0 || na.Port > 65535 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.swarms[h] == nil {
		if len(p.swarms) >= maxSwarms {
			p.expire()
		}
		if len(p.swarms) >= maxSwarms {
			return
		}
		p.swarms[h] = make(map[netip.AddrPort]time.Time)
	}
	ap := netip.AddrPortFrom(a.Unmap(), uint16(na.Port))
	if _, known := p.swarms[h][ap]; known || len(p.swarms[h]) < maxPerSwarm {
		p.swarms[h][ap] = time.Now()
	}
}

func (p *peerStore) GetPeers(h peer_store.InfoHash) (peers []krpc.NodeAddr) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for ap, at := range p.swarms[h] {
		if time.Since(at) > peerAge {
			delete(p.swarms[h], ap)
			continue
		}
		peers = append(peers, krpc.NodeAddr{IP: ap.Addr().AsSlice(), Port: int(ap.Port())})
	}
	return peers
}

// expire forgets the swarms of which nobody was heard for long. Needs mu.
func (p *peerStore) expire() {
	for h, peers := range p.swarms {
		for ap, at := range peers {
			if time.Since(at) > peerAge {
				delete(peers, ap)
			}
		}
		if len(peers) == 0 {
			delete(p.swarms, h)
		}
	}
}

// heard takes in a peer that announced itself to this node.
func (d *dhtNode) heard(h metainfo.Hash, ip net.IP, port int, portOk bool) {
	t := d.s.torrent(h)
	a, ok := netip.AddrFromSlice(ip)
	if t == nil || !d.s.public(t) || !ok || !portOk || port <= 0 || port > 65535 {
		return
	}
	t.found([]netip.AddrPort{netip.AddrPortFrom(a.Unmap(), uint16(port))}, false)
}

// announce tells the DHT of a public torrent's peer, us, and takes in the others, in the background.
func (d *dhtNode) announce(t *Torrent) {
	d.s.wg.Go(func() {
		select {
		case d.places <- struct{}{}:
			defer func() { <-d.places }()
		case <-t.ctx.Done():
			return
		}
		ctx, cancel := context.WithTimeout(t.ctx, dhtTimeout)
		defer cancel()
		a, err := d.server.AnnounceTraversal(t.infohash, dht.AnnouncePeer(dht.AnnouncePeerOpts{Port: int(d.s.port)}))
		if err != nil {
			d.s.log.Debug("DHT", "torrent", t.infohash, "error", err)
			return
		}
		defer a.Close()
		for {
			select {
			case values, ok := <-a.Peers:
				if !ok {
					return
				}
				var peers []netip.AddrPort
				for _, p := range values.Peers {
					if ip, ok := netip.AddrFromSlice(p.IP); ok && p.Port > 0 && p.Port <= 65535 {
						peers = append(peers, netip.AddrPortFrom(ip.Unmap(), uint16(p.Port)))
					}
				}
				t.found(peers, false)
			case <-ctx.Done():
				return
			}
		}
	})
}
