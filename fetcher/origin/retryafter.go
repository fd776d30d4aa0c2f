package origin

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// parseRetryAfter reads a Retry-After header (RFC 9110 §10.2.3): seconds, or a date to be compared with now, the sender's
// own clock. It reports false when there is nothing to wait for.
func parseRetryAfter(value string, now time.Time) (time.Duration, bool) {
	value = strings.TrimSpace(value)
	if s, err := strconv.ParseUint(value, 10, 64); err == nil {
		return time.Duration(min(s, 1<<30)) * time.Second, s > 0
	}
	if t, err := http.ParseTime(value); err == nil {
		d := t.Sub(now)
		return max(d, 0), d > 0
	}
	return 0, false
}

// clock is the time at the sender of a response, by its Date header, else ours.
func clock(h http.Header) time.Time {
	if t, err := http.ParseTime(h.Get("Date")); err == nil {
		return t
	}
	return time.Now()
}
