package open

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"
)

// httpTracker is a tracker in a few lines: it keeps what it was asked, and names the peers that it was told of.
type httpTracker struct {
	*httptest.Server

	mu    sync.Mutex
	asked []url.Values
	peers map[string]string // compact, by peer ID
	fail  string            // what it refuses with
}

func newTracker(t *testing.T, start func(*httptest.Server)) *httpTracker {
	t.Helper()
	k := &httpTracker{peers: make(map[string]string)}
	k.Server = httptest.NewUnstartedServer(k)
	k.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)
	start(k.Server)
	t.Cleanup(k.Close)
	return k
}

func (k *httpTracker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked = append(k.asked, q)
	if k.fail != "" {
		fmt.Fprint(w, "d14:failure reason", len(k.fail), ":", k.fail, "e")
		return
	}
	var port int
	fmt.Sscan(q.Get("port"), &port)
	ap := netip.MustParseAddrPort(r.RemoteAddr)
	a := ap.Addr().As4()
	k.peers[q.Get("peer_id")] = string(a[:]) + string([]byte{byte(port >> 8), byte(port)})
	if q.Get("event") == eventStopped {
		delete(k.peers, q.Get("peer_id"))
	}
	all := ""
	for id, p := range k.peers {
		if id != q.Get("peer_id") {
			all += p
		}
	}
	w.Write(bencode.MustMarshal(map[string]any{"interval": 1800, "min interval": 60, "complete": 1, "incomplete": 2, "peers": all, "tracker id": "the id"}))
}

// events are those that it was told of a torrent, in order.
func (k *httpTracker) events(t *Torrent) (all []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	h := t.Infohash()
	for _, q := range k.asked {
		if q.Get("info_hash") == string(h[:]) {
			all = append(all, q.Get("event"))
		}
	}
	return all
}

const token = "s3cret-token"

// Two nodes that know nothing of each other meet at a tracker; it hears of beginning, completion and end.
func TestTracker(t *testing.T) {
	t.Parallel()
	k := newTracker(t, (*httptest.Server).Start)
	l := newLayer(2<<20, 40)
	p := l.torrent(t, 64<<10, true, k.URL+"/announce/"+token+"?passkey="+token)
	// All on one address: a tracker sees where a request comes from, and that is 127.0.0.1 here.
	seeder, leecher := newSwarm(t, Options{Listen: "127.0.0.1", Seed: true}), newSwarm(t, Options{Listen: "127.0.0.1"})
	ts := add(t, seeder, p, newMemory(l).fill())
	wait(t, "the seeder is known", func() bool { return len(k.events(ts)) == 1 })
	m := newMemory(l)
	tl := add(t, leecher, p, m)
	wantAll(tl)
	wait(t, "complete", m.complete)
	m.check(t)
	wait(t, "completion is told", func() bool { return reflect.DeepEqual(k.events(ts), []string{"started", "started", "completed"}) })
	st := tl.Stats().Trackers
	if len(st) != 1 || st[0].Tracker != k.URL || st[0].Err != nil || st[0].Peers != 1 || st[0].Seeders != 1 || st[0].Leechers != 2 ||
		time.Until(st[0].Next) < 25*time.Minute {
		t.Errorf("status %+v", st)
	}
	tl.Drop()
	ts.Drop()
	wait(t, "the end is told", func() bool { return len(k.events(ts)) == 5 })
	k.mu.Lock()
	defer k.mu.Unlock()
	for n, want := range []url.Values{
		{"left": {"0"}, "event": {"started"}, "numwant": {"50"}},
		{"left": {fmt.Sprint(2 << 20)}, "event": {"started"}, "downloaded": {"0"}},
		{"left": {"0"}, "event": {"completed"}, "downloaded": {fmt.Sprint(2 << 20)}, "trackerid": {"the id"}},
		{"event": {"stopped"}, "numwant": {"0"}}, {"event": {"stopped"}},
	} {
		want["compact"], want["passkey"] = []string{"1"}, []string{token}
		for key := range want {
			if got := k.asked[n][key]; !reflect.DeepEqual(got, want[key]) {
				t.Errorf("announce %d: %s is %q, expected %q", n, key, got, want[key])
			}
		}
	}
	if len(k.peers) != 0 {
		t.Error("the tracker still knows a peer")
	}
}

// Options.Trackers replace those of the metainfo, which then hear nothing.
func TestTrackersAreReplaced(t *testing.T) {
	t.Parallel()
	named, told := newTracker(t, (*httptest.Server).Start), newTracker(t, (*httptest.Server).Start)
	l := newLayer(1<<20, 41)
	s := newSwarm(t, Options{Listen: "127.0.0.1", Seed: true, Trackers: []string{told.URL + "/announce"}})
	to := add(t, s, l.torrent(t, 64<<10, false, named.URL), newMemory(l).fill())
	wait(t, "the tracker that was told", func() bool { return len(told.events(to)) == 1 })
	never(t, "the metainfo's is asked", 200*time.Millisecond, func() bool { return len(named.events(to)) > 0 })
}

// A tier whose first tracker fails goes on to the next; each tier is announced to.
func TestTiers(t *testing.T) {
	t.Parallel()
	good, other := newTracker(t, (*httptest.Server).Start), newTracker(t, (*httptest.Server).Start)
	bad := newTracker(t, (*httptest.Server).Start)
	bad.fail = "go away"
	l := newLayer(1<<20, 42)
	p := l.torrent(t, 64<<10, false)
	p.Trackers = [][]string{{bad.URL, good.URL}, {other.URL}, {bad.URL + "/x"}, {"ftp://nonsense/"}}
	s := newSwarm(t, Options{Listen: "127.0.0.1", Seed: true})
	to := add(t, s, p, newMemory(l).fill())
	wait(t, "all are told", func() bool {
		st := to.Stats().Trackers
		return len(st) == 3 && st[0].Tracker == good.URL && st[0].Next.After(time.Now()) && st[1].Next.After(time.Now()) &&
			st[2].Err != nil && strings.Contains(st[2].Err.Error(), "go away") && time.Until(st[2].Next) > 5*time.Second
	})
	if len(good.events(to)) != 1 || len(other.events(to)) != 1 {
		t.Error("a working tracker was not told once")
	}
}

// Every way in which an announce fails leaves no trace of the URL's path and query, where a token is.
func TestTrackerFailures(t *testing.T) {
	t.Parallel()
	https := newTracker(t, (*httptest.Server).StartTLS)
	plain := newTracker(t, (*httptest.Server).Start)
	answer := func(f http.HandlerFunc) string {
		srv := httptest.NewServer(f)
		t.Cleanup(srv.Close)
		return srv.URL
	}
	down := httptest.NewServer(nil)
	down.Close()
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain.URL+r.URL.RequestURI(), http.StatusFound)
	}))
	t.Cleanup(secure.Close)
	roots := x509.NewCertPool()
	roots.AddCert(https.Certificate())
	roots.AddCert(secure.Certificate())
	trusting := newSwarm(t, Options{TrackerTLS: &tls.Config{RootCAs: roots}})
	strict := newSwarm(t, Options{})
	q := query{want: 1}
	if _, err := trusting.ask(t.Context(), https.URL+"/"+token, q); err != nil {
		t.Errorf("a certificate of a known authority: %v", err)
	}
	before := len(plain.asked)
	for name, c := range map[string]struct {
		s    *Swarm
		url  string
		want string
	}{
		"unknown authority":   {strict, https.URL, "certificate"},
		"redirect to plain":   {trusting, secure.URL, "from https to plain http"},
		"nobody there":        {strict, down.URL, "refused"},
		"not found":           {strict, answer(http.NotFound), "404"},
		"a web page":          {strict, answer(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>") }), "not bencoded"},
		"an endless answer":   {strict, answer(func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 2*maxAnswer)) }), "more than"},
		"a redirect in rings": {strict, answer(func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.String(), http.StatusFound) }), "circles"},
	} {
		_, err := c.s.ask(t.Context(), c.url+"/"+token+"?passkey="+token, q)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), token) {
			t.Errorf("%s: the error shows the token: %v", name, err)
		}
	}
	if len(plain.asked) != before {
		t.Error("a redirect from https to http was followed")
	}
	busy := answer(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "120")
		w.WriteHeader(http.StatusTooManyRequests)
	})
	if _, err := strict.ask(t.Context(), busy, q); retryAfter(err) != 2*time.Minute {
		t.Errorf("Retry-After is taken for %v: %v", retryAfter(err), err)
	}

	// In the log neither.
	var log bytes.Buffer
	l := newLayer(1<<20, 43)
	s := newSwarm(t, Options{Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	to := add(t, s, l.torrent(t, 64<<10, false, down.URL+"/"+token, "http://"+token+":x@host/"), newMemory(l))
	wait(t, "failure", func() bool { return to.Stats().Trackers[0].Err != nil })
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if out := log.String(); strings.Contains(out, token) || !strings.Contains(out, "a tracker does not answer") {
		t.Errorf("log: %s", out)
	}
}

// When to ask again.
func TestAnnounceTimes(t *testing.T) {
	t.Parallel()
	s := newSwarm(t, Options{})
	l := newLayer(1<<20, 44)
	to := add(t, s, l.torrent(t, 64<<10, false), newMemory(l))
	ago := func(now time.Time, d time.Duration) time.Time { return now.Add(-d) }
	now := time.Now()
	for name, c := range map[string]struct {
		tier             tier
		complete, lonely bool
		next             time.Duration
	}{
		"as it said":                {tier: tier{started: true, last: now, next: now.Add(time.Minute * 5), least: time.Minute}, next: 5 * time.Minute},
		"nobody is connected":       {tier: tier{started: true, last: ago(now, 10*time.Second), next: now.Add(time.Minute * 5), least: time.Minute}, lonely: true, next: 50 * time.Second},
		"but it failed":             {tier: tier{started: true, fails: 1, last: ago(now, time.Hour), next: now.Add(time.Minute * 5), least: time.Minute}, lonely: true, next: 5 * time.Minute},
		"nobody, but complete":      {tier: tier{started: true, completed: true, last: ago(now, time.Hour), next: now.Add(time.Minute * 5), least: time.Minute}, complete: true, lonely: true, next: 5 * time.Minute},
		"in the middle of one":      {tier: tier{busy: true}, next: idleStep},
		"completed a moment before": {tier: tier{started: true, last: now, next: now.Add(time.Minute * 5), least: time.Minute}, complete: true, next: time.Second},
	} {
		a := &announcer{t: to, tiers: []*tier{&c.tier}}
		if got := a.due(now, c.complete, c.lonely).Sub(now); got != c.next {
			t.Errorf("%s: %v, expected %v", name, got, c.next)
		}
	}
	// Bounds of what a tracker says, and the pause after failures.
	x := &tier{urls: []string{"http://a/", "http://b/", "http://c/"}, least: minInterval}
	a := &announcer{t: to, tiers: []*tier{x}}
	a.answered(x, 2, eventStarted, false, answer{interval: time.Second, least: time.Second})
	if x.interval != minInterval || x.least != minInterval || strings.Join(x.urls, "") != "http://c/http://a/http://b/" {
		t.Errorf("%+v", x)
	}
	a.answered(x, 0, eventNone, false, answer{interval: 100 * time.Hour, least: 99 * time.Hour})
	if x.interval != maxInterval || x.least > maxInterval {
		t.Errorf("%+v", x)
	}
	for n := range 60 {
		a.failed(x, errors.New("x"))
		if d := time.Until(x.next); d < firstBackoff*3/4-time.Second || d > lastBackoff*5/4 || n > 10 && d < lastBackoff*3/4-time.Second {
			t.Fatalf("after %d failures: %v", n+1, d)
		}
	}
}

func TestParseTracker(t *testing.T) {
	for _, s := range []string{"http://h/announce", "https://h:1/x/announce?token=1", "udp://h:80", "http://[::1]:3/"} {
		if _, err := parseTracker(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []string{"", "h", "http:///x", "wss://h/x", "udp://h/x", "http://u:" + token + "@h/", "http://h/\x7f" + token, "file:///etc/" + token} {
		if _, err := parseTracker(s); err == nil {
			t.Errorf("%q: no error", s)
		} else if strings.Contains(err.Error(), token) {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"d8:intervali1800e5:peers6:\x7f\x00\x00\x01\x1a\xe1e",
		"d8:intervali-1e12:min intervali99999999999999999e5:peersld2:ip9:127.0.0.14:porti6881eed2:ip3:::14:porti0eeee",
		"d14:failure reason4:nopee", "d6:peers618:" + strings.Repeat("\x20", 18) + "e", "d5:peersi1ee", "d5:peersl", "", "<html>",
		"d5:peersld2:ip7:fe80::14:porti70000eeee", "d15:warning message3:abc10:tracker id1:xe",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnswer(b)
		if err != nil {
			if len(err.Error()) > 5*maxText {
				t.Errorf("a long error: %v", err)
			}
			return
		}
		if len(a.peers) > maxNamed || a.interval <= 0 || a.least <= 0 || a.seeders < 0 || a.leechers < 0 || len(a.warning) > maxText || len(a.id) > maxText {
			t.Errorf("out of bounds: %+v", a)
		}
		for _, p := range a.peers {
			if !p.IsValid() || p.Port() == 0 || p.Addr().IsUnspecified() || p.Addr().Is4In6() {
				t.Errorf("peer %v", p)
			}
		}
	})
}

// Trackers and peers cannot have this node knock at services of its own machine.
func TestDialable(t *testing.T) {
	t.Parallel()
	s := newSwarm(t, Options{Listen: "0.0.0.0", MaxConnections: 1})
	l := newLayer(1<<20, 45)
	to := add(t, s, l.torrent(t, 64<<10, false), newMemory(l))
	to.found([]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:22")}, false)
	to.AddPeers([]netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:6000")})
	for addr, want := range map[string]bool{
		"127.0.0.1:22": false, "127.0.0.1:6000": true, "[::ffff:127.0.0.1]:22": false, "[::1]:6000": false, "169.254.169.254:80": false,
		"[fe80::1]:80": false, "224.0.0.1:80": false, "255.255.255.255:1": false, "0.0.0.0:1": false, "10.0.0.1:0": false,
		"10.0.0.1:80": true, "192.0.2.1:6881": true, "[2001:db8::1]:1": true,
	} {
		if got := s.dialable(netip.MustParseAddrPort(addr)); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
	if _, err := (dialer{s}).Dial(context.Background(), "127.0.0.1:22"); err == nil {
		t.Error("it dialled")
	}
	if to.book.len() != 1 {
		t.Errorf("%d addresses kept", to.book.len())
	}
}
