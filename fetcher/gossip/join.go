package gossip

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"time"
)

const (
	// dialTimeout bounds the TCP and TLS set-up of one stream.
	dialTimeout = 2 * time.Second
	// mergeTries and mergeWait: two nodes that took each other for dead object to that in the first exchange of lists and
	// hear the objection in the second.
	mergeTries = 3
	mergeWait  = 150 * time.Millisecond
	// compareFirst is the first wait before lists are compared with a member because the list has grown or shrunk by more
	// than a compareShare-th, and compareFew members; it doubles up to compareMax and falls back when nothing changes. A packet
	// carries four entries: forty nodes that started at once took 4.4 s to hear of each other by packets alone.
	compareFirst = 200 * time.Millisecond
	compareMax   = 5 * time.Second
	compareShare = 10
	compareFew   = 4
)

// join dials one target, exchanges lists with it, and sets when it is due again.
func (p *peers) join(ctx context.Context, t *target, alone bool) {
	node, err := p.g.join(ctx, t.addr)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialling--
	t.dialled = false
	if ctx.Err() == nil {
		p.judgeLocked(t, node, err, alone)
	}
	p.checkReadyLocked()
	p.poke()
}

func (p *peers) judgeLocked(t *target, node string, err error, alone bool) {
	if node != "" && t.kind == asLost && node != t.node {
		delete(p.targets, t.addr) // the one that was lost is not there any more
		return
	}
	limit := retryMax
	switch {
	case alone:
		limit = retryAlone
	case t.kind == asLost:
		limit = retryLost
	}
	t.tried, t.err = true, err
	if t.failed++; err == nil {
		t.failed = 0
	}
	t.here = node == p.g.self.id.ID()
	if node != "" {
		t.node = node
	}
	if t.here {
		t.wait = retryLost
	} else {
		t.wait = min(max(2*t.wait, retryFirst), limit)
	}
	t.due = time.Now().Add(jitter(t.wait))
	if err != nil {
		p.g.log.Debug("peer does not answer", "peer", t.addr, "err", err)
	}
}

// join exchanges lists with whoever is at an address, and returns who that is ("" when no member is).
func (g *Gossip) join(ctx context.Context, a netip.AddrPort) (node string, err error) {
	for try := range mergeTries {
		dctx, cancel := context.WithTimeout(ctx, dialTimeout)
		s, err := g.transport.dial(dctx, a)
		cancel()
		if err != nil {
			return node, err
		}
		node = s.peer
		if node == g.self.id.ID() {
			s.Close()
			return node, nil
		}
		id, err := parseID(node)
		if err != nil || !g.transport.prepare(s) {
			s.Close() // another address of the same node is being joined
			return node, err
		}
		_, err = g.list.Join([]string{node + "/" + net.JoinHostPort(id.overlay().String(), strconv.Itoa(overlayPort))})
		g.transport.unprepare(s)
		if err != nil {
			return node, fmt.Errorf("%s is a member and does not exchange lists: %w", a, err)
		}
		if _, _, ok := g.members.get(node); ok || try == mergeTries-1 {
			return node, nil
		}
		select {
		case <-time.After(mergeWait):
		case <-ctx.Done():
			return node, nil
		}
	}
	return node, nil
}

// checkSelf speaks to a member when this node has to learn its address anew.
func (p *peers) checkSelf(ctx context.Context) {
	self := p.g.self.get().Addr.Addr()
	gone := p.g.self.gone()
	if !gone && !(self.IsLoopback() && !p.g.self.fixed) {
		return
	}
	members := p.g.Members()
	for _, i := range rand.Perm(len(members)) {
		a := members[i].Addr
		if gone || !a.Addr().IsLoopback() {
			p.wg.Go(func() {
				dctx, cancel := context.WithTimeout(ctx, dialTimeout)
				defer cancel()
				if s, err := p.g.transport.dial(dctx, a); err == nil {
					s.Close()
				}
			})
			return
		}
	}
}

// compare exchanges lists with any member when many came or went lately, and returns when it has to be called again.
func (p *peers) compare(ctx context.Context, now time.Time) (due time.Time) {
	never := now.Add(checkEvery)
	n := p.g.members.count()
	if d := max(n-p.compared, p.compared-n); d <= max(n/compareShare, compareFew) || n == 0 {
		if now.After(p.nextCompare.Add(compareMax)) {
			p.compareWait = 0
		}
		return never
	}
	if p.compareWait == 0 { // the first of them; more will follow
		p.compareWait = compareFirst
		p.nextCompare = now.Add(jitter(p.compareWait))
	}
	if p.nextCompare.After(now) {
		return p.nextCompare
	}
	p.compared = n
	p.compareWait = min(2*p.compareWait, compareMax)
	p.nextCompare = now.Add(jitter(p.compareWait))
	members := p.g.Members()
	if len(members) == 0 {
		return never
	}
	a := members[rand.IntN(len(members))].Addr
	p.wg.Go(func() {
		if _, err := p.g.join(ctx, a); err != nil {
			p.g.log.Debug("lists are compared later", "peer", a, "err", err)
		}
	})
	return never
}
