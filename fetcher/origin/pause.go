package origin

import (
	"time"
)

// Paused tells which registry this repository is on, as it is asked for, and how much longer it wants to be left alone: it
// answered 429 or 503 with Retry-After. Zero or less is not at all.
func (r *Repository) Paused() (host string, left time.Duration) {
	host = r.endpoints[len(r.endpoints)-1].Host
	left, _ = r.client.pauses.left(host)
	return host, left
}

// Pause keeps all requests of the client from the repository's registry for d, as if that had asked for it.
func (r *Repository) Pause(d time.Duration) {
	r.client.pauses.ask(r.endpoints[len(r.endpoints)-1].Host, min(d, r.client.limits.pause), ErrRateLimited)
}
