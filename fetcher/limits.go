package fetcher

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/gossip"
)

const (
	// DefaultConnections bounds the connections of a node unless told otherwise:
	// twenty images of ten layers that each have 20 peers, and far below
	// what a process may open files.
	DefaultConnections = 4096
	// LeastConnections is the smallest bound that a node works with: see places.
	LeastConnections = 16
	// DefaultConnectionsPerBlob bounds the BitTorrent connections of one blob: more than the
	// neighbours that a keeper names.
	DefaultConnectionsPerBlob = 50
	// patientShare is the part of a configured rate that a fetch must fall short of
	// before its peers count as slow: a limit of this node is no fault of theirs.
	patientShare = 0.5
)

// CheckZone says what is wrong with the name of a zone.
func CheckZone(zone string) error { return gossip.CheckZone(zone) }

// checkLimits says which limit makes no sense.
func (o *Options) checkLimits() error {
	for _, l := range []struct {
		name string
		n    int64
	}{
		{"upload rate", o.UploadRate}, {"download rate", o.DownloadRate},
		{"upload rate of a blob", o.UploadRatePerBlob}, {"download rate of a blob", o.DownloadRatePerBlob},
		{"number of connections", int64(o.Connections)}, {"number of connections of a blob", int64(o.ConnectionsPerBlob)},
	} {
		if l.n < 0 {
			return fmt.Errorf("the limit of the %s is %d, which is below 0", l.name, l.n)
		}
	}
	if o.Connections > 0 && o.Connections < LeastConnections {
		return fmt.Errorf("a node does not work with %d connections: allow %d or more", o.Connections, LeastConnections)
	}
	return nil
}

// places splits the connections a node may have: half for BitTorrent, which tells who
// has what, the rest for calls and ranged reads, half of them by others and half of
// this node's. Of its own at most every second one is a bulk read: so a busy swarm
// keeps no container's read from a peer, and no peer's from this node.
func (o *Options) places() (swarm, in, out int) {
	n := o.Connections
	if n == 0 {
		n = DefaultConnections
	}
	in = n / 4
	return n - 2*in, in, in
}

func (o *Options) perBlob() int {
	if o.ConnectionsPerBlob == 0 {
		return DefaultConnectionsPerBlob
	}
	return o.ConnectionsPerBlob
}

// limited returns r slowed to the download rates of the node and of the blob.
func (d *download) limited(ctx context.Context, r io.Reader) io.Reader {
	return limitedBy(ctx, r, d.f.down, d.down)
}

// limitedBody does the same for what a member sends of a blob.
func (f *Fetcher) limitedBody(ctx context.Context, dg digest.Digest, r io.Reader) io.Reader {
	f.mu.Lock()
	d := f.downloads[dg]
	f.mu.Unlock()
	if d == nil {
		return limitedBy(ctx, r, f.down)
	}
	if d.down == nil && f.down == nil {
		return r
	}
	return &slowReader{d.limited(ctx, r), d}
}

// slowReader is what a member sends to a node that takes it slowly.
type slowReader struct {
	io.Reader
	d *download
}

func (s *slowReader) Read(p []byte) (int, error) {
	n, err := s.Reader.Read(p)
	if n > 0 {
		s.d.slowly()
	}
	return n, err
}

// slowly notes that bytes come, though no whole piece: within this node's own limits
// one can take longer than peers may be silent.
func (d *download) slowly() {
	now := time.Now()
	d.lastPiece.set(now)
	d.lastPeerPiece.set(now)
}

func limitedBy(ctx context.Context, r io.Reader, limits ...*rate.Limiter) io.Reader {
	for _, l := range limits {
		if l != nil {
			r = &limitedReader{ctx, r, l}
		}
	}
	return r
}

type limitedReader struct {
	ctx context.Context
	r   io.Reader
	l   *rate.Limiter
}

func (l *limitedReader) Read(p []byte) (int, error) {
	n, err := l.r.Read(p[:min(len(p), burst)])
	if n > 0 {
		if werr := l.l.WaitN(l.ctx, n); werr != nil {
			return n, werr
		}
	}
	return n, err
}

// pay waits until n bytes are within a limit, which may be nil.
func pay(ctx context.Context, l *rate.Limiter, n int) error {
	for l != nil && n > 0 {
		k := min(n, burst)
		if err := l.WaitN(ctx, k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// slowBelow is the rate in bytes a second below which a swarm counts as slower than
// the registry: less than usual when this node's own limits are what slows it.
func (d *download) slowBelow() float64 {
	below := float64(hungryBelow)
	for _, l := range []*rate.Limiter{d.f.down, d.down} {
		if l != nil {
			below = min(below, patientShare*float64(l.Limit()))
		}
	}
	return below
}

// inbound is the node's HTTP port with a bound on its connections. When all places
// are taken, the connection that has been idle for longest is closed for a new
// one; when none is idle the new one is closed, and who made it asks another node.
type inbound struct {
	net.Listener
	most int

	mu   sync.Mutex // guards following
	open map[net.Conn]time.Time
}

func newInbound(l net.Listener, most int) *inbound {
	return &inbound{Listener: l, most: most, open: map[net.Conn]time.Time{}}
}

// Accept implements net.Listener. The connections are those of the listener
// beneath, since net/http looks for TLS in them.
func (l *inbound) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if l.admit(c) {
			return c, nil
		}
		_ = c.Close()
	}
}

func (l *inbound) admit(c net.Conn) bool {
	l.mu.Lock()
	var idlest net.Conn
	if len(l.open) >= l.most {
		for o, since := range l.open {
			if !since.IsZero() && (idlest == nil || since.Before(l.open[idlest])) {
				idlest = o
			}
		}
		if idlest == nil {
			l.mu.Unlock()
			return false
		}
		delete(l.open, idlest)
	}
	l.open[c] = time.Time{}
	l.mu.Unlock()
	if idlest != nil {
		_ = idlest.Close()
	}
	return true
}

// state is for http.Server.ConnState.
func (l *inbound) state(c net.Conn, s http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ours := l.open[c]; !ours {
		return
	}
	switch s {
	case http.StateIdle:
		l.open[c] = time.Now()
	case http.StateActive:
		l.open[c] = time.Time{}
	case http.StateClosed, http.StateHijacked:
		delete(l.open, c)
	}
}

func (l *inbound) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}
