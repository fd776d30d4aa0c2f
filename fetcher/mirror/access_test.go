package mirror

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
)

// A table as Linux 6 prints it: a listener, both ends of one connection, a
// connection in TIME_WAIT (whose user reads 0), and one local port that leads to
// two places.
const tcpTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1389 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 ffff8c0a 100 0 0 10 0
   1: 0100007F:9C40 0100007F:1389 01 00000000:00000000 00:00000000 00000000  1000        0 4243 1 ffff8c0b 20 4 30 10 -1
   2: 0100007F:1389 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     7        0 4244 1 ffff8c0c 20 4 30 10 -1
   3: 0100007F:9C41 0100007F:1389 06 00000000:00000000 03:000017A2 00000000     0        0 0 3 ffff8c0d
   4: 0100007F:9C42 0100007F:2328 01 00000000:00000000 00:00000000 00000000     0        0 4245 1 ffff8c0e 20 4 30 10 -1
   5: 0100007F:9C42 0100007F:1389 01 00000000:00000000 00:00000000 00000000  1001        0 4246 1 ffff8c0f 20 4 30 10 -1
   6: 0100007F:9C43 0100007F:1389 01 00000000:00000000 00:00000000 00000000  4294967294        0 4247 1 ffff8c10 20 4 30 10 -1
   7: 0100007F:9C44 0100007F:1389 01 00000000:00000000 00:00000000 00000000  nobody        0 4248 1 ffff8c11 20 4 30 10 -1
   8: 0100007F:9C45 0100007F:1389 01
`

const tcp6Table = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0000000000000000FFFF00000100007F:9C40 0000000000000000FFFF00000100007F:1389 01 00000000:00000000 00:00000000 00000000  1002        0 4249 1 ffff8c12 20 4 30 10 -1
   1: 00000000000000000000000001000000:9C40 00000000000000000000000001000000:1389 01 00000000:00000000 00:00000000 00000000  1003        0 4250 1 ffff8c13 20 4 30 10 -1
`

func TestOwner(t *testing.T) {
	for _, c := range []struct {
		name, table, local, remote string
		uid                        int
		found                      bool
	}{
		{"the client's end", tcpTable, "127.0.0.1:40000", "127.0.0.1:5001", 1000, true},
		{"asked in IPv6's clothes", tcpTable, "[::ffff:127.0.0.1]:40000", "[::ffff:127.0.0.1]:5001", 1000, true},
		{"closed", tcpTable, "127.0.0.1:40001", "127.0.0.1:5001", 0, false},
		{"a port shared with root's connection elsewhere", tcpTable, "127.0.0.1:40002", "127.0.0.1:5001", 1001, true},
		{"the largest user", tcpTable, "127.0.0.1:40003", "127.0.0.1:5001", 4294967294, true},
		{"no number", tcpTable, "127.0.0.1:40004", "127.0.0.1:5001", 0, false},
		{"cut line", tcpTable, "127.0.0.1:40005", "127.0.0.1:5001", 0, false},
		{"listener", tcpTable, "127.0.0.1:5001", "0.0.0.0:0", 0, false},
		{"another address", tcpTable, "127.0.0.2:40000", "127.0.0.1:5001", 0, false},
		{"another destination", tcpTable, "127.0.0.1:40000", "127.0.0.1:5002", 0, false},
		{"IPv4 over an IPv6 socket", tcp6Table, "127.0.0.1:40000", "127.0.0.1:5001", 1002, true},
		{"IPv6", tcp6Table, "[::1]:40000", "[::1]:5001", 1003, true},
		{"IPv6 with a zone", tcp6Table, "[::1%lo]:40000", "[::1]:5001", 1003, true},
		{"empty", "", "127.0.0.1:40000", "127.0.0.1:5001", 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			uid, found := ownerIn(bufio.NewScanner(strings.NewReader(c.table)), netip.MustParseAddrPort(c.local), netip.MustParseAddrPort(c.remote))
			if found != c.found || found && uid != c.uid {
				t.Errorf("user %d, %v; want %d, %v", uid, found, c.uid, c.found)
			}
		})
	}
}

func FuzzOwner(f *testing.F) {
	f.Add(tcpTable)
	f.Add(tcp6Table)
	f.Add("0: 0100007F:9C40 0100007F:1389 01 0 0 0 -1")
	local, remote := netip.MustParseAddrPort("127.0.0.1:40000"), netip.MustParseAddrPort("127.0.0.1:5001")
	f.Fuzz(func(t *testing.T, table string) {
		if uid, found := ownerIn(bufio.NewScanner(strings.NewReader(table)), local, remote); found && uid < 0 {
			t.Errorf("found user %d", uid)
		}
	})
}

// The kernel's own table names this process for a connection of its own.
func TestSocketOwner(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Logf("skipped: %v", err)
			continue
		}
		defer l.Close()
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		local, remote := c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
		if uid, err := socketOwner(local, remote); err != nil || uid != os.Getuid() {
			t.Errorf("%s: user %d, %v", local, uid, err)
		}
		if uid, err := socketOwner(local, local); err == nil {
			t.Errorf("a connection that is not there belongs to user %d", uid)
		}
	}
}

func TestLocalUsersOverNetwork(t *testing.T) {
	loopback := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5001}
	for _, c := range []struct {
		name, remote string
		server       net.Addr
	}{
		{"from the network", "192.0.2.7:40000", loopback},
		{"from the network, IPv6", "[2001:db8::7]:40000", loopback},
		{"no address", "@", loopback},
		{"unix socket", "127.0.0.1:40000", &net.UnixAddr{Name: "x", Net: "unix"}},
		{"no such connection", "127.0.0.1:1", loopback},
	} {
		ctx := context.WithValue(context.Background(), http.LocalAddrContextKey, c.server)
		r := (&http.Request{RemoteAddr: c.remote}).WithContext(ctx)
		if err := LocalUsers(0, os.Getuid())(r); err == nil {
			t.Errorf("%s: allowed", c.name)
		}
	}
}

func TestParseRange(t *testing.T) {
	for _, c := range []struct {
		header        string
		size          int64
		off, n        int64
		partial, fits bool
	}{
		{"", 1000, 0, 1000, false, true},
		{"bytes=0-", 1000, 0, 1000, true, true},
		{"bytes=0-0", 1000, 0, 1, true, true},
		{"bytes=10-19", 1000, 10, 10, true, true},
		{"bytes=999-999", 1000, 999, 1, true, true},
		{"bytes=999-5000", 1000, 999, 1, true, true},
		{"bytes=500-", 1000, 500, 500, true, true},
		{"bytes=0-99999999999999999999999", 1000, 0, 1000, true, true},
		{"bytes=-1", 1000, 999, 1, true, true},
		{"bytes=-1000", 1000, 0, 1000, true, true},
		{"bytes=-5000", 1000, 0, 1000, true, true},
		{"bytes=-99999999999999999999999", 1000, 0, 1000, true, true},
		// outside
		{"bytes=1000-", 1000, 0, 0, false, false},
		{"bytes=1000-2000", 1000, 0, 0, false, false},
		{"bytes=99999999999999999999999-", 1000, 0, 0, false, false},
		{"bytes=-0", 1000, 0, 0, false, false},
		{"bytes=0-", 0, 0, 0, false, false},
		{"bytes=-5", 0, 0, 0, false, false},
		// none of one range: whole
		{"bytes=5-4", 1000, 0, 1000, false, true},
		{"bytes=0-1,5-6", 1000, 0, 1000, false, true},
		{"bytes=0-1, -2", 1000, 0, 1000, false, true},
		{"bytes=-", 1000, 0, 1000, false, true},
		{"bytes=--5", 1000, 0, 1000, false, true},
		{"bytes=+1-5", 1000, 0, 1000, false, true},
		{"bytes=a-b", 1000, 0, 1000, false, true},
		{"bytes=1-b", 1000, 0, 1000, false, true},
		{"bytes=-b", 1000, 0, 1000, false, true},
		{"bytes=0x1-5", 1000, 0, 1000, false, true},
		{"bytes= 1-5", 1000, 0, 1000, false, true},
		{"bytes=1", 1000, 0, 1000, false, true},
		{"bytes", 1000, 0, 1000, false, true},
		{"items=0-5", 1000, 0, 1000, false, true},
	} {
		off, n, partial, fits := parseRange(c.header, c.size)
		if fits != c.fits || partial != c.partial || fits && (off != c.off || n != c.n) {
			t.Errorf("%q of %d: %d+%d, partial %v, fits %v", c.header, c.size, off, n, partial, fits)
		}
	}
}

func FuzzParseRange(f *testing.F) {
	f.Add("bytes=0-", int64(10))
	f.Add("bytes=-5", int64(3))
	f.Add("bytes=7-99999999999999999999", int64(8))
	f.Fuzz(func(t *testing.T, header string, size int64) {
		size = max(size, 0)
		off, n, partial, fits := parseRange(header, size)
		if fits && (off < 0 || n < 0 || off+n > size || off+n < 0) || partial && n == 0 {
			t.Errorf("%q of %d: %d+%d, partial %v", header, size, off, n, partial)
		}
		if fits && !partial && (off != 0 || n != size) {
			t.Errorf("%q of %d: whole is %d+%d", header, size, off, n)
		}
	})
}

func FuzzSplit(f *testing.F) {
	f.Add("/v2/team/app/manifests/1")
	f.Add("/v2/manifests/blobs/sha256:00")
	f.Add("/v2//blobs/x")
	f.Fuzz(func(t *testing.T, path string) {
		name, kind, what, ok := split(path)
		if ok && "/v2/"+name+"/"+kind+"/"+what != path {
			t.Errorf("%q is %q, %q, %q", path, name, kind, what)
		}
		if ok && (strings.Contains(what, "/") || name == "" || what == "") {
			t.Errorf("%q has %q, %q", path, name, what)
		}
	})
}
