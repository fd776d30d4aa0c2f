package main

import (
	"fmt"
	"io"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

// What is asked of docker quay.
const (
	acceptFirst         = 0.3  // of overlayfs's time, for the first node
	acceptFirstStargz   = 0.6  // of stargz's
	acceptSecond        = 0.15 // of overlayfs's, for the second node
	acceptSecondLink    = 1.3  // of the time that the link needs for what is read,
	acceptSecondSeconds = 0.5  // and so much more
	acceptBytes         = 1.3  // of what is read
)

// verdict says whether docker quay does what is asked of it, and reports whether every row is ok.
func verdict(w io.Writer, rows []row, rate rig.Rate) bool {
	ok := true
	for _, r := range rows {
		ok = ok && r.OK
		tell := func(met bool, format string, args ...any) {
			fmt.Fprintf(w, "%s, %s: %s: %s\n", r.Image, r.Candidate, fmt.Sprintf(format, args...), bench.Pass(r.OK && met))
		}
		switch r.Candidate {
		case "quay-first", "quay-ordered":
			tell(within(r.ToOverlayfs, acceptFirst) && within(r.ToStargz, acceptFirstStargz),
				"first output after %.2f × overlayfs (asked: %.2f) and %.2f × stargz (asked: %.2f)", r.ToOverlayfs, acceptFirst, r.ToStargz, acceptFirstStargz)
		case "quay-second":
			most := acceptSecondLink*float64(r.Read)/float64(rate.Bytes()) + acceptSecondSeconds
			tell(within(r.ToOverlayfs, acceptSecond) && r.First <= most,
				"first output after %.2f × overlayfs (asked: %.2f) and %.2f s (asked: %.2f)", r.ToOverlayfs, acceptSecond, r.First, most)
		default:
			continue
		}
		tell(float64(r.Fetched) <= acceptBytes*float64(r.Read), "%.1f MB fetched of %.1f MB read, about %.1f MB compressed (asked: %.1f × what is read)",
			float64(r.Fetched)/1e6, float64(r.Read)/1e6, float64(r.ReadPacked)/1e6, acceptBytes)
	}
	return ok
}

// within reports whether a ratio is known and small enough.
func within(ratio, asked float64) bool { return ratio > 0 && ratio <= asked }
