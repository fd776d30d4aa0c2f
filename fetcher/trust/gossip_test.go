package trust

import (
	"io"
	"net"
	"testing"
	"time"
)

func TestListenerGossip(t *testing.T) {
	a, b := identity(t, fixed()), identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	c := dial(t, l, b.Client(ProtoGossip))
	s, err := l.Gossip().Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go io.WriteString(s, "hello")
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		t.Errorf("%q, %v", buf, err)
	}
}

func TestListenerPackets(t *testing.T) {
	a := identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	if got := l.Packets().LocalAddr().(*net.UDPAddr).AddrPort(); got != l.Addr() {
		t.Fatalf("packets at %v, streams at %v", got, l.Addr())
	}
	c, err := net.Dial("udp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "hello")
	buf := make([]byte, 16)
	l.Packets().SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, _, err := l.Packets().ReadFrom(buf); err != nil || string(buf[:n]) != "hello" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if err := l.Packets().Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("Close after the reader closed the packets: %v", err)
	}
	var none *Listener
	if none.Packets() != nil {
		t.Error("a nil Listener has packets")
	}
}

// A port whose UDP half is taken is passed over, and its TCP half given back.
func TestListenWantsBothHalves(t *testing.T) {
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	port := uint16(udp.LocalAddr().(*net.UDPAddr).Port)
	if port > 65525 {
		t.Skip("no ports above")
	}
	a := identity(t, fixed())
	l, err := Listen("127.0.0.1", PortRange{port, port + 10}, a)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l.Addr().Port() <= port {
		t.Errorf("took port %d, whose UDP half is %d", l.Addr().Port(), port)
	}
	if _, err := Listen("127.0.0.1", PortRange{port, port}, a); err == nil {
		t.Error("listens without its UDP half")
	}
	tcp, err := net.Listen("tcp4", udp.LocalAddr().String())
	if err != nil {
		t.Fatalf("the TCP half was kept: %v", err)
	}
	tcp.Close()
}

func TestSign(t *testing.T) {
	a, b := identity(t, fixed()), identity(t, fixed())
	sig := a.Sign("x", []byte("hello"))
	if !Verify(a.ID(), a.PublicKey(), "x", []byte("hello"), sig) {
		t.Fatal("a's signature does not hold")
	}
	for name, ok := range map[string]bool{
		"another ID":      Verify(b.ID(), a.PublicKey(), "x", []byte("hello"), sig),
		"another key":     Verify(b.ID(), b.PublicKey(), "x", []byte("hello"), sig),
		"another label":   Verify(a.ID(), a.PublicKey(), "y", []byte("hello"), sig),
		"another message": Verify(a.ID(), a.PublicKey(), "x", []byte("hullo"), sig),
		"a short key":     Verify(a.ID(), a.PublicKey()[1:], "x", []byte("hello"), sig),
		"a cut signature": Verify(a.ID(), a.PublicKey(), "x", []byte("hello"), sig[1:]),
	} {
		if ok {
			t.Errorf("holds for %s", name)
		}
	}
}
