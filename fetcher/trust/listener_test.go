package trust

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func listen(t *testing.T, addr string, id *Identity) *Listener {
	t.Helper()
	l, err := Listen(addr, PortRange{}, id)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func dial(t *testing.T, l *Listener, c *tls.Config) *tls.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	d := tls.Dialer{Config: c}
	conn, err := d.DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", l.Addr().Port()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	return conn.(*tls.Conn)
}

func TestListenerRoutesByProtocol(t *testing.T) {
	a, b := identity(t, fixed()), identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := PeerID(*r.TLS)
		fmt.Fprint(w, r.Proto, " ", id, err)
	})}
	go srv.Serve(l.HTTP())
	defer srv.Close()
	for _, want := range []string{"HTTP/2.0", "HTTP/1.1"} {
		proto := ProtoHTTP
		if want == "HTTP/1.1" {
			proto = ProtoHTTP1
		}
		tr := &http.Transport{TLSClientConfig: b.Client(proto), ForceAttemptHTTP2: proto == ProtoHTTP}
		resp, err := (&http.Client{Transport: tr}).Get("https://" + l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		tr.CloseIdleConnections()
		if got := string(body); got != want+" "+b.ID()+"<nil>" {
			t.Errorf("answer %q over %s", got, want)
		}
	}
	c := dial(t, l, b.Client(ProtoSwarm))
	s, err := l.Swarm().Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	go fmt.Fprint(s, "hello")
	buf := make([]byte, 5)
	if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "hello" {
		t.Errorf("%q, %v", buf, err)
	}
}

func TestListenerSilentStrangersKeepNobodyOut(t *testing.T) {
	a := identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	for range maxPending + 20 {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	start := time.Now()
	dial(t, l, a.Client(ProtoSwarm))
	s, err := l.Swarm().Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if d := time.Since(start); d > handshakeTimeout/2 {
		t.Errorf("a member waited %v for silent strangers", d)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := len(l.pending); n > maxPending {
		t.Errorf("%d handshakes pending, bound is %d", n, maxPending)
	}
}

func TestListenerClose(t *testing.T) {
	a := identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	silent, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	queued := dial(t, l, a.Client(ProtoSwarm))
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := l.HTTP().Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept after Close: %v", err)
		}
	})
	start := time.Now()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	wg.Wait()
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("Close took %v", d)
	}
	for name, c := range map[string]net.Conn{"silent": silent, "queued": queued} {
		c.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the %s connection is still open: %v", name, err)
		}
	}
	if _, err := l.Swarm().Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

func TestListenerClosedProtocolDropsItsConnections(t *testing.T) {
	a := identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	l.Swarm().Close()
	c := dial(t, l, a.Client(ProtoSwarm))
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection for a closed protocol lives")
	}
	dial(t, l, a.Client(ProtoHTTP))
	s, err := l.HTTP().Accept()
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

func TestListenAddresses(t *testing.T) {
	a := identity(t, fixed())
	for _, c := range []struct{ addr, want string }{
		{"127.0.0.1", "127.0.0.1"},
		{"localhost", "127.0.0.1"},
		{"0.0.0.0", "0.0.0.0"},
		{"127.0.0.1:0", "127.0.0.1"},
		{"", "::"},
		{"[::]", "::"},
		{"[::]:0", "::"},
	} {
		l, err := Listen(c.addr, PortRange{}, a)
		if err != nil {
			if c.want == "::" {
				t.Logf("%q: %v (no IPv6 here?)", c.addr, err)
				continue
			}
			t.Errorf("%q: %v", c.addr, err)
			continue
		}
		if got := l.Addr(); got.Addr().String() != c.want || got.Port() == 0 {
			t.Errorf("%q: listens on %v, want %s", c.addr, got, c.want)
		}
		dial(t, l, a.Client(ProtoSwarm))
		l.Close()
	}
	if l, err := Listen("192.0.2.1", PortRange{}, a); err == nil {
		l.Close()
		t.Error("listens on an address that this machine does not have")
	}
}

func TestListenTakesTheFirstFreePort(t *testing.T) {
	a := identity(t, fixed())
	l := listen(t, "127.0.0.1", a)
	port := l.Addr().Port()
	if port == 65535 {
		t.Skip("no port above")
	}
	if _, err := Listen("127.0.0.1", PortRange{port, port}, a); err == nil {
		t.Error("the port is taken twice")
	}
	// The next ports are free in all likelihood; ten of them make it as good as certain.
	m, err := Listen("127.0.0.1", PortRange{port, min(port, 65525) + 10}, a)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.Addr().Port() <= port {
		t.Errorf("port %d, want one above %d", m.Addr().Port(), port)
	}
}

func TestParsePortRange(t *testing.T) {
	for in, want := range map[string]PortRange{
		"6881-6889": {6881, 6889}, "6881": {6881, 6881}, "0": {}, "0-0": {}, " 1 - 2 ": {1, 2}, "65535": {65535, 65535},
	} {
		got, err := ParsePortRange(in)
		if err != nil || got != want {
			t.Errorf("%q: %v, %v", in, got, err)
		}
		var r PortRange
		if err := r.UnmarshalText([]byte(got.String())); err != nil || r != got {
			t.Errorf("%q does not survive its text form %q: %v", in, got, err)
		}
	}
	for _, in := range []string{"", "-", "a", "1-", "-1", "2-1", "0-5", "65536", "1-2-3", "1.5"} {
		if got, err := ParsePortRange(in); err == nil {
			t.Errorf("%q is taken for %v", in, got)
		}
	}
}

func BenchmarkHandshake(b *testing.B) {
	s := fixed()
	client, server := identity(b, s).Client(ProtoSwarm), identity(b, s).Server(ProtoSwarm)
	for b.Loop() {
		if _, _, cerr, serr := shake(client, server); cerr != nil || serr != nil {
			b.Fatal(cerr, serr)
		}
	}
}
