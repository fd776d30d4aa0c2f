package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/rig"
)

// hub is a multicast group in this process.
type hub struct {
	mu   sync.Mutex // guards following
	subs []*hubSocket
}

type hubSocket struct {
	hub  *hub
	in   chan []byte
	once sync.Once
	done chan struct{}
}

func (h *hub) open() (multicast, error) {
	s := &hubSocket{hub: h, in: make(chan []byte, 64), done: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subs = append(h.subs, s)
	return s, nil
}

func (s *hubSocket) Send(b []byte) error {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	for _, o := range s.hub.subs {
		select {
		case o.in <- b:
		default:
		}
	}
	return nil
}

func (s *hubSocket) ReadFrom(b []byte) (int, netip.Addr, error) {
	select {
	case m := <-s.in:
		return copy(b, m), netip.MustParseAddr("127.0.0.1"), nil
	case <-s.done:
		return 0, netip.Addr{}, net.ErrClosed
	}
}

func (s *hubSocket) Close() error {
	s.once.Do(func() { close(s.done) })
	return nil
}

func TestLocalDiscovery(t *testing.T) {
	t.Parallel()
	s, other := newSetup(), newSetup()
	h := &hub{}
	local := func(o *Options) { o.LocalDiscovery = true; o.hooks.multicast = h.open }
	a, stranger := s.start(t, s.open(t), local), other.start(t, other.open(t), local)
	off := s.node(t)
	b := s.start(t, s.open(t), local)
	took := within(t, 5*time.Second, "both see each other", allSee([]*node{a, b}))
	t.Logf("in %v", took)
	time.Sleep(200 * time.Millisecond)
	if len(stranger.Members())+len(off.Members()) > 0 {
		t.Error("found by, or as, one that is not meant")
	}
	// A flood of announcements, as a stranger could repeat them: few addresses are kept.
	socket, _ := h.open()
	defer socket.Close()
	tag := localTag(s.secret.GossipKey())
	for i := range 500 {
		socket.Send(announcement{port: uint16(2000 + i), tags: [][tagSize]byte{tag}}.encode())
		if i%50 == 0 {
			time.Sleep(5 * time.Millisecond) // for the group to carry it
		}
	}
	time.Sleep(100 * time.Millisecond)
	a.peers.mu.Lock()
	n := len(a.peers.targets)
	a.peers.mu.Unlock()
	if n == 0 || n > maxFound+1 {
		t.Errorf("%d targets", n)
	}
}

// Two nodes on one machine and one on another find each other over a real network.
func TestLocalDiscoveryOnNetwork(t *testing.T) {
	r := rig.ForTest(t)
	w, err := r.NewNetwork(rig.NetworkOptions{Nodes: 2})
	if errors.Is(err, rig.ErrNoNamespaces) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := newSetup()
	s.listen = ""
	var nodes []*node
	for _, machine := range []*rig.Node{w.Node(1), w.Node(1), w.Node(2)} {
		var n *node
		if err := machine.Do(func() error { n = s.open(t); return nil }); err != nil {
			t.Fatal(err)
		}
		nodes = append(nodes, s.start(t, n, func(o *Options) {
			o.LocalDiscovery = true
			o.hooks.mine = func(netip.Addr) bool { return true }
			o.hooks.dial = func(ctx context.Context, a netip.AddrPort) (net.Conn, error) {
				return machine.DialContext(ctx, "tcp", a.String())
			}
			o.hooks.multicast = func() (m multicast, err error) {
				err = machine.Do(func() error { m, err = openMulticast(); return err })
				return m, err
			}
		}))
	}
	took := within(t, 15*time.Second, "three see each other", allSee(nodes))
	t.Logf("in %v", took)
	for i, n := range nodes {
		if want := w.Nodes()[i/2].Addr; n.Self().Addr.Addr() != want {
			t.Errorf("node %d advertises %v, not %v", i, n.Self().Addr, want)
		}
	}
}

func TestAnnouncement(t *testing.T) {
	tag := localTag(make([]byte, 32))
	a := announcement{port: 6881, tags: [][tagSize]byte{tag}, cookie: "abc"}
	want := fmt.Sprintf("BT-SEARCH * HTTP/1.1\r\nHost: 239.192.152.143:6771\r\nPort: 6881\r\nInfohash: %x\r\ncookie: abc\r\n\r\n\r\n", tag)
	if got := string(a.encode()); got != want {
		t.Errorf("%q", got)
	}
	for name, text := range map[string]string{
		"of libtorrent":  "BT-SEARCH * HTTP/1.1\r\nHost: 239.192.152.143:6771\r\nPort: 1\r\nInfohash: " + strings.Repeat("aB", 20) + "\r\ncookie: 1\r\n\r\n\r\n",
		"two infohashes": "BT-SEARCH * HTTP/1.1\r\nPort: 1\r\nInfohash: " + strings.Repeat("ab", 20) + "\r\nInfohash: " + strings.Repeat("cd", 20) + "\r\n\r\n",
	} {
		if _, err := parseAnnouncement([]byte(text)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	good := string(a.encode())
	for name, text := range map[string]string{
		"empty":      "",
		"another":    "M-SEARCH * HTTP/1.1\r\n\r\n",
		"no port":    strings.Replace(good, "Port: 6881\r\n", "", 1),
		"port 0":     strings.Replace(good, "6881", "0", 1),
		"two ports":  strings.Replace(good, "cookie: abc", "port: 1", 1),
		"large port": strings.Replace(good, "6881", "65536", 1),
		"no hash":    strings.Replace(good, "Infohash", "Hash", 1),
		"short hash": strings.Replace(good, "Infohash: ", "Infohash: 00", 1),
		"cut":        good[:60],
		"two":        good + good,
		"long":       strings.Replace(good, "abc", strings.Repeat("a", maxAnnouncement), 1),
		"lines":      strings.Replace(good, "cookie: abc", strings.Repeat("a: b\r\n", 100), 1),
	} {
		if got, err := parseAnnouncement([]byte(text)); !errors.Is(err, errAnnouncement) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func FuzzAnnouncement(f *testing.F) {
	f.Add(announcement{port: 6881, tags: [][tagSize]byte{{1}}, cookie: "abc"}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := parseAnnouncement(b)
		if err != nil {
			return
		}
		again, err := parseAnnouncement(a.encode())
		if err != nil || again.port != a.port || len(again.tags) != len(a.tags) || again.cookie != a.cookie {
			t.Errorf("%q: %+v, then %+v, %v", b, a, again, err)
		}
	})
}
