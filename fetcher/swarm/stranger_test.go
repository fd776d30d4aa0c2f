package swarm

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/anacrolix/torrent/storage"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// stranger is an ordinary BitTorrent client (the same library, as it comes), which knows the infohash and the whole info
// dictionary of a blob, and dials as it is told.
func stranger(t *testing.T, dial func(context.Context, string) (net.Conn, error)) *torrent.Client {
	t.Helper()
	c := torrent.NewDefaultClientConfig()
	c.DefaultStorage = noStorage{}
	c.NoDHT, c.DisableTrackers, c.DisableUTP, c.NoDefaultPortForwarding, c.DisableIPv6 = true, true, true, true, true
	c.DisableWebtorrent = true
	c.ListenHost = func(string) string { return "127.0.0.1" }
	c.ListenPort = 0
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 0)
	c.DialForPeerConns, c.Seed = dial == nil, true
	c.Slogger = noLog()
	cl, err := torrent.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	if dial != nil {
		cl.AddDialer(dialFunc(dial))
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

type dialFunc func(context.Context, string) (net.Conn, error)

func (dialFunc) DialerNetwork() string { return "tcp" }
func (f dialFunc) Dial(ctx context.Context, addr string) (net.Conn, error) {
	return f(ctx, addr)
}

// pretend is the storage of a stranger: it has all of a blob or nothing, and counts what is read and written.
type pretend struct {
	whole         bool
	read, written atomic.Int64
}

func (p *pretend) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(metainfo.Piece) storage.PieceImpl { return p },
		Close: func() error { return nil },
	}, nil
}

func (p *pretend) Completion() storage.Completion {
	return storage.Completion{Ok: true, Complete: p.whole}
}
func (p *pretend) ReadAt(b []byte, _ int64) (int, error) {
	p.read.Add(int64(len(b)))
	return len(b), nil
}
func (p *pretend) WriteAt(b []byte, _ int64) (int, error) {
	p.written.Add(int64(len(b)))
	return len(b), nil
}
func (p *pretend) MarkComplete() error    { return nil }
func (p *pretend) MarkNotComplete() error { return nil }

// addBlob gives a stranger the blob; it wants what it has not.
func addBlob(t *testing.T, cl *torrent.Client, b blob, st *pretend) *torrent.Torrent {
	t.Helper()
	to, _ := cl.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash: Infohash(b.digest, b.size, pieceSize), InfoBytes: infoBytes(b.digest, b.size, pieceSize), Storage: st, DisableInitialPieceCheck: true,
	})
	if to.Info() == nil {
		t.Fatal("the stranger does not take the info dictionary")
	}
	to.DownloadAll()
	return to
}

// Who is outside the cluster hears nothing, whatever it knows and however it comes.
func TestStrangersHearNothing(t *testing.T) {
	t.Parallel()
	b := newBlob("strangers", 4)
	foreign, err := trust.NewSecret().Identity()
	if err != nil {
		t.Fatal(err)
	}
	over := func(c *tls.Config) func(context.Context, string) (net.Conn, error) {
		return func(ctx context.Context, addr string) (net.Conn, error) {
			return (&tls.Dialer{Config: c}).DialContext(ctx, "tcp", addr)
		}
	}
	trusting := foreign.Client(trust.ProtoSwarm) // shows its own certificate, takes any
	trusting.InsecureSkipVerify, trusting.VerifyConnection = true, nil
	for _, c := range []struct {
		name string
		dial func(context.Context, string) (net.Conn, error)
	}{
		{"plain BitTorrent over TCP", nil},
		{"TLS without a certificate", over(&tls.Config{InsecureSkipVerify: true, NextProtos: []string{trust.ProtoSwarm}})},
		{"a member of another cluster", over(foreign.Client(trust.ProtoSwarm))},
		{"a member of another cluster that checks nothing", over(trusting)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			seeder := newNode(t)
			ts := seeder.add(t, b, all)
			cl := stranger(t, c.dial)
			to := addBlob(t, cl, b, &pretend{})
			// It tries again and again, for a second.
			never(t, "a stranger is connected or hears something", time.Second, func() bool {
				to.AddPeers([]torrent.PeerInfo{{Addr: net.TCPAddrFromAddrPort(seeder.addr), Trusted: true}})
				st := to.Stats()
				return st.BytesRead.Int64() != 0 || ts.Connections() != 0
			})
			// And the other way round: we do not speak to it, told its address or not.
			for _, a := range cl.ListenAddrs() {
				ap := netip.MustParseAddrPort(a.String())
				leecher := newNode(t)
				tl := leecher.add(t, b, none)
				tl.AddPeers([]netip.AddrPort{ap})
				never(t, "a stranger is taken for a peer", 500*time.Millisecond, func() bool { return tl.Connections() != 0 })
			}
		})
	}
}

// The stranger of the tests above is a peer when it holds the secret: it is only the secret that keeps it out. But a member with another
// client, which asks for pieces and gives some to whom it likes, neither gets nor brings a byte of them.
func TestMemberWithAnotherClient(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		whole  bool // it has all pieces and this node none, else the other way round
		honest bool // its peer ID is that of its certificate
	}{
		{"one that takes", false, true},
		{"one that gives", true, true},
		{"an impostor", true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBlob(c.name, 4)
			n := newNode(t)
			has, theirs := all, "----"
			if c.whole {
				has, theirs = none, "++++"
			}
			own := n.add(t, b, has) // and in the end no piece has crossed
			id, err := secret.Identity()
			if err != nil {
				t.Fatal(err)
			}
			self, err := peerIDOf(id.ID())
			if err != nil {
				t.Fatal(err)
			}
			cl := stranger(t, func(ctx context.Context, addr string) (net.Conn, error) {
				conn, err := (&tls.Dialer{Config: id.Client(trust.ProtoSwarm)}).DialContext(ctx, "tcp", addr)
				if err == nil && c.honest {
					conn = &renamed{Conn: conn, id: self}
				}
				return conn, err
			})
			st := &pretend{whole: c.whole}
			to := addBlob(t, cl, b, st)
			call := func() { to.AddPeers([]torrent.PeerInfo{{Addr: net.TCPAddrFromAddrPort(n.addr), Trusted: true}}) }
			if !c.honest {
				never(t, "an impostor is taken for a peer", 500*time.Millisecond, func() bool {
					call()
					return len(own.Peers()) != 0
				})
				return
			}
			call()
			hears(t, own, &node{id: id}, theirs)
			wait(t, "word of this node's pieces", func() bool {
				conns := to.PeerConns()
				return len(conns) == 1 && conns[0].PeerPieces().GetCardinality() == uint64(strings.Count(theirs, "-"))
			})
			// Time enough to be unchoked, to ask and to be answered.
			never(t, "a piece crosses, or the connection ends", time.Second, func() bool {
				s := to.Stats()
				return st.read.Load()+st.written.Load()+s.BytesReadData.Int64()+s.BytesWrittenData.Int64() != 0 || len(to.PeerConns()) != 1
			})
		})
	}
}

// renamed puts the right peer ID into the handshake that the library writes piece by piece.
type renamed struct {
	net.Conn
	id   torrent.PeerID
	sent int
}

func (r *renamed) Write(p []byte) (int, error) {
	q := append([]byte(nil), p...)
	for i := range q {
		if at := r.sent + i - handshakePeer; at >= 0 && at < len(r.id) {
			q[i] = r.id[at]
		}
	}
	n, err := r.Conn.Write(q)
	r.sent += n
	return n, err
}

// A member that has proved itself and then says nothing, or nonsense, is let go.
func TestMemberThatSpeaksNonsense(t *testing.T) {
	n := newNode(t)
	id, err := secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	for _, say := range []string{"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: something that is longer than a handshake\r\n\r\n",
		pp.Protocol + "12345678" + "unknown infohash...." + "-XX0000-an impostor.."} {
		c, err := tls.Dial("tcp", n.addr.String(), id.Client(trust.ProtoSwarm))
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, say)
		got, _ := io.ReadAll(c)
		if len(got) > handshakeSize {
			t.Errorf("answered %q", got)
		}
		c.Close()
	}
	wait(t, "the connections are forgotten", func() bool { return len(n.openConns()) == 0 })
}
