package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// maxRead bounds one ranged read by a member, in bytes: a demand read is a few
// pieces; whole blobs go by BitTorrent, where the window is.
const maxRead = 16 << 20

// throughHeader asks a member to get what it does not hold from the registry.
const throughHeader = "Quay-Read-Through"

// Handler serves the node's side of the protocol. It must only ever be reached
// through mutual TLS with the cluster's identity: the peer's node ID is taken
// from its certificate.
func (c *Cluster) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /quay/v1/hello", c.serveHello)
	mux.HandleFunc("POST /quay/v1/announce", c.serveAnnounce)
	mux.HandleFunc("GET /quay/v1/blobs/{digest}", c.serveBlob)
	return mux
}

// sender names who asks and where it can be reached in turn.
func (c *Cluster) sender(r *http.Request, port uint16, addr netip.AddrPort) (Member, error) {
	if r.TLS == nil {
		return Member{}, errors.New("no TLS")
	}
	id, err := c.o.PeerID(*r.TLS)
	if err != nil {
		return Member{}, err
	}
	seen, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return Member{}, err
	}
	m := Member{ID: id, Addr: netip.AddrPortFrom(seen.Addr().Unmap(), port)}
	if addr.IsValid() && !addr.Addr().IsUnspecified() && addr.Port() != 0 {
		m.Addr = addr
	}
	return m, nil
}

func (c *Cluster) serveHello(w http.ResponseWriter, r *http.Request) {
	var h hello
	if err := decode(r.Body, &h); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	from, err := c.sender(r, h.Port, h.Addr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	members := c.Members()
	c.saw(from)
	respond(w, hello{ID: c.o.ID, Members: members})
}

func (c *Cluster) serveAnnounce(w http.ResponseWriter, r *http.Request) {
	var a announce
	err := decode(r.Body, &a)
	if err == nil {
		err = a.validate()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	from, err := c.sender(r, a.Port, a.Addr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	c.saw(from)
	respond(w, c.o.Holder.Announced(r.Context(), from, a.Announcement))
}

func (c *Cluster) serveBlob(w http.ResponseWriter, r *http.Request) {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		http.Error(w, "malformed digest", http.StatusBadRequest)
		return
	}
	off, n, err := parseRange(r.Header.Get("Range"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	// The header goes out with the first byte, so that a refusal can still
	// choose its status.
	lw := &lateHeader{w: w, write: func() {
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", off, off+n-1))
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		w.WriteHeader(http.StatusPartialContent)
	}}
	err = c.o.Holder.ReadHeld(r.Context(), lw, d, off, n, r.Header.Get(throughHeader) != "")
	if err != nil && lw.write != nil {
		http.Error(w, ErrNotHeld.Error(), http.StatusNotFound)
	} else if err != nil {
		// The status is gone already: cut the connection so that the reader
		// sees a short body.
		panic(http.ErrAbortHandler)
	}
}

type lateHeader struct {
	w     http.ResponseWriter
	write func()
}

func (l *lateHeader) Write(p []byte) (int, error) {
	if l.write != nil {
		l.write()
		l.write = nil
	}
	return l.w.Write(p)
}

// parseRange reads the one form of Range that members send: bytes=FIRST-LAST.
func parseRange(s string) (off, n int64, err error) {
	bad := fmt.Errorf("%w: range %.40q", ErrMessage, s)
	spec, ok := strings.CutPrefix(s, "bytes=")
	if !ok {
		return 0, 0, bad
	}
	first, last, ok := strings.Cut(spec, "-")
	if !ok {
		return 0, 0, bad
	}
	a, err1 := strconv.ParseUint(first, 10, 63)
	b, err2 := strconv.ParseUint(last, 10, 63)
	if err1 != nil || err2 != nil || b < a || b-a >= maxRead {
		return 0, 0, bad
	}
	return int64(a), int64(b-a) + 1, nil
}

func respond(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
