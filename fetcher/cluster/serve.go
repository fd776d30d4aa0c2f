package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// maxRead bounds one ranged read by a member, in bytes: a demand read is a few
// pieces, a bulk read a MiB.
const maxRead = 16 << 20

// throughHeader asks a member to get what it does not hold from the registry.
const throughHeader = "Quay-Read-Through"

// statementsHeader asks, and in the answer carries, what the member says of the
// pieces of a ranged read: statements in JSON, in base64.
const statementsHeader = "Quay-Statements"

// Handler serves the node's side of the protocol. It must only ever be reached
// through mutual TLS with the cluster's identity: the peer's node ID is taken
// from its certificate.
func (c *Cluster) Handler() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /quay/v1/announce", c.serveAnnounce)
	mux.HandleFunc("POST /quay/v1/holds", c.serveHolds)
	mux.HandleFunc("POST /quay/v1/statements", c.serveStatements)
	mux.HandleFunc("GET /quay/v1/blobs/{digest}", c.serveBlob)
	mux.HandleFunc("GET /quay/v1/indexes/{digest}", c.serveIndex)
	c.serveErrands(mux)
	return mux
}

// sender names who asks and where it can be reached in turn: as membership knows
// it, else in its own words, with the address its connection comes from unless it
// names another.
func (c *Cluster) sender(r *http.Request, e envelope) (Member, error) {
	if r.TLS == nil {
		return Member{}, errors.New("no TLS")
	}
	id, err := c.o.PeerID(*r.TLS)
	if err != nil {
		return Member{}, err
	}
	members := c.Members()
	if i, ok := slices.BinarySearchFunc(members, id, func(m Member, id string) int { return compareIDs(m.ID, id) }); ok {
		return members[i], nil
	}
	seen, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return Member{}, err
	}
	m := Member{
		ID: id, Addr: netip.AddrPortFrom(seen.Addr().Unmap(), e.Port),
		Zone: e.Zone, Ephemeral: e.Ephemeral, Origin: e.Reach,
	}
	if ap := specified(e.Addr); ap.IsValid() && ap.Port() != 0 {
		m.Addr = ap
	}
	if err := validMember(m); err != nil {
		return m, err
	}
	// News of a member may come later than its first words: what it says stays.
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.early) < maxEarly {
		c.early[id] = time.Now()
	}
	return m, nil
}

func (c *Cluster) serveAnnounce(w http.ResponseWriter, r *http.Request) {
	var a announce
	err := decode(r.Body, &a)
	if err == nil {
		err = a.Announcement.validate()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	from, err := c.sender(r, a.envelope)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	if k := c.better(a.Announcement.Digest); k != nil && k.ID != from.ID && !a.Insist {
		respond(w, Reply{Digest: a.Announcement.Digest, Elsewhere: k})
		return
	}
	ans := c.keep(from, a.Announcement, a.Insist)
	if ans.Next > KeptOpen {
		w.Header().Set("Connection", "close")
	}
	respond(w, ans)
}

func (c *Cluster) serveHolds(w http.ResponseWriter, r *http.Request) {
	var h holds
	err := decode(r.Body, &h)
	if err == nil {
		err = h.validate()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	from, err := c.sender(r, h.envelope)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return
	}
	c.mu.Lock()
	c.book.Hold(time.Now(), from, h.Holds)
	c.mu.Unlock()
	respond(w, struct{}{})
}

func (c *Cluster) serveStatements(w http.ResponseWriter, r *http.Request) {
	var q statementsQuery
	err := decode(r.Body, &q)
	if err == nil {
		err = q.validate()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	said := c.o.Holder.Statements(r.Context(), q.Digest, q.Size, q.Pieces)
	respond(w, said[:min(len(said), maxStatements)])
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
	var vouch func([]Statement)
	if r.Header.Get(statementsHeader) != "" {
		vouch = func(said []Statement) { w.Header().Set(statementsHeader, statementsFor(said)) }
	}
	lw := &lateHeader{w: w, write: func() {
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", off, off+n-1))
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		w.WriteHeader(http.StatusPartialContent)
	}}
	err = c.o.Holder.ReadHeld(r.Context(), lw, vouch, d, off, n, r.Header.Get(throughHeader) != "")
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
