package origin

import (
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// redirectDefault is how long a redirect is reused when its URL does not say how long it lives: three quarters of the 60 s
	// that Quay's live, the shortest in use.
	redirectDefault = 45 * time.Second
	// redirectMargin is taken off what a URL says: a range asked for at the last moment must still be served. Short-lived
	// ones lose a quarter instead.
	redirectMargin = 15 * time.Second
	// redirectMax bounds all: who lost access should not read on for the week that a signature may live.
	redirectMax = time.Hour
)

// redirects are the signed URLs of one repository on one host, by blob.
type redirects struct {
	mu sync.Mutex // guards m; expired entries go when one is added
	m  map[digest.Digest]redirect
}

type redirect struct {
	url     *url.URL
	expires time.Time
}

func (r *redirects) get(d digest.Digest) *url.URL {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.m[d]; ok && time.Now().Before(e.expires) {
		return e.url
	}
	return nil
}

func (r *redirects) put(d digest.Digest, u *url.URL, life time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	for k, e := range r.m {
		if now.After(e.expires) {
			delete(r.m, k)
		}
	}
	if life > 0 {
		r.m[d] = redirect{u, now.Add(life)}
	}
}

// drop forgets u; another URL that was resolved meanwhile stays.
func (r *redirects) drop(d digest.Digest, u *url.URL) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.m[d].url == u {
		delete(r.m, d)
	}
}

// lifetime is how long u may be reused when it was handed out at the time now of the host that did (its Date header: a signature
// counts by clocks that may not be ours).
func lifetime(u *url.URL, now time.Time) time.Duration {
	q := u.Query()
	life := redirectDefault
	for _, vendor := range []string{"X-Amz-", "X-Goog-", "X-Oss-"} {
		if s, err := strconv.Atoi(q.Get(vendor + "Expires")); err == nil && s >= 0 && s < 1<<30 {
			life = signed(time.Duration(s) * time.Second) // counts from its signing, which was just now
			return min(life, redirectMax)
		}
	}
	// S3 version 2, CloudFront, Google and Oss: seconds since 1970. Akamai-like CDNs have it in lower case.
	for _, key := range []string{"Expires", "expires", "Expiry", "expiry"} {
		if s, err := strconv.ParseInt(q.Get(key), 10, 64); err == nil && s > 1e9 && s < 1e11 {
			return min(signed(time.Unix(s, 0).Sub(now)), redirectMax)
		}
	}
	if t, err := time.Parse(time.RFC3339, q.Get("se")); err == nil { // Azure
		return min(signed(t.Sub(now)), redirectMax)
	}
	return life
}

func signed(d time.Duration) time.Duration {
	return max(d-min(redirectMargin, d/4), 0)
}
