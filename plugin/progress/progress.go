// Package progress shows a person, or the program that runs us, how an image arrives.
//
// A Reporter polls the state of an image's blobs and renders it in one of four ways:
//
//   - tty: one line per blob with a bar, and a line for the total, redrawn in place at most ten times a second;
//   - plain: a line for each change of state and one for the total every few seconds, free of control characters;
//   - json: one JSON object per line, for programs;
//   - quiet: nothing but the final reference.
//
// Progress goes to one stream (standard error) and the result to another (standard output), so that
// `docker run $(docker quay pull -q IMAGE)` works in every mode but json. The package knows nothing of registries,
// peers or engines: whoever fetches fills in Blob values.
package progress

import (
	"fmt"
	"strings"
	"unicode"

	"github.com/opencontainers/go-digest"
)

// State is where a blob stands on its way to this node.
type State string

// The states of a blob, in the order in which they are passed. Failed may follow any but Complete.
const (
	Waiting   State = "waiting"   // nothing asked for yet
	Fetching  State = "fetching"  // bytes are arriving
	Verifying State = "verifying" // all bytes are here, the digest is being checked
	Complete  State = "complete"  // all bytes are here and the digest was right
	Failed    State = "failed"    // given up; Note says why
)

// Blob is a snapshot of one blob's progress. All sizes are bytes.
type Blob struct {
	Digest    digest.Digest `json:"digest"`
	MediaType string        `json:"media_type,omitempty"`
	Size      int64         `json:"size"`
	Have      int64         `json:"have"` // held on disk, from whichever source

	// Who supplied what is held. FromCache was on disk before this pull began.
	FromCache  int64 `json:"from_cache"`
	FromOrigin int64 `json:"from_origin"`
	FromPeers  int64 `json:"from_peers"`
	// Uploaded went to peers since this process, or the node daemon, started to serve the blob.
	Uploaded int64 `json:"uploaded"`

	State State  `json:"state"`
	Peers int    `json:"peers"`          // connected peers that share this blob
	Note  string `json:"note,omitempty"` // for the user: why something was not used, or what went wrong
}

// Mode is a way of showing progress.
type Mode string

// The modes that --progress accepts. Auto is TTY when the progress stream is a terminal, else Plain.
const (
	Auto  Mode = "auto"
	TTY   Mode = "tty"
	Plain Mode = "plain"
	JSON  Mode = "json"
	Quiet Mode = "quiet"
)

// Modes lists what ParseMode accepts, in the order help shows it.
func Modes() []Mode { return []Mode{Auto, TTY, Plain, JSON, Quiet} }

// ParseMode reads a --progress value. The error names the choices.
func ParseMode(s string) (Mode, error) {
	var names []string
	for _, m := range Modes() {
		if string(m) == s {
			return m, nil
		}
		names = append(names, string(m))
	}
	return "", fmt.Errorf("%q is no way to show progress: choose one of %s", s, strings.Join(names, ", "))
}

// Sum adds blobs up into one: the total line. Its State is Failed when any failed, Complete when all are complete,
// Waiting when all wait, Verifying when nothing more is to come but checks, else Fetching. Peers is the largest count,
// because the same peers usually share every blob of an image.
func Sum(blobs []Blob) Blob {
	var t Blob
	count := map[State]int{}
	for _, b := range blobs {
		t.Size += b.Size
		t.Have += b.Have
		t.FromCache += b.FromCache
		t.FromOrigin += b.FromOrigin
		t.FromPeers += b.FromPeers
		t.Uploaded += b.Uploaded
		t.Peers = max(t.Peers, b.Peers)
		count[b.State]++
	}
	switch n := len(blobs); {
	case count[Failed] > 0:
		t.State = Failed
	case count[Complete] == n:
		t.State = Complete
	case count[Waiting] == n:
		t.State = Waiting
	case count[Verifying] > 0 && count[Verifying]+count[Complete] == n:
		t.State = Verifying
	default:
		t.State = Fetching
	}
	return t
}

// shortDigest is the first 12 hex characters of a digest, as docker prints IDs.
func shortDigest(d digest.Digest) string {
	_, hex, ok := strings.Cut(string(d), ":")
	if !ok {
		hex = string(d)
	}
	if len(hex) > 12 {
		hex = hex[:12]
	}
	return hex
}

// printable drops what could move a cursor or forge a line: notes and errors may quote a server.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\t' || r == '\n' || r == '\r':
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
}
