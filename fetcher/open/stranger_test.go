package open

import (
	"context"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/storage"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/published"
)

// stranger is an ordinary BitTorrent client: the library as it comes, on an address of its own. It knows nobody but by what is added.
func stranger(t *testing.T, options ...func(*torrent.ClientConfig)) *torrent.Client {
	t.Helper()
	c := torrent.NewDefaultClientConfig()
	host := nextAddr().String()
	c.ListenHost = func(string) string { return host }
	c.ListenPort = 0
	c.DefaultStorage = noStorage{}
	c.NoDHT, c.DisableTrackers, c.DisableUTP, c.NoDefaultPortForwarding, c.DisableIPv6, c.DisableWebtorrent = true, true, true, true, true, true
	c.DialRateLimiter = rate.NewLimiter(rate.Inf, 0)
	c.Seed = true
	c.Slogger = noLog
	for _, f := range options {
		f(c)
	}
	cl, err := torrent.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cl.Close() })
	return cl
}

func strangerAddr(t *testing.T, cl *torrent.Client) []netip.AddrPort {
	t.Helper()
	return []netip.AddrPort{netip.MustParseAddrPort(cl.ListenAddrs()[0].String())}
}

func addToStranger(t *testing.T, cl *torrent.Client, p *published.Torrent, data []byte, complete bool) *torrent.Torrent {
	t.Helper()
	st := &content{data: data, length: p.Info.PieceLength, have: make([]atomic.Bool, p.Info.NumPieces())}
	for i := range st.have {
		st.have[i].Store(complete)
	}
	to, _ := cl.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash: p.InfoHash, InfoBytes: p.MetaInfo.InfoBytes, Storage: st, DisableInitialPieceCheck: true,
	})
	if to.Info() == nil {
		t.Fatal("the stranger does not take the info dictionary")
	}
	return to
}

// content is a stranger's storage: what it serves is not checked.
type content struct {
	data   []byte
	length int64
	have   []atomic.Bool
}

func (c *content) OpenTorrent(context.Context, *metainfo.Info, metainfo.Hash) (storage.TorrentImpl, error) {
	return storage.TorrentImpl{
		Piece: func(m metainfo.Piece) storage.PieceImpl { return contentPiece{c, m.Index()} },
		Close: func() error { return nil },
	}, nil
}

type contentPiece struct {
	c *content
	i int
}

func (p contentPiece) ReadAt(b []byte, off int64) (int, error) {
	n := copy(b, p.c.data[min(int64(p.i)*p.c.length+off, int64(len(p.c.data))):])
	if n < len(b) {
		return n, io.EOF
	}
	return n, nil
}

func (p contentPiece) WriteAt(b []byte, off int64) (int, error) {
	return copy(p.c.data[int64(p.i)*p.c.length+off:], b), nil
}
func (p contentPiece) MarkComplete() error    { p.c.have[p.i].Store(true); return nil }
func (p contentPiece) MarkNotComplete() error { p.c.have[p.i].Store(false); return nil }
func (p contentPiece) Completion() storage.Completion {
	return storage.Completion{Ok: true, Complete: p.c.have[p.i].Load()}
}

func peerInfos(addrs []netip.AddrPort) (all []torrent.PeerInfo) {
	for _, a := range addrs {
		all = append(all, torrent.PeerInfo{Addr: net.TCPAddrFromAddrPort(a)})
	}
	return all
}

// An ordinary client downloads from us, and gives back.
func TestPlainClient(t *testing.T) {
	t.Parallel()
	l := newLayer(3<<20+17, 20)
	p := l.torrent(t, 64<<10, true)
	seeder := newSwarm(t, Options{Seed: true})
	add(t, seeder, p, newMemory(l).fill())
	cl := stranger(t)
	data := make([]byte, len(l.data))
	to := addToStranger(t, cl, p, data, false)
	to.DownloadAll()
	to.AddPeers(peerInfos(addrOf(seeder)))
	wait(t, "the stranger completes", func() bool { return to.BytesMissing() == 0 })

	leecher := newSwarm(t, Options{})
	m := newMemory(l)
	tl := add(t, leecher, p, m)
	tl.AddPeers(strangerAddr(t, cl))
	wantAll(tl)
	wait(t, "we complete from the stranger", m.complete)
	m.check(t)
}

// A client that sends wrong bytes is found out piece by piece, and let go; nothing of it reaches the storage.
func TestWrongPiecesAreRefused(t *testing.T) {
	t.Parallel()
	l := newLayer(4<<20, 21)
	p := l.torrent(t, 512<<10, false)
	liar := stranger(t)
	lies := make([]byte, len(l.data))
	copy(lies, l.data)
	for i := 100; i < len(lies); i += 64 << 10 {
		lies[i] ^= 1
	}
	addToStranger(t, liar, p, lies, true)
	m := newMemory(l)
	tl := add(t, newSwarm(t, Options{}), p, m)
	wantAll(tl)
	tl.AddPeers(strangerAddr(t, liar))
	wait(t, "the liar was asked and let go", func() bool { s := tl.Stats(); return s.Downloaded > 0 && s.Peers == 0 })
	tl.AddPeers(strangerAddr(t, liar))
	never(t, "the liar is back, or something of it was taken", 500*time.Millisecond, func() bool { return len(m.marked) > 0 })

	honest := newSwarm(t, Options{Seed: true})
	add(t, honest, p, newMemory(l).fill())
	tl.AddPeers(addrOf(honest))
	wait(t, "complete", m.complete)
	m.check(t)
	if s := tl.Stats(); s.Err != nil {
		t.Errorf("taken for trouble of our own: %v", s.Err)
	}
}

// Both at once: what an honest peer gives is not lost for the liar beside it.
func TestWrongPiecesAmongRightOnes(t *testing.T) {
	t.Parallel()
	l := newLayer(8<<20, 22)
	p := l.torrent(t, 64<<10, false)
	liar, honest := stranger(t), stranger(t)
	lies := make([]byte, len(l.data))
	copy(lies, l.data)
	for i := 100; i < len(lies); i += 16 << 10 {
		lies[i] ^= 1
	}
	addToStranger(t, liar, p, lies, true)
	addToStranger(t, honest, p, l.data, true)
	m := newMemory(l)
	tl := add(t, newSwarm(t, Options{}), p, m)
	tl.AddPeers(strangerAddr(t, liar))
	tl.AddPeers(strangerAddr(t, honest))
	wantAll(tl)
	wait(t, "complete", m.complete)
	m.check(t)
}

// Whoever says nothing, nonsense, or asks for what is not here, is let go and leaves nothing behind.
func TestNonsenseOnThePort(t *testing.T) {
	t.Parallel()
	s := newSwarm(t, Options{Seed: true})
	l := newLayer(1<<20, 23)
	to := add(t, s, l.torrent(t, 64<<10, false), newMemory(l).fill())
	h := to.Infohash()
	for _, say := range []string{
		"",
		"GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: something that is longer than a handshake\r\n\r\n",
		"\x13BitTorrent protocol12345678unknown infohash....-XX0000-nobody......",
		"\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x05" + string(h[:]) + "-XX0000-somebody....\xff\xff\xff\xff",
		"\x13BitTorrent protocol\x00\x00\x00\x00\x00\x10\x00\x05" + string(h[:]) + "-XX0000-somebody....\x00\x00\x00\x0d\x06\xff\xff\xff\xff\x00\x00\x00\x00\x7f\xff\xff\xff",
	} {
		c, err := net.Dial("tcp", s.ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		io.WriteString(c, say)
		c.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c)
		c.Close()
	}
	wait(t, "the connections are forgotten", func() bool { return len(s.openConns()) == 0 })
}
