package tracker

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// bench is a tracker with a clock of its own.
type bench struct {
	*testing.T
	*Tracker
	now  time.Time
	path string // before the verb
}

func newBench(t *testing.T, o Options) *bench {
	b := &bench{T: t, now: time.Unix(1_700_000_000, 0), path: "/"}
	if o.Token != "" {
		b.path = "/" + o.Token + "/"
	}
	o.Now = func() time.Time { return b.now }
	b.Tracker = New(o)
	return b
}

// reply is an answer, as a client reads it.
type reply struct {
	Failure    string `bencode:"failure reason"`
	Complete   int    `bencode:"complete"`
	Incomplete int    `bencode:"incomplete"`
	Interval   int    `bencode:"interval"`
	Peers      string `bencode:"peers"`
	Peers6     string `bencode:"peers6"`
	Files      map[string]struct {
		Complete   int `bencode:"complete"`
		Downloaded int `bencode:"downloaded"`
		Incomplete int `bencode:"incomplete"`
	} `bencode:"files"`
}

// peers are the addresses in an answer.
func (r reply) peers(t testing.TB) map[string]bool {
	t.Helper()
	out := map[string]bool{}
	for _, part := range []struct {
		text string
		size int
	}{{r.Peers, 4}, {r.Peers6, 16}} {
		if len(part.text)%(part.size+2) != 0 {
			t.Fatalf("%d bytes of compact peers", len(part.text))
		}
		for b := []byte(part.text); len(b) > 0; b = b[part.size+2:] {
			a, _ := netip.AddrFromSlice(b[:part.size])
			out[netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[part.size:])).String()] = true
		}
	}
	return out
}

func hash(n int) metainfo.Hash { return metainfo.HashBytes(fmt.Append(nil, n)) }

// get asks as from an address, with more headers in pairs.
func (b *bench) get(from, target string, header ...string) reply {
	b.Helper()
	req := httptest.NewRequest(http.MethodGet, target, nil)
	req.RemoteAddr = netip.AddrPortFrom(netip.MustParseAddr(from), 40000).String()
	for i := 0; i < len(header); i += 2 {
		req.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	b.ServeHTTP(w, req)
	if w.Code != http.StatusOK {
		b.Fatalf("%s: status %d", target, w.Code)
	}
	var r reply
	if err := bencode.Unmarshal(w.Body.Bytes(), &r); err != nil {
		b.Fatalf("%s: %q: %v", target, w.Body, err)
	}
	return r
}

func (b *bench) announce(from string, h metainfo.Hash, port int, more ...string) reply {
	b.Helper()
	return b.get(from, b.path+"announce?"+query(h, port, more...))
}

func query(h metainfo.Hash, port int, more ...string) string {
	q := url.Values{"info_hash": {string(h[:])}, "peer_id": {"-XX0000-123456789012"}, "port": {fmt.Sprint(port)}, "left": {"1"}, "compact": {"1"}}
	for i := 0; i < len(more); i += 2 {
		q.Set(more[i], more[i+1])
	}
	return q.Encode()
}

func (b *bench) wants(r reply, peers ...string) {
	b.Helper()
	got := r.peers(b)
	ok := len(got) == len(peers) && r.Failure == ""
	for _, p := range peers {
		ok = ok && got[p]
	}
	if !ok {
		b.Errorf("got %v (failure %q), want %v", got, r.Failure, peers)
	}
}

// TestSwarm is the life of a swarm: who comes is told of the others, completes, goes.
func TestSwarm(t *testing.T) {
	b := newBench(t, Options{})
	r := b.announce("192.0.2.1", hash(1), 6881, "event", "started")
	b.wants(r)
	if r.Interval != int(lonely/time.Second) {
		t.Errorf("alone: interval %d", r.Interval)
	}
	r = b.announce("2001:db8::2", hash(1), 6882, "left", "0")
	b.wants(r, "192.0.2.1:6881")
	if r.Complete != 1 || r.Incomplete != 1 || r.Interval != int(interval/time.Second) {
		t.Errorf("%+v", r)
	}
	b.wants(b.announce("192.0.2.3", hash(1), 6881), "192.0.2.1:6881", "[2001:db8::2]:6882")
	b.wants(b.announce("192.0.2.3", hash(1), 6881, "numwant", "0"))
	b.wants(b.announce("192.0.2.3", hash(2), 6881)) // another torrent
	// A client behind ::ffff: is one of IPv4.
	b.wants(b.announce("::ffff:192.0.2.1", hash(1), 6881, "left", "0", "event", "completed"), "192.0.2.3:6881") // seeders are not told of seeders
	b.wants(b.announce("192.0.2.4", hash(1), 0), "192.0.2.1:6881", "[2001:db8::2]:6882", "192.0.2.3:6881")      // it listens to nobody

	h1, h2 := hash(1), hash(2)
	s := b.get("192.0.2.9", "/scrape?"+url.Values{"info_hash": {string(h1[:]), string(h2[:]), string(h1[:])}}.Encode())
	if f := s.Files[string(h1[:])]; f.Complete != 2 || f.Incomplete != 1 || f.Downloaded != 1 || len(s.Files) != 2 {
		t.Errorf("scrape: %+v", s.Files)
	}
	b.wants(b.announce("192.0.2.1", hash(1), 6881, "event", "stopped"))
	b.wants(b.announce("192.0.2.3", hash(1), 6881), "[2001:db8::2]:6882")

	// Who is silent for two intervals is forgotten, and with the last one the torrent.
	b.now = b.now.Add(interval + time.Second)
	b.announce("192.0.2.3", hash(1), 6881)
	b.now = b.now.Add(interval)
	b.wants(b.announce("192.0.2.5", hash(1), 6881), "192.0.2.3:6881")
	b.now = b.now.Add(expiry + time.Second)
	b.wants(b.announce("192.0.2.5", hash(3), 6881))
	if len(b.swarms.torrents) != 1 || b.swarms.recent.Len() != 1 {
		t.Errorf("%d torrents and %d listings are remembered", len(b.swarms.torrents), b.swarms.recent.Len())
	}
}

// TestForeignAddress: no parameter and no header lists another address than the connection's.
func TestForeignAddress(t *testing.T) {
	b := newBench(t, Options{})
	b.announce("192.0.2.1", hash(1), 6881, "ip", "203.0.113.7", "ipv4", "203.0.113.7", "ipv6", "2001:db8::7")
	b.get("192.0.2.2", "/announce?"+query(hash(1), 6882), "X-Forwarded-For", "203.0.113.7")
	b.get("127.0.0.1", "/announce?"+query(hash(1), 6883), "X-Forwarded-For", "203.0.113.7")
	b.wants(b.announce("192.0.2.3", hash(1), 6881), "192.0.2.1:6881", "192.0.2.2:6882") // and nothing of loopback
	b.wants(b.announce("127.0.0.2", hash(1), 6884), "192.0.2.1:6881", "192.0.2.2:6882", "192.0.2.3:6881", "127.0.0.1:6883")
	// It cannot take another's listing away either.
	b.announce("192.0.2.2", hash(1), 6881, "event", "stopped", "ip", "192.0.2.1")
	b.wants(b.announce("192.0.2.3", hash(1), 6881), "192.0.2.1:6881", "192.0.2.2:6882")
}

// TestProxied: with a proxy on this machine its word counts, and only its own.
func TestProxied(t *testing.T) {
	b := newBench(t, Options{Proxied: true})
	b.get("127.0.0.1", "/announce?"+query(hash(1), 1), "X-Forwarded-For", "203.0.113.7, 192.0.2.1")
	b.get("::1", "/announce?"+query(hash(1), 2), "X-Forwarded-For", "203.0.113.7", "X-Forwarded-For", "2001:db8::1")
	b.get("192.0.2.8", "/announce?"+query(hash(1), 3), "X-Forwarded-For", "203.0.113.7")
	b.wants(b.announce("192.0.2.9", hash(1), 4), "192.0.2.1:1", "[2001:db8::1]:2", "192.0.2.8:3")
	if r := b.get("127.0.0.1", "/announce?"+query(hash(1), 1), "X-Forwarded-For", "unknown"); !strings.Contains(r.Failure, "proxy") {
		t.Errorf("%+v", r)
	}
}

func TestToken(t *testing.T) {
	b := newBench(t, Options{Token: "s3cret"})
	b.wants(b.announce("192.0.2.1", hash(1), 6881))
	for _, path := range []string{"/announce", "/", "/s3cre/announce", "/s3crets/announce", "//announce", "/S3CRET/announce", "/s3cret/", "/x/s3cret/announce", "/scrape"} {
		r := b.get("192.0.2.2", path+"?"+query(hash(1), 6881))
		if !strings.Contains(r.Failure, "token") || r.Peers != "" || strings.Contains(r.Failure, "s3cret") {
			t.Errorf("%s: %+v", path, r)
		}
	}
	b.wants(b.announce("192.0.2.3", hash(1), 6881), "192.0.2.1:6881") // nobody else came in
}

func TestAllowed(t *testing.T) {
	b := newBench(t, Options{Allowed: []metainfo.Hash{hash(1)}})
	b.wants(b.announce("192.0.2.1", hash(1), 6881))
	if r := b.announce("192.0.2.1", hash(2), 6881); !strings.Contains(r.Failure, "not for this torrent") {
		t.Errorf("%+v", r)
	}
	h := hash(2)
	if r := b.get("192.0.2.1", "/scrape?"+url.Values{"info_hash": {string(h[:])}}.Encode()); r.Failure != "" || len(r.Files) != 0 {
		t.Errorf("scrape: %+v", r)
	}
}

// TestBounds: a flood costs its sender, not the tracker.
func TestBounds(t *testing.T) {
	t.Run("listings in all", func(t *testing.T) {
		b := newBench(t, Options{MaxPeers: 10})
		for i := range 100 {
			b.now = b.now.Add(time.Millisecond)
			b.announce(fmt.Sprintf("192.0.2.%d", i), hash(i/2), 6881)
		}
		if n := b.swarms.recent.Len(); n != 10 || len(b.swarms.torrents) != 5 {
			t.Errorf("%d listings, %d torrents", n, len(b.swarms.torrents))
		}
		b.wants(b.announce("192.0.2.200", hash(49), 1), "192.0.2.98:6881", "192.0.2.99:6881")
	})
	t.Run("the last of a swarm makes room for the next", func(t *testing.T) {
		b := newBench(t, Options{MaxPeers: 1})
		b.announce("192.0.2.1", hash(1), 6881)
		b.wants(b.announce("192.0.2.2", hash(1), 6881))
		b.wants(b.announce("192.0.2.3", hash(1), 0), "192.0.2.2:6881")
	})
	t.Run("listings of one address", func(t *testing.T) {
		b := newBench(t, Options{})
		var r reply
		for i := range maxPerSource + 1 {
			b.now = b.now.Add(time.Second / sourceRate)
			r = b.announce(fmt.Sprintf("2001:db8::%x", i), hash(i), 6881) // one /64
		}
		if !strings.Contains(r.Failure, "too many torrents") || b.swarms.recent.Len() != maxPerSource {
			t.Errorf("%q with %d listings", r.Failure, b.swarms.recent.Len())
		}
		if r := b.announce("2001:db8:0:1::1", hash(1), 6881); r.Failure != "" {
			t.Errorf("another address: %q", r.Failure)
		}
	})
	t.Run("announces of one address", func(t *testing.T) {
		b := newBench(t, Options{})
		for i := range sourceBurst {
			if r := b.announce("192.0.2.1", hash(1), 6881); r.Failure != "" {
				t.Fatalf("announce %d: %q", i, r.Failure)
			}
		}
		if r := b.announce("192.0.2.1", hash(1), 6881); !strings.Contains(r.Failure, "slow down") {
			t.Errorf("%+v", r)
		}
		if r := b.announce("192.0.2.2", hash(1), 6881); r.Failure != "" {
			t.Errorf("another address: %q", r.Failure)
		}
		b.now = b.now.Add(time.Second)
		if r := b.announce("192.0.2.1", hash(1), 6881); r.Failure != "" {
			t.Errorf("a second later: %q", r.Failure)
		}
	})
	t.Run("addresses that are remembered", func(t *testing.T) {
		b := newBench(t, Options{})
		for i := range maxIdleSources + 100 {
			b.swarms.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 1, b.now)
		}
		if n := len(b.swarms.sources); n != maxIdleSources || b.swarms.idle.Len() != n {
			t.Errorf("%d, %d", n, b.swarms.idle.Len())
		}
	})
	t.Run("an answer", func(t *testing.T) {
		b := newBench(t, Options{})
		for i := range 300 {
			b.announce(fmt.Sprintf("10.0.%d.%d", i/250, i%250), hash(1), 6881)
		}
		if n := len(b.announce("192.0.2.1", hash(1), 6881).peers(t)); n != defaultWant {
			t.Errorf("%d peers", n)
		}
		if n := len(b.announce("192.0.2.1", hash(1), 6881, "numwant", "1000000").peers(t)); n != maxWant {
			t.Errorf("%d peers", n)
		}
	})
}

func TestRefusals(t *testing.T) {
	b := newBench(t, Options{})
	h := hash(1)
	good := query(h, 6881)
	for query, want := range map[string]string{
		"":              "info_hash",
		"info_hash=abc": "info_hash",
		"info_hash=%zz": "cannot be read",
		strings.Replace(good, "peer_id=", "peer=", 1): "peer_id",
		strings.Replace(good, "6881", "66000", 1):     "port",
		strings.Replace(good, "6881", "-1", 1):        "port",
		strings.Repeat("x", maxQuery+1):               "too long",
	} {
		if r := b.get("192.0.2.1", "/announce?"+query); !strings.Contains(r.Failure, want) {
			t.Errorf("%.60q: %q", query, r.Failure)
		}
	}
	if r := b.get("192.0.2.1", "/scrape"); !strings.Contains(r.Failure, "info_hash") {
		t.Errorf("full scrape: %+v", r)
	}
	if r := b.get("192.0.2.1", "/scrape?"+strings.Repeat("info_hash=aaaaaaaaaaaaaaaaaaaa&", maxScrape+1)); !strings.Contains(r.Failure, "too many") {
		t.Errorf("large scrape: %+v", r)
	}
	for _, c := range [][2]string{{"POST", "/announce"}, {"GET", "/"}, {"GET", "/stats"}} {
		w := httptest.NewRecorder()
		b.ServeHTTP(w, httptest.NewRequest(c[0], c[1], nil))
		if w.Code != http.StatusNotFound {
			t.Errorf("%v: %d", c, w.Code)
		}
	}
}

// TestServe: over real connections, to the end.
func TestServe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- New(Options{}).Serve(ctx, l) }()
	client := &http.Client{Timeout: 5 * time.Second}
	for i, want := range []string{"5:peers0:e", "5:peers6:\x7f\x00\x00\x01\x00\x01e"} {
		resp, err := client.Get("http://" + l.Addr().String() + "/announce?" + query(hash(1), i+1))
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1000)
		n, _ := resp.Body.Read(b)
		resp.Body.Close()
		if !strings.HasSuffix(string(b[:n]), want) {
			t.Errorf("answer %d: %q", i, b[:n])
		}
	}
	idle, err := net.Dial("tcp", l.Addr().String()) // says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("it does not end")
	}
	if _, err := net.Dial("tcp", l.Addr().String()); err == nil {
		t.Error("it still listens")
	}
	client.CloseIdleConnections()
}

// FuzzAnnounce: whatever is asked, the answer is bencoded and the books are right.
func FuzzAnnounce(f *testing.F) {
	f.Add("/announce", query(hash(1), 6881))
	f.Add("/announce", query(hash(1), 6881, "event", "stopped"))
	f.Add("/announce", query(hash(2), 0, "left", "0", "numwant", "5"))
	f.Add("/scrape", "info_hash=aaaaaaaaaaaaaaaaaaaa&info_hash=b")
	f.Add("/announce", "info_hash=%00;&%zz")
	f.Fuzz(func(t *testing.T, path, query string) {
		tr := New(Options{MaxPeers: 3})
		for i := range 5 {
			req := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: path, RawQuery: query}, RemoteAddr: fmt.Sprintf("192.0.2.%d:1", i%4)}
			w := httptest.NewRecorder()
			tr.ServeHTTP(w, req)
			var r reply
			if w.Code == http.StatusOK {
				if err := bencode.Unmarshal(w.Body.Bytes(), &r); err != nil {
					t.Fatalf("%q: %v", w.Body, err)
				}
				r.peers(t)
			}
		}
		listed := 0
		for h, sw := range tr.swarms.torrents {
			seeders := 0
			for i, p := range sw.peers {
				if p.at != i || sw.index[p.addr] != p || p.hash != h || p.addr.Port() == 0 {
					t.Fatalf("%+v at %d", p, i)
				}
				if p.seeder {
					seeders++
				}
			}
			if len(sw.peers) == 0 || seeders != sw.seeders || len(sw.peers) != len(sw.index) {
				t.Fatalf("%+v", sw)
			}
			listed += len(sw.peers)
		}
		if listed > 3 || listed != tr.swarms.recent.Len() {
			t.Fatalf("%d listings, %d in the queue", listed, tr.swarms.recent.Len())
		}
	})
}
