package fetcher

import (
	"encoding/json"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/origin"
)

const (
	// patienceLeast is not worth a word: shorter pauses are over before all know.
	patienceLeast = 200 * time.Millisecond
	// patienceMost bounds what a registry, or a member in its name, can ask for.
	patienceMost = 5 * time.Minute
	// patienceTold is how much of it counts on the word of one member: registries
	// rarely ask for more than a minute, and one that does says so to this node too.
	// What a member has used up comes back in patienceRefill times as long.
	patienceTold   = time.Minute
	patienceRefill = 5
	// patienceTellers bounds the members that are remembered for that.
	patienceTellers = 1024
	// patienceHosts bounds the registries that are waited for at a time.
	patienceHosts = 256
)

// patience is what registries asked for: by RFC 6585 a 429 means this client, but
// to a registry all nodes behind one address or account are one client. So what
// one node is told holds for all: it is broadcast.
type patience struct {
	mu      sync.Mutex // guards following
	until   map[string]time.Time
	tellers map[string]teller
	times   int64 // that a registry asked
}

// teller is a member in whose name pauses were kept.
type teller struct {
	used time.Duration // of patienceTold
	at   time.Time     // then
}

// notice is the broadcast.
type notice struct {
	// Host is the registry's, as in image names.
	Host string `json:"host"`
	// For is how long it is to be left alone, in milliseconds: clocks differ.
	For int64 `json:"for"`
}

// left is how much longer a registry is to be left alone.
func (p *patience) left(host string) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.until[host])
}

// budget is how much longer a pause may be on the word of a member. Called with
// p.mu held.
func (p *patience) budget(from string, now time.Time) time.Duration {
	for m, t := range p.tellers {
		if t.used -= now.Sub(t.at) / patienceRefill; t.used <= 0 {
			delete(p.tellers, m)
		} else {
			p.tellers[m] = teller{t.used, now}
		}
	}
	if _, ok := p.tellers[from]; !ok && len(p.tellers) >= patienceTellers {
		return 0
	}
	return patienceTold - p.tellers[from].used
}

// believe records a wait on the word of a member, as far as that goes; whether
// that is news, and how long it is.
func (p *patience) believe(from, host string, d time.Duration) (time.Duration, bool) {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	d = min(d, p.budget(from, now))
	longer := d - max(p.until[host].Sub(now), 0)
	if d < patienceLeast || len(p.until) >= patienceHosts/2 || !p.noteLocked(host, d, now) {
		return 0, false
	}
	if p.tellers == nil {
		p.tellers = map[string]teller{}
	}
	p.tellers[from] = teller{p.tellers[from].used + longer, now}
	return d, true
}

// note records a wait; whether that is news.
func (p *patience) note(host string, d time.Duration) bool {
	d = min(d, patienceMost)
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.noteLocked(host, d, time.Now())
}

func (p *patience) noteLocked(host string, d time.Duration, now time.Time) bool {
	if p.until == nil {
		p.until = map[string]time.Time{}
	}
	for h, t := range p.until {
		if now.After(t) {
			delete(p.until, h)
		}
	}
	// A tenth more is not worth telling everybody again.
	if d <= 0 || time.Until(p.until[host]) > d*9/10 || len(p.until) >= patienceHosts {
		return false
	}
	p.until[host] = now.Add(d)
	p.times++
	return true
}

// pauser is an Origin that can be asked to wait: *origin.Repository.
type pauser interface {
	Paused() (host string, left time.Duration)
	Pause(d time.Duration)
}

var _ pauser = (*origin.Repository)(nil)

// waitTogether tells the others that a registry asked for patience, or keeps
// from it because it asked another node. Called without d.mu.
func (d *download) waitTogether(source Origin) {
	p, ok := source.(pauser)
	if !ok {
		return
	}
	f := d.f
	host, own := p.Paused()
	others := f.patience.left(host)
	switch {
	case own > patienceLeast && f.patience.note(host, own) && f.gossip != nil:
		b, _ := json.Marshal(notice{host, own.Milliseconds()})
		if err := f.gossip.Broadcast(b); err != nil {
			f.log.Debug("the others were not told of a registry's rate limit", "err", err)
		}
	case others > patienceLeast && own < others*9/10:
		p.Pause(others)
	}
}

// told takes in what a member broadcasts.
func (f *Fetcher) told(from string, b []byte) {
	var n notice
	if json.Unmarshal(b, &n) != nil || n.Host == "" || len(n.Host) > 255 || n.For <= 0 || n.For > patienceMost.Milliseconds() {
		f.log.Debug("a member's broadcast is not understood", "from", from)
		return
	}
	if d, news := f.patience.believe(from, n.Host, time.Duration(n.For)*time.Millisecond); news {
		f.log.Info("a registry asked another node for patience, this one waits too", "registry", n.Host, "from", from, "wait", d)
	}
}
