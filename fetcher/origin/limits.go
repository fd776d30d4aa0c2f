package origin

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// limits bound time and number of everything. They are a struct, not constants, so that tests need not wait.
type limits struct {
	// dial bounds a TCP connect: two lost SYNs (1 s + 2 s, then 4 s) still get through, a dead host does not hold a pull.
	dial time.Duration
	// handshake bounds TLS: several round trips and a slow key operation at the far end, never more.
	handshake time.Duration
	// header bounds the time to a response's headers. containerd gives 30 s too: registries in use live within it.
	header time.Duration
	// stall is the longest silence of a body. TCP alone would wait a quarter of an hour for a peer that went away; object
	// stores drop a request of their own after 20–60 s of silence.
	stall time.Duration
	// token bounds the whole exchange with a token service: one small document.
	token time.Duration
	// probe is how long a body without a length is listened to for surplus bytes behind its last one.
	probe time.Duration

	// retries is how often a request is sent again after 5xx, 429 or a reset: with the back-off below 250+500+1000+2000 ms,
	// longer than a load balancer takes to leave a dead backend.
	retries int
	// retriesRefused is the same for a refused connection or an unknown host: with backoffRefused 200+400+800 ms at most, so
	// that a quick restart is survived and a registry that is stopped is noticed within 2 s.
	retriesRefused int
	// retriesTimeout is the same after a timeout: that took 10–30 s already, one more says whether it was chance.
	retriesTimeout int
	// backoff is the first pause of the exponential back-off, backoffMax its longest: more than that is a fault a person
	// should hear of.
	backoff, backoffRefused, backoffMax time.Duration

	// pause caps one Retry-After. Docker Hub asks for up to hours; nobody waits that long in front of a terminal.
	pause time.Duration
	// pauses caps the sum of all waits of one request.
	pauses time.Duration

	// cuts is how many attempts in a row may bring a stream no further.
	cuts int
	// restarts is how often a stream from a server without ranges begins again: each costs the blob up to there.
	restarts int
	// hops bounds a chain of redirects. Registry, gateway, CDN, bucket are three; browsers stop at 20.
	hops int
	// challenges is how often one request answers a challenge: one for a token that ran out, one for its scope.
	challenges int

	// mirrorDown is how long a mirror that could not be reached is passed over: a dead one must not cost every range a
	// timeout, a restarted one should be back soon.
	mirrorDown time.Duration
	// hostsFresh is how long hosts.toml and certificates are trusted to be unchanged.
	hostsFresh time.Duration
}

var defaultLimits = limits{
	dial:           10 * time.Second,
	handshake:      10 * time.Second,
	header:         30 * time.Second,
	stall:          30 * time.Second,
	token:          30 * time.Second,
	probe:          time.Second,
	retries:        4,
	retriesRefused: 3,
	retriesTimeout: 1,
	backoff:        250 * time.Millisecond,
	backoffRefused: 200 * time.Millisecond,
	backoffMax:     5 * time.Second,
	pause:          60 * time.Second,
	pauses:         2 * time.Minute,
	cuts:           5,
	restarts:       3,
	hops:           5,
	challenges:     2,
	mirrorDown:     15 * time.Second,
	hostsFresh:     time.Minute,
}

const (
	// maxManifest bounds a manifest or an index. The largest in use are below 1 MiB; containerd refuses above 8 MiB.
	maxManifest = 8 << 20
	// maxErrorBody bounds what is read of an error's body: registries send one line of JSON, proxies a page of HTML.
	maxErrorBody = 64 << 10
	// maxTokenBody bounds a token service's answer: tokens with many scopes reach some 10 KiB.
	maxTokenBody = 1 << 20
	// maxIdle is how many connections to one host are kept warm: as many as streams run side by side in practice.
	maxIdle = 16
	// idleTimeout closes a warm connection before a load balancer does (60 s at AWS), which would cost a failed request.
	idleTimeout = 50 * time.Second
)

// wait is the pause before attempt n (from 0): exponential from first, half of it chance, so that the streams that one
// failure cut do not come back as one wave.
func (l limits) wait(first time.Duration, n int) time.Duration {
	d := l.backoffMax
	if n < 16 {
		d = min(first<<n, l.backoffMax)
	}
	return d/2 + rand.N(d/2+1)
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pauses remembers until when hosts asked to be left alone, and which could not be reached. The zero value is ready.
type pauses struct {
	mu    sync.Mutex // guards the maps; they hold one entry a host
	until map[string]time.Time
	down  map[string]time.Time
	why   map[string]error // the sentinel behind until
}

// ask extends the pause of host, for the reason why.
func (p *pauses) ask(host string, d time.Duration, why error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = extend(p.until, host, d)
	if p.why == nil {
		p.why = map[string]error{}
	}
	p.why[host] = why
}

// left is how long host still wants to be left alone, and why.
func (p *pauses) left(host string) (time.Duration, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Until(p.until[host]), p.why[host]
}

// fail notes that host cannot be reached, for d.
func (p *pauses) fail(host string, d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = extend(p.down, host, d)
}

// failed reports whether host lately could not be reached.
func (p *pauses) failed(host string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.down[host])
}

func extend(m map[string]time.Time, host string, d time.Duration) map[string]time.Time {
	if m == nil {
		m = map[string]time.Time{}
	}
	now := time.Now()
	for h, t := range m {
		if now.After(t) {
			delete(m, h)
		}
	}
	if until := now.Add(d); until.After(m[host]) {
		m[host] = until
	}
	return m
}
