package open

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/anacrolix/torrent/tracker"
)

const (
	// wantPeers is how many peers a tracker is asked for: as many as a torrent connects to; the usual number.
	wantPeers = 50
	// maxAnswer bounds a tracker's answer, in bytes: 50 peers are 300 compact and 5,000 as dictionaries, and some give more.
	maxAnswer = 256 << 10
	// maxNamed bounds the peers taken from one answer.
	maxNamed = 200
	// maxText bounds what is shown of a tracker's own words, in bytes.
	maxText = 200
	// maxRedirects of a tracker: one is common (to a host with the load), more are a loop.
	maxRedirects = 3
)

// errTracker is a tracker's URL that cannot be used.
var errTracker = errors.New("a tracker is named by a URL like http://HOST[:PORT]/announce, https://… or udp://HOST:PORT")

// parseTracker checks the URL of a tracker. Errors do not show it.
func parseTracker(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil {
		return nil, errTracker
	}
	switch {
	case u.User != nil:
		return nil, fmt.Errorf("%s: %w; a name and password are not supported there", redact(s), errTracker)
	case u.Hostname() == "", u.Scheme != "http" && u.Scheme != "https" && u.Scheme != "udp", u.Scheme == "udp" && u.Port() == "":
		return nil, fmt.Errorf("%s: %w", redact(s), errTracker)
	}
	return u, nil
}

// redact is scheme and host of a tracker's URL: path and query may hold a token.
func redact(s string) string {
	u, err := url.Parse(s)
	if err != nil {
		return "(unreadable)"
	}
	return u.Scheme + "://" + u.Host
}

// trackerClient is the HTTP client for announces. Unlike the library's, it checks certificates.
// From, if valid, is the address that trackers see, and tell to peers.
func trackerClient(t *tls.Config, from netip.Addr) *http.Client {
	if t != nil {
		t = t.Clone()
	}
	d := &net.Dialer{Timeout: dialTimeout}
	family := ""
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		family = "6"
		if from.Is4() {
			family = "4"
		}
	}
	return &http.Client{
		Transport: &http.Transport{
			Proxy: http.ProxyFromEnvironment,
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				return d.DialContext(ctx, network+family, addr)
			},
			TLSClientConfig:        t,
			TLSHandshakeTimeout:    dialTimeout,
			ForceAttemptHTTP2:      true,
			MaxIdleConnsPerHost:    1,
			MaxIdleConns:           maxAnnounces,
			IdleConnTimeout:        30 * time.Second, // a start with many torrents uses one connection; later ones are minutes apart
			MaxResponseHeaderBytes: 64 << 10,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			switch {
			case len(via) > maxRedirects:
				return errors.New("the tracker redirects in circles")
			case via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https":
				return errors.New("the tracker redirects from https to plain http")
			}
			return nil
		},
	}
}

// query is one announce.
type query struct {
	infohash       metainfo.Hash
	peer           [20]byte
	port           uint16
	key            uint32
	down, up, left int64 // bytes
	event          string
	id             string // tracker id
	want           int    // peers
}

// answer is what a tracker said.
type answer struct {
	interval, least   time.Duration // until the next announce: asked for, and allowed
	seeders, leechers int
	id                string
	warning           string
	peers             []netip.AddrPort
	near              bool // the tracker is on loopback, so its peers may be
}

// refusal is a tracker's answer that is not 200.
type refusal struct {
	status string
	after  time.Duration
}

func (r refusal) Error() string { return "the tracker answered " + r.status }

// retryAfter is how long a tracker asked to be left alone, 0 when it did not.
func retryAfter(err error) time.Duration {
	if r := (refusal{}); errors.As(err, &r) {
		return r.after
	}
	return 0
}

// ask announces to one tracker. The error does not show its URL.
func (s *Swarm) ask(ctx context.Context, tracker string, q query) (answer, error) {
	u, err := parseTracker(tracker)
	if err != nil {
		return answer{}, err
	}
	if u.Scheme == "udp" {
		return s.askUDP(ctx, u, q)
	}
	return s.askHTTP(ctx, u, q)
}

func (s *Swarm) askHTTP(ctx context.Context, u *url.URL, q query) (answer, error) {
	full := *u
	if full.RawQuery != "" {
		full.RawQuery += "&" // a tracker's own parameters stay as they are, and first
	}
	full.RawQuery += q.encode()
	near := false
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(c httptrace.GotConnInfo) {
		near = isLoopback(c.Conn.RemoteAddr())
	}})
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, full.String(), nil)
	if err != nil {
		return answer{}, errTracker
	}
	req.Header.Set("User-Agent", agent)
	resp, err := s.http.Do(req)
	if err != nil {
		if e := (*url.Error)(nil); errors.As(err, &e) { // it shows the URL
			err = e.Err
		}
		return answer{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		after, _ := strconv.Atoi(resp.Header.Get("Retry-After"))
		return answer{}, refusal{resp.Status, time.Duration(max(0, min(after, int(maxInterval/time.Second)))) * time.Second}
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return answer{}, err
	}
	if len(body) > maxAnswer {
		return answer{}, fmt.Errorf("the tracker's answer has more than %d bytes", maxAnswer)
	}
	a, err := parseAnswer(body)
	a.near = near
	return a, err
}

// encode is the query string (BEP 3, 7, 23).
func (q query) encode() string {
	var b strings.Builder
	add := func(k, v string) {
		if b.Len() > 0 {
			b.WriteByte('&')
		}
		b.WriteString(k + "=" + strings.ReplaceAll(url.QueryEscape(v), "+", "%20"))
	}
	add("info_hash", string(q.infohash[:]))
	add("peer_id", string(q.peer[:]))
	add("port", strconv.Itoa(int(q.port)))
	add("uploaded", strconv.FormatInt(q.up, 10))
	add("downloaded", strconv.FormatInt(q.down, 10))
	add("left", strconv.FormatInt(q.left, 10))
	add("compact", "1")
	add("no_peer_id", "1")
	add("numwant", strconv.Itoa(q.want))
	add("key", fmt.Sprintf("%08x", q.key))
	if q.event != eventNone {
		add("event", q.event)
	}
	if q.id != "" {
		add("trackerid", q.id)
	}
	return b.String()
}

// parseAnswer reads the body of a tracker's answer.
func parseAnswer(body []byte) (answer, error) {
	var r struct {
		Failure     string        `bencode:"failure reason"`
		Warning     string        `bencode:"warning message"`
		Interval    int64         `bencode:"interval"`
		MinInterval int64         `bencode:"min interval"`
		ID          string        `bencode:"tracker id"`
		Complete    int64         `bencode:"complete"`
		Incomplete  int64         `bencode:"incomplete"`
		Peers       bencode.Bytes `bencode:"peers"`
		Peers6      bencode.Bytes `bencode:"peers6"`
	}
	err := bencode.Unmarshal(body, &r)
	if trailing := (bencode.ErrUnusedTrailingBytes{}); err != nil && !errors.As(err, &trailing) {
		return answer{}, errors.New("the tracker's answer is not bencoded: its URL may be that of something else")
	}
	if r.Failure != "" {
		return answer{}, fmt.Errorf("the tracker refuses: %q", cut(r.Failure))
	}
	a := answer{
		interval: seconds(r.Interval, defaultInterval), least: seconds(r.MinInterval, minInterval),
		seeders: count(r.Complete), leechers: count(r.Incomplete), warning: cut(r.Warning),
	}
	if len(r.ID) <= maxText {
		a.id = r.ID
	}
	a.peers = append(parsePeers(r.Peers, 4), parsePeers(r.Peers6, 16)...)
	a.peers = a.peers[:min(len(a.peers), maxNamed)]
	return a, nil
}

// parsePeers reads a bencoded list of peers: a string of addresses, of the given length, with ports (BEP 23, 7), or dictionaries (BEP
// 3). What is no address is left out.
func parsePeers(raw bencode.Bytes, addrLen int) (peers []netip.AddrPort) {
	var compact string
	if bencode.Unmarshal(raw, &compact) == nil {
		for len(compact) >= addrLen+2 && len(peers) < maxNamed {
			if a, ok := netip.AddrFromSlice([]byte(compact[:addrLen])); ok {
				peers = appendPeer(peers, a, int64(binary.BigEndian.Uint16([]byte(compact[addrLen:]))))
			}
			compact = compact[addrLen+2:]
		}
		return peers
	}
	var list []bencode.Bytes
	if bencode.Unmarshal(raw, &list) != nil {
		return nil
	}
	for _, item := range list {
		var p struct {
			IP   string `bencode:"ip"`
			Port int64  `bencode:"port"`
		}
		if bencode.Unmarshal(item, &p) != nil {
			continue
		}
		if a, err := netip.ParseAddr(p.IP); err == nil && len(peers) < maxNamed { // names of hosts are not looked up
			peers = appendPeer(peers, a.WithZone(""), p.Port)
		}
	}
	return peers
}

func appendPeer(peers []netip.AddrPort, a netip.Addr, port int64) []netip.AddrPort {
	if port <= 0 || port > 65535 || a.IsUnspecified() || a.IsMulticast() {
		return peers
	}
	return append(peers, netip.AddrPortFrom(a.Unmap(), uint16(port)))
}

// seconds is n seconds, or what else when the tracker did not say.
func seconds(n int64, otherwise time.Duration) time.Duration {
	if n <= 0 {
		return otherwise
	}
	return time.Duration(min(n, int64(24*time.Hour/time.Second))) * time.Second
}

func count(n int64) int { return int(max(0, min(n, 1<<30))) }

func cut(s string) string { return s[:min(len(s), maxText)] }

func isLoopback(a net.Addr) bool {
	ap, err := netip.ParseAddrPort(a.String())
	return err == nil && ap.Addr().Unmap().IsLoopback()
}

// askUDP announces by BEP 15.
func (s *Swarm) askUDP(ctx context.Context, u *url.URL, q query) (answer, error) {
	o := tracker.NewClientOpts{Slogger: slog.New(slog.DiscardHandler)}
	if s.from.IsValid() {
		o.UdpNetwork = "udp6"
		if s.from.Is4() {
			o.UdpNetwork = "udp4"
		}
		o.ListenPacket = func(network, _ string) (net.PacketConn, error) {
			return net.ListenPacket(network, net.JoinHostPort(s.from.String(), "0"))
		}
	}
	c, err := tracker.NewClient(u.String(), o)
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	want := int32(q.want)
	req := tracker.AnnounceRequest{
		InfoHash: q.infohash, PeerId: q.peer, Downloaded: q.down, Uploaded: q.up, Left: q.left,
		Key: int32(q.key), NumWant: want, Port: q.port,
	}
	switch q.event {
	case eventStarted:
		req.Event = tracker.Started
	case eventCompleted:
		req.Event = tracker.Completed
	case eventStopped:
		req.Event = tracker.Stopped
	}
	res, err := c.Announce(ctx, req, tracker.AnnounceOpt{})
	if err != nil {
		return answer{}, fmt.Errorf("UDP tracker: %w", err)
	}
	a := answer{
		interval: seconds(int64(res.Interval), defaultInterval), least: minInterval,
		seeders: count(int64(res.Seeders)), leechers: count(int64(res.Leechers)),
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err == nil {
		a.near = ip.IsLoopback()
	}
	for _, p := range res.Peers[:min(len(res.Peers), maxNamed)] {
		if ip, ok := netip.AddrFromSlice(p.IP); ok {
			a.peers = appendPeer(a.peers, ip, int64(p.Port))
		}
	}
	return a, nil
}
