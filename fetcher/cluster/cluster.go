package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// callTimeout bounds one small exchange with a member. A member that takes
	// longer is slower than the registry and not worth waiting for.
	callTimeout = 2 * time.Second
	// dialTimeout bounds the TCP and TLS set-up with a member.
	dialTimeout = 2 * time.Second
	// idleConns is how many idle connections to members are kept.
	idleConns = 128
	// keepers is how many members keep the list of a blob: the first lends, the
	// second knows the holders when the first goes. A third is asked when both are
	// gone at once.
	keepers, keepersAsked = 2, 3
	// suspectFor is how long a member that did not answer is passed over as a
	// keeper; by then membership knows whether it is gone.
	suspectFor = 10 * time.Second
	// tellSoon is how long after a change among the members a node tells new keepers
	// what it holds.
	tellSoon = 50 * time.Millisecond
	// tellAgain is when it tries again to tell a keeper that did not answer.
	tellAgain = 2 * time.Second
	// maxEarly bounds the members whose first words came before the news of them.
	maxEarly = 1024
	// youngFor is how long after a change among the members a keeper that hears of
	// a fetch for the first time takes into account that another one kept it.
	youngFor = 10 * time.Second
)

// ErrNotHeld is the answer to a ranged read of pieces the member does not hold.
var ErrNotHeld = errors.New("the member does not hold that range")

// Membership tells who is a member now; package gossip has one.
type Membership interface {
	// Self is this node.
	Self() Member
	// Members are the live members but this one, in the order of their IDs. It is
	// asked often and must be quick; the caller does not change the result.
	Members() []Member
	// Changed is closed at the next change of Members or Self.
	Changed() <-chan struct{}
}

// Holder is what the node itself knows of blobs; the fetcher is one.
type Holder interface {
	// ReadHeld writes size bytes of a blob from off to w, all of which the node
	// holds, or, with through set, can get from the registry at once;
	// ErrNotHeld, before anything was written, otherwise. Before the first byte it
	// calls vouch, unless nil, with statements about the pieces of the range.
	ReadHeld(ctx context.Context, w io.Writer, vouch func([]Statement), d digest.Digest, off, size int64, through bool) error
	// Statements returns what the node can say, or has been told, of the content
	// of those pieces; some or none.
	Statements(ctx context.Context, d digest.Digest, size int64, pieces []int) []Statement
	// Complete lists blobs that the node holds wholly and gives to others.
	Complete() []Hold
}

// Options configures a Cluster. All fields but Errands, Body, Connections and Log
// are required.
type Options struct {
	Membership Membership
	// PeerID names the other side of a verified connection.
	PeerID func(tls.ConnectionState) (string, error)
	// Client is the TLS configuration to reach members with.
	Client *tls.Config
	// Holder answers for this node's blobs.
	Holder Holder
	// Errands is what this node does for members that cannot reach a registry;
	// nil: nothing.
	Errands Errands
	// Body slows what a member sends of a blob to the rates of this node; nil: not.
	Body func(ctx context.Context, d digest.Digest, r io.Reader) io.Reader
	// Connections bounds those to members; 0: no bound.
	Connections int
	Log         *slog.Logger
}

// Cluster is this node's view of the members. It is safe for concurrent use.
type Cluster struct {
	o      Options
	client *http.Client
	dialer *dialer
	// indexes holds one for each index that is being given.
	indexes chan struct{}
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	calls   Calls

	mu      sync.Mutex // guards following
	book    *Book
	suspect map[string]time.Time // members that did not answer, and when
	changed time.Time            // when the members last changed
	early   map[string]time.Time // who spoke before membership knew of it, and when
}

// New starts a node's part in the cluster. Handler's result must be served on the
// node's TLS port.
func New(o Options) *Cluster {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cluster{
		o: o, book: NewBook(rand.Uint64()), suspect: map[string]time.Time{}, early: map[string]time.Time{},
		indexes: make(chan struct{}, indexesAtOnce),
	}
	c.dialer = newDialer(o.Connections)
	c.client = &http.Client{Transport: &http.Transport{
		DialContext:         c.dialer.dial,
		TLSClientConfig:     o.Client,
		TLSHandshakeTimeout: dialTimeout,
		// HTTP/1.1 on purpose: a demand read must not share a connection,
		// and with it a congestion window, with another.
		MaxIdleConnsPerHost: 8,
		MaxIdleConns:        idleConns,
		IdleConnTimeout:     time.Minute,
	}}
	c.dialer.idle = c.client.CloseIdleConnections
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.wg.Go(c.watch)
	return c
}

// Close ends what runs and drops idle connections.
func (c *Cluster) Close() {
	c.cancel()
	c.wg.Wait()
	c.client.CloseIdleConnections()
}

// ID returns this node's own ID.
func (c *Cluster) ID() string { return c.o.Membership.Self().ID }

// Members returns the other live members, in the order of their IDs. The caller
// does not change the result.
func (c *Cluster) Members() []Member { return c.o.Membership.Members() }

// Member returns another live member by its ID.
func (c *Cluster) Member(id string) (Member, bool) {
	members := c.Members()
	i, ok := slices.BinarySearchFunc(members, id, func(m Member, id string) int { return compareIDs(m.ID, id) })
	if !ok {
		return Member{}, false
	}
	return members[i], true
}

// watch follows the membership: the book forgets who left, and keepers that are
// new are told of the complete blobs here.
func (c *Cluster) watch() {
	told := map[digest.Digest][keepers]string{}
	next := time.NewTimer(tellSoon)
	defer next.Stop()
	refresh := time.NewTimer(HoldEvery - rand.N(HoldEvery/5))
	defer refresh.Stop()
	again := time.NewTimer(youngFor)
	defer again.Stop()
	// A change while this node tells is one to act on afterwards: the channel is
	// renewed only before the members are looked at.
	changed := c.o.Membership.Changed()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-again.C:
			// Once more when the members have settled: a keeper may have heard of
			// this node's blobs while it took another for their keeper, or for gone.
			c.retain()
			clear(told)
		case <-changed:
			changed = c.o.Membership.Changed()
			c.mu.Lock()
			c.changed = time.Now()
			c.mu.Unlock()
			c.retain()
			again.Reset(youngFor)
			// Members come and go in groups: tell once for all of them. In a large
			// cluster not all at the same moment.
			spread := tellSoon + time.Duration(len(c.Members()))*time.Millisecond
			next.Reset(tellSoon + rand.N(min(spread, time.Second)))
			continue
		case <-refresh.C:
			clear(told)
			refresh.Reset(HoldEvery - rand.N(HoldEvery/5))
		case <-next.C:
		}
		if !c.tell(told) {
			next.Reset(tellAgain)
		}
	}
}

// retain forgets who is no member, and has not spoken just before it became one.
func (c *Cluster) retain() {
	live := map[string]bool{c.ID(): true}
	for _, m := range c.Members() {
		live[m.ID] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, at := range c.early {
		if time.Since(at) < youngFor {
			live[id] = true
		} else {
			delete(c.early, id)
		}
	}
	c.book.Retain(func(id string) bool { return live[id] })
	for id := range c.suspect {
		if !live[id] {
			delete(c.suspect, id)
		}
	}
}

// tell registers this node's complete blobs with those of their keepers that
// have not been told. It reports whether all of them took it.
func (c *Cluster) tell(told map[digest.Digest][keepers]string) bool {
	all := true
	byKeeper := map[string][]Hold{}
	members := map[string]Member{}
	self := c.o.Membership.Self()
	complete := c.o.Holder.Complete()
	have := make(map[digest.Digest]bool, len(complete))
	for _, h := range complete {
		have[h.Digest] = true
		var now [keepers]string
		for i, m := range c.Keepers(h.Digest) {
			if i >= keepers {
				break
			}
			now[i] = m.ID
			if !slices.Contains(slices.Collect(values(told[h.Digest])), m.ID) {
				byKeeper[m.ID] = append(byKeeper[m.ID], h)
				members[m.ID] = m
			}
		}
		told[h.Digest] = now
	}
	for d := range told {
		if !have[d] {
			delete(told, d)
		}
	}
	for id, hs := range byKeeper {
		for part := range slices.Chunk(hs, maxHolds) {
			if id == self.ID {
				c.mu.Lock()
				c.book.Hold(time.Now(), self, part)
				c.mu.Unlock()
				continue
			}
			var none struct{}
			if _, err := c.call(c.ctx, members[id], "/quay/v1/holds", holds{c.envelope(), part}, &none); err != nil {
				c.o.Log.Debug("keeper does not take the list of complete blobs", "node", id, "err", err)
				for _, h := range part {
					delete(told, h.Digest)
				}
				all = false
			}
		}
	}
	return all
}

func values(a [keepers]string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, v := range a {
			if !yield(v) {
				return
			}
		}
	}
}

// Keepers ranks the members, this node among them, that keep a blob's list.
func (c *Cluster) Keepers(d digest.Digest) []Member {
	return Keepers(d, func(yield func(Member) bool) {
		if !yield(c.o.Membership.Self()) {
			return
		}
		for _, m := range c.Members() {
			if !yield(m) {
				return
			}
		}
	})
}

// Keeper returns the member that keeps a blob's list now; this node it may be.
func (c *Cluster) Keeper(d digest.Digest) Member { return c.Keepers(d)[0] }

// Announce tells a blob's keeper of this node's part in it, and returns the
// keeper's answer. When one keeper does not answer, the next in rank is asked.
func (c *Cluster) Announce(ctx context.Context, a Announcement) (Reply, error) {
	if a.Size > maxBlobSize {
		return Reply{}, fmt.Errorf("%s: blobs of more than %d bytes are not shared", a.Digest, int64(maxBlobSize))
	}
	self := c.o.Membership.Self()
	ks := c.Keepers(a.Digest)
	insist := false
	var last error
	for tries := 0; len(ks) > 0 && tries < 2*keepersAsked; tries++ {
		k := ks[0]
		ks = ks[1:]
		if k.ID == self.ID {
			return c.keep(self, a, insist), nil
		}
		if c.suspected(k.ID) && len(ks) > 0 {
			insist = true
			continue
		}
		var ans Reply
		msg := announce{c.envelope(), a}
		msg.Insist = insist
		_, err := c.call(ctx, k, "/quay/v1/announce", msg, &ans)
		if err == nil {
			err = ans.validate(a.Digest, a.Size)
		}
		switch {
		case err == nil && ans.Elsewhere != nil && !insist:
			ks = append([]Member{*ans.Elsewhere}, ks...)
			insist = true // once
			continue
		case err == nil:
			return ans, nil
		case ctx.Err() != nil:
			return Reply{}, ctx.Err()
		}
		c.o.Log.Debug("keeper does not answer", "node", k.ID, "addr", k.Addr, "err", err)
		c.suspects(k.ID)
		last, insist = err, true
	}
	if last == nil {
		last = errors.New("no member keeps its list")
	}
	return Reply{}, last
}

// keep answers an announcement as the blob's keeper.
func (c *Cluster) keep(from Member, a Announcement, insist bool) Reply {
	first, members := c.Keeper(a.Digest).ID == c.ID(), len(c.Members())+1
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if !first && c.book.Busy(now, a.Digest) < StandIn(members) {
		// As far as membership knows the first keeper lives, and is only too busy
		// for some. Two that lend at the same time would be two copies; what this
		// one can do until it is known better is name peers.
		a.Want, a.Hungry = 0, false
	}
	// A fetch that is under way already, or a keeper that left lately, means that
	// segments may be out that this book does not know of.
	fresh := a.Claimed.Count() > 0 || insist || now.Sub(c.changed) < youngFor && a.Have > 0
	return c.book.Announce(now, from, a, fresh)
}

// better returns the keeper of a blob when this node is not it, and the one that
// is has not failed to answer lately.
func (c *Cluster) better(d digest.Digest) *Member {
	k := c.Keeper(d)
	if k.ID == c.ID() || c.suspected(k.ID) {
		return nil
	}
	return &k
}

func (c *Cluster) suspected(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.suspect[id]) < suspectFor
}

func (c *Cluster) suspects(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.suspect[id] = time.Now()
}

func (c *Cluster) envelope() envelope {
	m := c.o.Membership.Self()
	return envelope{Port: m.Addr.Port(), Addr: specified(m.Addr), Zone: m.Zone, Ephemeral: m.Ephemeral, Reach: m.Origin}
}

// specified returns ap unless its address is one that only listeners use.
func specified(ap netip.AddrPort) netip.AddrPort {
	if !ap.IsValid() || ap.Addr().IsUnspecified() {
		return netip.AddrPort{}
	}
	return ap
}

// call posts one message to a member and decodes the answer. It fails when
// somebody else answers at the member's address.
func (c *Cluster) call(ctx context.Context, m Member, path string, msg, answer any) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	body, err := json.Marshal(msg)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+m.Addr.String()+path, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	begun := time.Now()
	resp, err := c.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if err := c.is(m, resp); err != nil {
		return 0, err
	}
	if resp.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return 0, fmt.Errorf("%s answered %s: %s", m.Addr, resp.Status, bytes.TrimSpace(why))
	}
	in := &counter{r: resp.Body}
	err = decode(in, answer)
	c.calls.add(path, len(body), in.n)
	return time.Since(begun), err
}

// is checks who answered.
func (c *Cluster) is(m Member, resp *http.Response) error {
	switch id, err := c.o.PeerID(*resp.TLS); {
	case err != nil:
		return err
	case id != m.ID:
		return fmt.Errorf("%w: another node answers at %s", ErrNotHeld, m.Addr)
	}
	return nil
}

// Blobs returns how many blobs this node keeps the lists of.
func (c *Cluster) Blobs() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.book.Len()
}

// Calls returns what was exchanged with members so far, ranged reads left out.
func (c *Cluster) Calls() (sent, received int64) { return c.calls.sent.Load(), c.calls.received.Load() }
