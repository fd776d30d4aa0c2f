package tracker

import (
	"crypto/sha256"
	"crypto/subtle"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/anacrolix/torrent/metainfo"
)

const (
	// interval is how often a client announces itself. libtorrent (qBittorrent) does it every 5 minutes at most, whatever it is told.
	interval = 5 * time.Minute
	// lonely is the interval of a client for whom there was nobody: somebody may come. The library of this program and others ask
	// once a minute at most.
	lonely = time.Minute
	// expiry is when a silent client is forgotten: one lost announce is forgiven.
	expiry = 2 * interval
	// defaultMaxPeers bounds the listings in all: about 40 MB of memory.
	defaultMaxPeers = 100_000
)

// Options say who is answered. The zero value answers everybody.
type Options struct {
	// Token makes the URLs /TOKEN/announce and /TOKEN/scrape, and refuses all others. It must be made of what a path needs not to
	// escape: letters, digits, "-", "_", ".", "~". "" is no token.
	Token string
	// Allowed are the only torrents that may be announced; nil is all.
	Allowed []metainfo.Hash
	// Proxied says that a proxy on this machine stands in front: of a connection from loopback the last address in X-Forwarded-For
	// is the client's.
	Proxied bool
	// MaxPeers bounds the listings in all, one for each client and torrent; 0 is 100,000.
	MaxPeers int
	// Now is the clock; nil is time.Now. Tests have their own.
	Now func() time.Time
}

// Tracker answers announces and scrapes. It is safe for concurrent use.
type Tracker struct {
	token   [sha256.Size]byte
	secured bool
	allowed map[metainfo.Hash]bool // nil is all
	proxied bool
	now     func() time.Time

	mu     sync.Mutex // guards swarms
	swarms *swarms
}

// New makes a tracker that knows nobody yet. It has no goroutine and needs no end.
func New(o Options) *Tracker {
	if o.MaxPeers == 0 {
		o.MaxPeers = defaultMaxPeers
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	t := &Tracker{token: sha256.Sum256([]byte(o.Token)), secured: o.Token != "", proxied: o.Proxied, now: o.Now, swarms: newSwarms(o.MaxPeers, expiry)}
	if o.Allowed != nil {
		t.allowed = map[metainfo.Hash]bool{}
		for _, h := range o.Allowed {
			t.allowed[h] = true
		}
	}
	return t
}

// ServeHTTP answers as BEP 3 has it: also a refusal is a 200, with its reason in the body, or clients would not show it.
func (t *Tracker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	verb, ok := t.verb(r.URL.Path)
	if !ok && !t.secured || r.Method != http.MethodGet {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "text/plain")
	w.Header().Set("Cache-Control", "no-store")
	answer, err := []byte(nil), error(refusal("this tracker needs the token of its swarm in the announce URL"))
	if ok {
		answer, err = t.answer(r, verb)
	}
	if err != nil {
		answer = appendString([]byte("d"), "failure reason")
		answer = append(appendString(answer, reasonOf(err)), 'e')
	}
	_, _ = w.Write(answer) // that the client has gone is its own affair
}

// verb is the last part of the path, "announce" or "scrape"; false when the path is another, or the token before it is.
func (t *Tracker) verb(path string) (string, bool) {
	token, verb := "", strings.TrimPrefix(path, "/")
	if t.secured {
		token, verb, _ = strings.Cut(verb, "/")
	}
	// The sums are of one length whatever was sent: neither its length nor how much of it is right shows in the time.
	sum := sha256.Sum256([]byte(token))
	right := subtle.ConstantTimeCompare(sum[:], t.token[:]) == 1
	return verb, right && (verb == "announce" || verb == "scrape")
}

func (t *Tracker) answer(r *http.Request, verb string) ([]byte, error) {
	addr, err := t.client(r)
	if err != nil {
		return nil, err
	}
	if verb == "scrape" {
		hashes, err := parseScrape(r.URL.RawQuery)
		if err != nil {
			return nil, err
		}
		return t.scrape(hashes, addr)
	}
	a, err := parseAnnounce(r.URL.RawQuery)
	if err != nil {
		return nil, err
	}
	return t.announce(a, addr)
}

// client is the address that a request comes from.
func (t *Tracker) client(r *http.Request) (netip.Addr, error) {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}, refusal("your address is not one of IP")
	}
	addr := from.Addr()
	if forwarded := r.Header.Values("X-Forwarded-For"); t.proxied && addr.Unmap().IsLoopback() && len(forwarded) > 0 {
		// The last is what the proxy itself saw; those before are what it was told.
		last := forwarded[len(forwarded)-1]
		if addr, err = netip.ParseAddr(strings.TrimSpace(last[strings.LastIndexByte(last, ',')+1:])); err != nil {
			return netip.Addr{}, refusal("the proxy in front of this tracker does not tell your address")
		}
	}
	return addr.Unmap().WithZone(""), nil
}

const tooOften = refusal("too many requests of your address: slow down")

func (t *Tracker) announce(a announce, from netip.Addr) ([]byte, error) {
	if t.allowed != nil && !t.allowed[a.infoHash] {
		return nil, refusal("this tracker is not for this torrent")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if !t.swarms.allow(from, 1, now) {
		return nil, tooOften
	}
	addr := netip.AddrPortFrom(from, a.port)
	if err := t.swarms.announce(a, addr, now); err != nil {
		return nil, err
	}
	peers := t.swarms.pick(a.infoHash, addr, a.left == 0, a.want)
	seeders, leechers, _ := t.swarms.count(a.infoHash)
	return appendAnswer(nil, peers, seeders, leechers), nil
}

func (t *Tracker) scrape(hashes []metainfo.Hash, from netip.Addr) ([]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.swarms.allow(from, len(hashes), t.now()) {
		return nil, tooOften
	}
	slices.SortFunc(hashes, func(a, b metainfo.Hash) int { return strings.Compare(string(a[:]), string(b[:])) })
	b := append(appendString([]byte("d"), "files"), 'd')
	for _, h := range slices.Compact(hashes) {
		if t.allowed != nil && !t.allowed[h] {
			continue
		}
		seeders, leechers, downloaded := t.swarms.count(h)
		b = append(appendString(b, string(h[:])), 'd')
		b = appendInt(appendString(b, "complete"), int64(seeders))
		b = appendInt(appendString(b, "downloaded"), downloaded)
		b = append(appendInt(appendString(b, "incomplete"), int64(leechers)), 'e')
	}
	return append(b, "ee"...), nil
}

// appendAnswer is the answer to an announce, always compact: clients of the last fifteen years read nothing else.
func appendAnswer(b []byte, peers []netip.AddrPort, seeders, leechers int) []byte {
	var four, six []byte
	for _, p := range peers {
		if p.Addr().Is4() {
			a := p.Addr().As4()
			four = append(append(four, a[:]...), byte(p.Port()>>8), byte(p.Port()))
		} else {
			a := p.Addr().As16()
			six = append(append(six, a[:]...), byte(p.Port()>>8), byte(p.Port()))
		}
	}
	wait := interval
	if len(peers) == 0 {
		wait = lonely
	}
	b = append(b, 'd')
	b = appendInt(appendString(b, "complete"), int64(seeders))
	b = appendInt(appendString(b, "incomplete"), int64(leechers))
	b = appendInt(appendString(b, "interval"), int64(wait/time.Second))
	b = appendInt(appendString(b, "min interval"), int64(lonely/time.Second))
	b = appendString(appendString(b, "peers"), string(four))
	if len(six) > 0 {
		b = appendString(appendString(b, "peers6"), string(six))
	}
	return append(b, 'e')
}

// appendString and appendInt write bencode.
func appendString(b []byte, s string) []byte {
	return append(append(strconv.AppendInt(b, int64(len(s)), 10), ':'), s...)
}

func appendInt(b []byte, n int64) []byte {
	return append(strconv.AppendInt(append(b, 'i'), n, 10), 'e')
}
