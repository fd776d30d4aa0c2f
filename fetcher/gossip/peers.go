package gossip

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

const (
	// retryFirst is the wait after the first failure; it doubles. Nodes that are started together miss each other by a tenth
	// of a second.
	retryFirst = 200 * time.Millisecond
	// readyTries is how often peers that do not answer are tried, in 0.6 s, before a fetch begins without them: one that is
	// just being started must not make this node take all of an image from the registry.
	readyTries = 3
	// retryAlone bounds the wait while no member is known at all, retryMax afterwards: the node has a cluster by then, and
	// what is dialled is the other half of one that was cut in two, or a machine that is switched off.
	retryAlone = 3 * time.Second
	retryMax   = 15 * time.Second
	// retryLost bounds the wait for members that were lost, and forgetLost is when they are given up: a machine that was
	// away for longer has been told a peer to begin with.
	retryLost  = time.Minute
	forgetLost = 24 * time.Hour
	// forgetFound is when an address that local discovery found, and that did not answer, is given up.
	forgetFound = 5 * time.Minute
	// maxLost and maxFound bound both; one member of the other half is enough to find all of it.
	maxLost  = 64
	maxFound = 64
	// parallelDials bounds the dials in progress: with thousands of addresses behind one name the first few bring all the
	// others, which are then not dialled any more.
	parallelDials = 8
	// checkEvery is how often it is looked whether a peer that has to be dialled again is a member, and whether this
	// machine has still the address it advertises.
	checkEvery = 2 * time.Second
)

// peers dials those who should be members and are not.
type peers struct {
	g     *Gossip
	ready chan struct{} // see checkReadyLocked
	wake  chan struct{} // something may be due

	wg sync.WaitGroup // dials and lookups

	mu         sync.Mutex // guards following
	configured []*peer
	targets    map[netip.AddrPort]*target
	dialling   int
	isReady    bool

	// of run
	compared    int // members when lists were compared last
	compareWait time.Duration
	nextCompare time.Time
}

// target is one address to dial.
type target struct {
	addr   netip.AddrPort
	kind   kind
	node   string // who answered last, or is expected there
	forget time.Time

	due     time.Time
	wait    time.Duration
	dialled bool // is being dialled
	tried   bool
	failed  int  // tries in a row without an answer
	here    bool // it is this node
	err     error
}

type kind int

const (
	asConfigured kind = iota
	asLost
	asFound
)

func newPeers(g *Gossip) (*peers, error) {
	p := &peers{g: g, ready: make(chan struct{}), wake: make(chan struct{}, 1), targets: map[netip.AddrPort]*target{}}
	if len(g.o.Peers) > maxPeers {
		return nil, fmt.Errorf("%d peers are too many: one is enough to find all, and a DNS name can stand for any number", len(g.o.Peers))
	}
	for _, given := range g.o.Peers {
		c, err := parsePeer(given, g.o.DefaultPort)
		if err != nil {
			return nil, err
		}
		p.configured = append(p.configured, c)
		if c.fixed {
			p.aimLocked(c.addrs[0], asConfigured, "")
		}
	}
	return p, nil
}

// aimLocked makes a target, or turns one into a configured one.
func (p *peers) aimLocked(a netip.AddrPort, k kind, node string) *target {
	t := p.targets[a]
	if t == nil {
		t = &target{addr: a, kind: k, node: node}
		p.targets[a] = t
	} else if k == asConfigured {
		t.kind = k
	}
	return t
}

// remember makes a lost member a target. It may be called with memberlist's lock held.
func (p *peers) remember(n Node) {
	if n.Ephemeral {
		return
	}
	p.addBounded(n.Addr, asLost, n.ID, retryFirst, forgetLost, maxLost)
}

// found makes an address that announced itself a target.
func (p *peers) found(a netip.AddrPort) { p.addBounded(a, asFound, "", 0, forgetFound, maxFound) }

func (p *peers) addBounded(a netip.AddrPort, k kind, node string, first, forget time.Duration, limit int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	t := p.targets[a]
	if t == nil {
		n := 0
		var oldest *target
		for _, other := range p.targets {
			if other.kind != k {
				continue
			}
			if n++; oldest == nil || other.forget.Before(oldest.forget) {
				oldest = other
			}
		}
		if n >= limit {
			delete(p.targets, oldest.addr)
		}
		t = p.aimLocked(a, k, node)
		t.due = now.Add(first)
	} else if k == asLost {
		t.node = node
	}
	t.forget = now.Add(forget)
	p.poke()
}

func (p *peers) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run dials what is due until ctx ends, and waits for what it began.
func (p *peers) run(ctx context.Context) {
	defer p.wg.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	nextCheck := time.Now().Add(checkEvery)
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-timer.C:
		}
		now := time.Now()
		if !now.Before(nextCheck) {
			nextCheck = now.Add(checkEvery)
			p.checkSelf(ctx)
		}
		next := p.round(ctx, now)
		if due := p.compare(ctx, now); due.Before(next) {
			next = due
		}
		if nextCheck.Before(next) {
			next = nextCheck
		}
		timer.Reset(time.Until(next))
	}
}

// round begins what is due and returns when something will be.
func (p *peers) round(ctx context.Context, now time.Time) (next time.Time) {
	alone := p.g.members.count() == 0
	p.mu.Lock()
	defer p.mu.Unlock()
	next = now.Add(checkEvery)
	sooner := func(t time.Time) {
		if t.Before(next) {
			next = t
		}
	}
	for _, c := range p.configured {
		if c.fixed || c.looking {
			continue
		}
		if c.nextLook.After(now) {
			sooner(c.nextLook)
			continue
		}
		c.looking = true
		p.wg.Go(func() { p.look(ctx, c) })
	}
	for a, t := range p.targets {
		switch {
		case t.dialled:
			continue
		case t.kind != asConfigured && now.After(t.forget):
			delete(p.targets, a)
			continue
		case p.satisfied(t):
			if t.kind != asConfigured {
				delete(p.targets, a)
				continue
			}
			t.tried, t.err, t.wait = true, nil, 0
			t.due = now.Add(checkEvery)
		case t.due.After(now):
			// A member that was there a moment ago is missed at once.
			if soon := now.Add(retryFirst); t.wait == 0 && t.tried && t.due.After(soon) {
				t.due = soon
			}
		case p.dialling < parallelDials:
			t.dialled = true
			p.dialling++
			p.wg.Go(func() { p.join(ctx, t, alone) })
			continue
		default:
			continue // the end of a dial wakes
		}
		sooner(t.due)
	}
	p.checkReadyLocked()
	return next
}

// satisfied reports whether the target is a live member by now.
func (p *peers) satisfied(t *target) bool {
	if p.g.members.at(t.addr) {
		return true
	}
	if t.node == "" || t.here {
		return false
	}
	_, _, ok := p.g.members.get(t.node)
	return ok
}

// jitter shortens or lengthens d by up to a tenth: a rack that was switched on at once must not speak in one breath for ever.
func jitter(d time.Duration) time.Duration {
	return d - d/10 + rand.N(d/5+1)
}

// checkReadyLocked closes ready when every configured peer was tried: more than once, as long as none has answered.
func (p *peers) checkReadyLocked() {
	if p.isReady {
		return
	}
	answered, again := false, false
	for _, c := range p.configured {
		if !c.looked {
			return
		}
		for _, a := range c.addrs {
			t := p.targets[a]
			if t == nil || !t.tried {
				return
			}
			answered = answered || t.err == nil && !t.here
			again = again || t.err != nil && t.failed < readyTries
		}
	}
	if again && !answered {
		return
	}
	p.isReady = true
	close(p.ready)
}

// silent is the configured peers that did not answer last time.
func (p *peers) silent() map[string]error {
	p.mu.Lock()
	defer p.mu.Unlock()
	silent := map[string]error{}
	for _, c := range p.configured {
		if err := p.errLocked(c); err != nil {
			silent[c.given] = err
		}
	}
	return silent
}

// errLocked is nil when one address of a peer answered, or none was tried yet. That a peer is of another cluster is said
// before that another address is not reached.
func (p *peers) errLocked(c *peer) error {
	err := c.err
	for _, a := range c.addrs {
		t := p.targets[a]
		if t == nil || !t.tried {
			continue
		}
		if t.err == nil {
			return nil
		}
		if err == nil || trust.Foreign(t.err) {
			err = t.err
		}
	}
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}
