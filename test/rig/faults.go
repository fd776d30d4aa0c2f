package rig

import (
	"net/http"
	"strings"
	"time"
)

// Faults say how a registry misbehaves. The zero value does not. They apply to requests for blobs only, but for Delay and
// Unavailable, which apply to all.
type Faults struct {
	// CutAfter > 0 ends every blob response's connection after that many body bytes, without a word.
	CutAfter int64
	// WholeOnly answers 200 with the whole blob to a range, as storage without ranges does.
	WholeOnly bool
	// Unavailable answers that many requests (-1: all) with 503 and Retry-After; see RetryAfter.
	Unavailable int
	// RateLimited is Unavailable with 429.
	RateLimited int
	// RetryAfter is told with 503 and 429 in whole seconds, rounded up. Zero tells nothing.
	RetryAfter time.Duration
	// RedirectTTL > 0 answers blob GETs with a 302 to a signed URL that is good for so long and then answers 403.
	RedirectTTL time.Duration
	// Deny answers 403 to blob requests for which it returns true.
	Deny func(*http.Request) bool
	// Corrupt flips a bit of every byte from offset CorruptAt of the blob on, CorruptLen bytes long (0: none).
	CorruptAt, CorruptLen int64
	// Delay is waited before each request is looked at: a round trip.
	Delay time.Duration
	// Hang keeps blob requests open without an answer until the client goes away or the faults change.
	Hang bool
}

// DenyBlobs is a Deny for every blob.
func DenyBlobs(*http.Request) bool { return true }

// Kind says what a request of the distribution API is for.
type Kind int

// The kinds of requests that are counted apart.
const (
	Other Kind = iota // the API's root, tags, uploads, tokens
	Manifests
	Blobs
)

// kindOf sorts the path of a request: /v2/NAME/blobs/DIGEST, /v2/NAME/manifests/REFERENCE. An upload is none of them.
func kindOf(path string) Kind {
	switch {
	case strings.HasPrefix(path, signedPrefix):
		return kindOf(strings.TrimPrefix(path, strings.TrimSuffix(signedPrefix, "/")))
	case !strings.HasPrefix(path, "/v2/"):
		return Other
	case strings.Contains(path, "/blobs/uploads/"):
		return Other
	case strings.Contains(path, "/blobs/"):
		return Blobs
	case strings.Contains(path, "/manifests/"):
		return Manifests
	}
	return Other
}
