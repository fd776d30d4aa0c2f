package open

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent"
	pp "github.com/anacrolix/torrent/peer_protocol"
)

// Nodes that know only one DHT node find each other's public torrents by it, and never a private one.
func TestDHT(t *testing.T) {
	t.Parallel()
	first := newSwarm(t, Options{Public: true, DHTNodes: []string{}})
	nodes := []string{first.ln.Addr().String()}
	open, secret := newLayer(1<<20, 60), newLayer(1<<20, 61)
	po, ps := open.torrent(t, 64<<10, false), secret.torrent(t, 64<<10, true)

	seeder := newSwarm(t, Options{Public: true, DHTNodes: nodes, Seed: true})
	add(t, seeder, po, newMemory(open).fill())
	add(t, seeder, ps, newMemory(secret).fill())
	// It has announced itself when the first node says so to whoever asks.
	leecher := newSwarm(t, Options{Public: true, DHTNodes: nodes})
	mo, ms := newMemory(open), newMemory(secret)
	to, tp := add(t, leecher, po, mo), add(t, leecher, ps, ms)
	wantAll(to)
	wantAll(tp)
	wait(t, "the public one, by DHT", func() bool {
		if mo.complete() {
			return true
		}
		leecher.dht.announce(to) // not in a quarter of an hour
		time.Sleep(200 * time.Millisecond)
		return false
	})
	mo.check(t)
	// Even when a node of the DHT says where a private torrent is to be had.
	leecher.dht.heard(ps.InfoHash, addrOf(seeder)[0].Addr().AsSlice(), int(addrOf(seeder)[0].Port()), true)
	never(t, "a private torrent is found", time.Second, func() bool { return tp.Stats().Peers > 0 || tp.book.len() > 0 })
	// And a node that is not public takes no part at all.
	if quiet := newSwarm(t, Options{}); quiet.dht != nil || len(quiet.lib.DhtServers()) > 0 {
		t.Error("a DHT node that nobody asked for")
	}
}

// Two nodes that know only a third learn of each other from it, in a public swarm, and only there.
func TestPeerExchange(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name            string
		public, private bool
		meet            bool
	}{
		{"public node, public torrent", true, false, true},
		{"public node, private torrent", true, true, false},
		{"closed node, public torrent", false, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newLayer(2<<20, 62)
			p := l.torrent(t, 64<<10, c.private)
			o := Options{Public: c.public, DHTNodes: []string{}, Seed: true}
			hub, a, b := newSwarm(t, o), newSwarm(t, o), newSwarm(t, o)
			th := add(t, hub, p, newMemory(l).fill(0))
			ta, tb := add(t, a, p, newMemory(l).fill(1)), add(t, b, p, newMemory(l).fill(2))
			// The hub calls: then it knows under which ports they are reached.
			th.AddPeers(addrOf(a))
			th.AddPeers(addrOf(b))
			wait(t, "the hub has two peers", func() bool { return th.Stats().Peers == 2 })
			met := func() bool { return ta.Stats().Peers == 2 && tb.Stats().Peers == 2 }
			if c.meet {
				wait(t, "they meet", met)
			} else {
				never(t, "they meet", 2*time.Second, met)
			}
		})
	}
}

// What other clients see of us: peer exchange is offered for public torrents of a public node only, hole punching never.
func TestExtensionsOffered(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ public, private, pex bool }{{true, false, true}, {true, true, false}, {false, false, false}, {false, true, false}} {
		l := newLayer(1<<20, 63)
		p := l.torrent(t, 64<<10, c.private)
		s := newSwarm(t, Options{Public: c.public, DHTNodes: []string{}, Seed: true})
		add(t, s, p, newMemory(l).fill())
		heard := make(chan pp.ExtendedHandshakeMessage, 1)
		cl := stranger(t, func(c *torrent.ClientConfig) {
			c.Callbacks.ReadExtendedHandshake = func(pc *torrent.PeerConn, m *pp.ExtendedHandshakeMessage) {
				if pc.PeerExtensionBytes.SupportsDHT() {
					t.Error("the library's DHT is offered")
				}
				select {
				case heard <- *m:
				default:
				}
			}
		})
		to := addToStranger(t, cl, p, make([]byte, len(l.data)), false)
		to.DownloadAll()
		to.AddPeers(peerInfos(addrOf(s)))
		select {
		case m := <-heard:
			if _, pex := m.M[pp.ExtensionNamePex]; pex != c.pex {
				t.Errorf("public %v, private %v: peer exchange offered: %v", c.public, c.private, pex)
			}
			if _, ok := m.M["ut_holepunch"]; ok {
				t.Error("hole punching is offered")
			}
			if m.V != agent {
				t.Errorf("we call ourselves %q", m.V)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("no extended handshake")
		}
	}
}

// A magnet link is enough for other clients: we hand out the info dictionary.
func TestMagnet(t *testing.T) {
	t.Parallel()
	l := newLayer(1<<20, 64)
	p := l.torrent(t, 64<<10, false)
	s := newSwarm(t, Options{Seed: true})
	add(t, s, p, newMemory(l).fill())
	cl := stranger(t)
	to, _ := cl.AddTorrentOpt(torrent.AddTorrentOpts{InfoHash: p.InfoHash, Storage: &content{
		data: make([]byte, len(l.data)), length: p.Info.PieceLength, have: make([]atomic.Bool, p.Info.NumPieces()),
	}})
	to.AddPeers(peerInfos(addrOf(s)))
	wait(t, "the info dictionary", func() bool { return to.Info() != nil })
}
