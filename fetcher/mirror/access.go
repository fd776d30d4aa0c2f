package mirror

import (
	"bufio"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// refuse answers in the error form of the OCI distribution specification.
func refuse(w http.ResponseWriter, status int, code, message string) {
	for _, h := range []string{"Content-Length", "Content-Range", "Docker-Content-Digest", "Etag"} {
		if h != "Content-Range" || status != http.StatusRequestedRangeNotSatisfiable {
			w.Header().Del(h)
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{
		"errors": []map[string]string{{"code": code, "message": message}},
	})
}

// LocalUsers allows requests over loopback from processes of the given users
// (numeric user IDs) of this machine, and no others. A loopback port is open to
// every local user, while the mirror reads with the node's credentials: the
// kernel's table of TCP sockets (/proc/net/tcp, tcp6) says whose the other end
// is.
func LocalUsers(uids ...int) func(*http.Request) error {
	return func(r *http.Request) error {
		client, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil || !client.Addr().Unmap().IsLoopback() {
			return errors.New("this mirror serves its own machine only")
		}
		addr, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if addr == nil {
			return errors.New("cannot tell whose connection this is: it is not a TCP connection")
		}
		uid, err := socketOwner(client, addr.AddrPort())
		if err != nil {
			return fmt.Errorf("cannot tell whose connection this is: %w", err)
		}
		if !slices.Contains(uids, uid) {
			return fmt.Errorf("user %d may not use this node's registry credentials: use `docker quay pull`, which uses your own", uid)
		}
		return nil
	}
}

// socketOwner returns the user ID that owns the socket of a connection. Both
// ends count: the kernel gives one local port to several users' connections as
// long as they lead elsewhere.
func socketOwner(local, remote netip.AddrPort) (int, error) {
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			return 0, err
		}
		uid, found := ownerIn(bufio.NewScanner(f), local, remote)
		_ = f.Close()
		if found {
			return uid, nil
		}
	}
	return 0, fmt.Errorf("no socket of this machine leads from %s to %s", local, remote)
}

// established is the TCP state of /proc/net/tcp (include/net/tcp_states.h).
const established = "01"

// ownerIn looks a connection up in the lines of /proc/net/tcp or tcp6:
//
//	sl  local_address rem_address   st tx_queue:rx_queue tr:tm->when retrnsmt   uid …
func ownerIn(lines *bufio.Scanner, local, remote netip.AddrPort) (uid int, found bool) {
	local, remote = unmapped(local), unmapped(remote)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 8 || f[3] != established {
			continue
		}
		if from, ok := kernelAddr(f[1]); !ok || from != local {
			continue
		}
		if to, ok := kernelAddr(f[2]); !ok || to != remote {
			continue
		}
		uid, err := strconv.ParseUint(f[7], 10, 32)
		return int(uid), err == nil
	}
	return 0, false
}

// unmapped is an address as an IPv4 one if it is one in IPv6's clothes, and
// without a zone, which the kernel's table does not have.
func unmapped(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}

// kernelAddr reads HEXADDRESS:HEXPORT, the address in 32-bit words of the
// machine's byte order (little-endian on every platform this is built for).
func kernelAddr(s string) (netip.AddrPort, bool) {
	a, p, ok := strings.Cut(s, ":")
	if !ok {
		return netip.AddrPort{}, false
	}
	raw, err := hex.DecodeString(a)
	port, perr := strconv.ParseUint(p, 16, 16)
	if err != nil || perr != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		slices.Reverse(raw[i : i+4])
	}
	addr, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr.Unmap(), uint16(port)), true
}
