package gossip

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// A stranger's packets, ones that were recorded, and ones sealed with another key change nothing and are not answered.
func TestHostilePackets(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.node(t)
	b := s.node(t, a.addr())
	within(t, 2*time.Second, "both see each other", allSee([]*node{a, b}))
	within(t, 5*time.Second, "packets to record", func() bool {
		a.packets.mu.Lock()
		defer a.packets.mu.Unlock()
		return len(a.packets.sent) > 3
	})
	stranger, err := net.Dial("udp4", b.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	a.packets.mu.Lock()
	recorded := slices.Clone(a.packets.sent)
	a.packets.mu.Unlock()
	ping := append([]byte{msgPing}, "\x82\xa5SeqNo\x01\xa4Node\xa0"...)
	old := newSealer(bytes.Repeat([]byte{1}, 32), a.transport.self)
	old.counter.Store(1 << 40)
	for i := range 200 {
		garbage := make([]byte, i*8)
		rand.Read(garbage)
		stranger.Write(garbage)
		stranger.Write(ping)
		stranger.Write(old.seal(b.transport.self, ping))
		stranger.Write(recorded[i%len(recorded)])
	}
	buf := make([]byte, maxPacket)
	stranger.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
	if n, err := stranger.Read(buf); err == nil {
		t.Errorf("answered %d bytes to a stranger", n)
	}
	if !a.sees(b) || !b.sees(a) {
		t.Error("members were lost")
	}
	// The same ping from a member is answered: the silence above has its reasons.
	id, err := s.secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	self, _ := parseID(id.ID())
	member := newSealer(s.secret.GossipKey(), self)
	p := append([]byte{msgPing}, "\x83\xa5SeqNo\x01\xa4Node\xa0\xaaSourceNode\xd9\x20"...)
	p = append(p, id.ID()...)
	stranger.Write(member.seal(b.transport.self, p))
	stranger.SetReadDeadline(time.Now().Add(2 * time.Second))
	n, err := stranger.Read(buf)
	if err != nil {
		t.Fatalf("a member's ping: %v", err)
	}
	if msg, ok := newOpener(s.secret.GossipKey(), self).open(buf[:n], netip.AddrPort{}); !ok || len(msg) == 0 {
		t.Error("a member's ping is not answered to it")
	}
}

func TestSeal(t *testing.T) {
	key := bytes.Repeat([]byte{7}, 32)
	a, b, c := nodeID{1}, nodeID{2}, nodeID{3}
	s, o := newSealer(key, a), newOpener(key, b)
	from := netip.MustParseAddrPort("10.0.0.1:7000")
	p := s.seal(b, []byte("hello"))
	for i := range p {
		bad := slices.Clone(p)
		bad[i] ^= 1
		if _, ok := o.open(bad, from); ok {
			t.Errorf("opened with byte %d changed", i)
		}
	}
	if len(o.senders) != 0 {
		t.Error("forgeries are remembered")
	}
	if _, ok := newOpener(key, c).open(p, from); ok {
		t.Error("opened by another node than it was sealed for")
	}
	if _, ok := newOpener(bytes.Repeat([]byte{8}, 32), b).open(p, from); ok {
		t.Error("opened with another key")
	}
	if msg, ok := o.open(p, from); !ok || string(msg) != "hello" {
		t.Fatalf("%q, %v", msg, ok)
	}
	if _, ok := o.open(p, from); ok {
		t.Error("opened twice")
	}
	if at, ok := o.last(a); !ok || at != from {
		t.Errorf("last heard at %v", at)
	}
	if _, ok := newOpener(key, a).open(s.seal(a, []byte("x")), from); ok {
		t.Error("opened its own")
	}
	// Strangers' packets are tried at a bounded rate.
	opened := 0
	for i := range 3 * strangerBurst {
		var id nodeID
		binary.BigEndian.PutUint32(id[4:], uint32(i))
		if _, ok := o.open(newSealer(key, id).seal(b, []byte("x")), from); ok {
			opened++
		}
	}
	if opened < strangerBurst || opened > 2*strangerBurst {
		t.Errorf("%d packets of new senders in a moment", opened)
	}
}

func TestWindow(t *testing.T) {
	var w window
	for i, step := range []struct {
		n     uint64
		fresh bool
	}{
		{0, false}, {5, true}, {5, false}, {3, true}, {3, false}, {4, true}, {100, true}, {37, true}, {37, false}, {36, false},
		{101, true}, {99, true}, {100, false}, {1 << 40, true}, {101, false}, {1<<40 - 63, true}, {1<<40 - 64, false},
	} {
		if got := w.fresh(step.n); got != step.fresh {
			t.Fatalf("step %d: %d is fresh: %v", i, step.n, got)
		}
		if step.fresh {
			w.mark(step.n)
		}
	}
}

// What a member says about another, or wrongly about itself, is not believed.
func TestLiar(t *testing.T) {
	secret := trust.NewSecret()
	identity := func() *trust.Identity {
		id, err := secret.Identity()
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	me, victim, liar := identity(), identity(), identity()
	m := newMembers(me.ID(), slog.New(slog.DiscardHandler))
	own := netip.MustParseAddr("10.0.0.9")
	m.own, m.joined, m.lost = func() netip.Addr { return own }, func() {}, func(Node) {}
	entry := func(id *trust.Identity, meta []byte) *memberlist.Node {
		n, _ := parseID(id.ID())
		return &memberlist.Node{Name: id.ID(), Addr: n.overlay(), Port: overlayPort, Meta: meta}
	}
	at := func(id *trust.Identity, addr string, seq uint64) []byte {
		return encodeMeta(id, Node{Addr: netip.MustParseAddrPort(addr)}, seq)
	}
	true1 := entry(victim, at(victim, "10.0.0.1:7000", 2))
	if err := m.NotifyAlive(true1); err != nil {
		t.Fatal(err)
	}
	m.NotifyJoin(true1)
	// The liar's statement with the victim's key in it: signed by the wrong one.
	forged := at(liar, "10.6.6.6:666", 9)
	forgedKey := slices.Clone(forged)
	copy(forgedKey[len(forgedKey)-trust.SignatureSize-trust.PublicKeySize:], victim.PublicKey())
	elsewhere := entry(victim, at(victim, "10.0.0.1:7000", 3))
	elsewhere.Addr = net.IPv4(10, 6, 6, 6)
	misnamed := entry(liar, at(liar, "10.0.0.2:7000", 1))
	misnamed.Name = strings.ToUpper(misnamed.Name)
	for name, n := range map[string]*memberlist.Node{
		"the liar's words as the victim's": entry(victim, forged),
		"with the victim's key":            entry(victim, forgedKey),
		"old words of the victim":          entry(victim, at(victim, "10.0.0.1:6999", 1)),
		"two words with one number":        entry(victim, at(victim, "10.0.0.1:6999", 2)),
		"an address for memberlist":        elsewhere,
		"a name of another spelling":       misnamed,
		"no address":                       entry(liar, encodeMeta(liar, Node{}, 1)),
		"no port":                          entry(liar, at(liar, "10.0.0.2:0", 1)),
		"unspecified":                      entry(liar, at(liar, "0.0.0.0:1", 1)),
		"unspecified v6":                   entry(liar, at(liar, "[::]:1", 1)),
		"multicast":                        entry(liar, at(liar, "239.1.1.1:1", 1)),
		"multicast v6":                     entry(liar, at(liar, "[ff02::1]:1", 1)),
		"broadcast":                        entry(liar, at(liar, "255.255.255.255:1", 1)),
		"loopback":                         entry(liar, at(liar, "127.0.0.1:1", 1)),
		"loopback v6":                      entry(liar, at(liar, "[::1]:1", 1)),
		"link-local v6":                    entry(liar, at(liar, "[fe80::1]:1", 1)),
		"two spellings of an address":      entry(liar, at(liar, "[::ffff:10.0.0.1]:1", 1)),
		"nothing":                          entry(liar, nil),
	} {
		if err := m.NotifyAlive(n); !errors.Is(err, errRefused) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := m.list(); len(got) != 1 || got[0].Addr.String() != "10.0.0.1:7000" {
		t.Errorf("members: %v", got)
	}
	moved := entry(victim, at(victim, "10.0.0.3:7000", 3))
	if err := m.NotifyAlive(moved); err != nil {
		t.Fatal(err)
	}
	m.NotifyUpdate(moved)
	if got := m.list(); len(got) != 1 || got[0].Addr.String() != "10.0.0.3:7000" || !m.at(got[0].Addr) || m.at(netip.MustParseAddrPort("10.0.0.1:7000")) {
		t.Errorf("members: %v", got)
	}
}

// A member invents members: the list is bounded. A full list still takes news of those on it.
func TestListIsBounded(t *testing.T) {
	m := newMembers("", slog.New(slog.DiscardHandler))
	m.own, m.joined, m.lost = func() netip.Addr { return netip.Addr{} }, func() {}, func(Node) {}
	for i := range maxMembers {
		var id nodeID
		binary.BigEndian.PutUint32(id[:], uint32(i))
		m.live[id.String()] = &member{}
	}
	id, err := trust.NewSecret().Identity()
	if err != nil {
		t.Fatal(err)
	}
	n, _ := parseID(id.ID())
	e := &memberlist.Node{Name: id.ID(), Addr: n.overlay(), Port: overlayPort,
		Meta: encodeMeta(id, Node{Addr: netip.MustParseAddrPort("10.0.0.1:1")}, 1)}
	if err := m.NotifyAlive(e); !errors.Is(err, errRefused) {
		t.Errorf("one more than %d: %v", maxMembers, err)
	}
	delete(m.live, nodeID{}.String())
	if err := m.NotifyAlive(e); err != nil {
		t.Errorf("the last place: %v", err)
	}
}

// A member's stream that would make the node take much memory is refused before it does.
func TestHostileStreams(t *testing.T) {
	t.Parallel()
	s := newSetup()
	a := s.node(t)
	id, err := s.secret.Identity()
	if err != nil {
		t.Fatal(err)
	}
	speak := func(b string) []byte {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		d := tls.Dialer{Config: id.Client(trust.ProtoGossip)}
		c, err := d.DialContext(ctx, "tcp", a.addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(c, b); err != nil {
			t.Fatal(err)
		}
		answer, _ := io.ReadAll(c)
		return answer
	}
	const ok = "\x06\x83\xa5Nodes\x00\xacUserStateLen\x00\xa4Join\xc3"
	if got := speak(ok); len(got) == 0 || got[0] != msgPushPull {
		t.Errorf("a good list is answered %.20q", got)
	}
	for name, b := range map[string]string{
		"a million members": "\x06\x83\xa5Nodes\xce\x00\x0f\xff\xff\xacUserStateLen\x00\xa4Join\xc3",
		"state":             "\x06\x83\xa5Nodes\x00\xacUserStateLen\xce\x01\x00\x00\x00\xa4Join\xc3",
		"twice":             "\x06\x83\xa5Nodes\x00\xa5Nodes\xce\x00\x0f\xff\xff\xa4Join\xc3",
		"negative":          "\x06\x83\xa5Nodes\xd3\xff\xff\xff\xff\xff\xff\xff\xff\xacUserStateLen\x00\xa4Join\xc3",
		"compressed":        "\x09\x82\xa4Algo\x00\xa3Buf\xa0",
		"a message":         "\x08\x81\xaaUserMsgLen\x00",
	} {
		if got := speak(b); len(got) > 0 && got[0] != msgErr {
			t.Errorf("%s is answered %.40q", name, got)
		}
		if _, err := checkStream(strings.NewReader(b), false); !errors.Is(err, errStream) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Streams that say nothing are bounded, in all and for one member.
	var idle []net.Conn
	defer func() {
		for _, c := range idle {
			c.Close()
		}
	}()
	for range 3 * maxStreamsPer {
		d := tls.Dialer{Config: id.Client(trust.ProtoGossip)}
		c, err := d.Dial("tcp", a.addr())
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	within(t, 2*time.Second, "the rest is refused", func() bool {
		a.transport.mu.Lock()
		defer a.transport.mu.Unlock()
		return a.transport.inbound[id.ID()] == maxStreamsPer
	})
	b := s.node(t, a.addr())
	within(t, 2*time.Second, "another member is let in", allSee([]*node{a, b}))
}

// A stream's bytes are bounded though its header is modest.
func TestStreamIsBounded(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	s := &stream{Conn: near, done: func() {}}
	defer s.Close()
	go func() {
		io.WriteString(far, "\x06\x83\xa5Nodes\x01\xacUserStateLen\x00\xa4Join\xc3")
		chunk := make([]byte, 1<<20)
		for range 2 * maxStream >> 20 {
			if _, err := far.Write(chunk); err != nil {
				return
			}
		}
	}()
	n, err := io.Copy(io.Discard, s)
	if !errors.Is(err, errStream) || n != maxStream {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// What all streams hold together is bounded, and given back when they end.
func TestStreamsAreBoundedTogether(t *testing.T) {
	var total atomic.Int64
	const list = "\x06\x83\xa5Nodes\xcd\x9c\x40\xacUserStateLen\x00\xa4Join\xc3" // 40,000 entries
	var all []*stream
	for {
		near, far := net.Pipe()
		defer far.Close()
		go io.WriteString(far, list)
		s := &stream{Conn: near, done: func() {}, total: &total}
		all = append(all, s)
		if _, err := s.Read(make([]byte, 100)); errors.Is(err, errStream) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if n := int64(len(all)); (n-2)*2*maxMembers*entrySize > maxHeld || n < 3 {
		t.Errorf("%d lists at once", n)
	}
	for _, s := range all {
		s.Close()
		s.Close()
	}
	if total.Load() != 0 {
		t.Errorf("%d bytes were not given back", total.Load())
	}
}
