package progress

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// Summary is the end of a pull or of seeding: what a user is told when all is done.
type Summary struct {
	Reference string        // as it can be given to `docker run`
	Digest    digest.Digest // of what the reference points to
	Target    string        // where the image went, "" for nowhere but the store
	UpToDate  bool          // it was there already
	Seeded    bool          // nothing was pulled, but given to others
	Duration  time.Duration
	Total     Blob // as made by Sum
	Layers    int
	Lazy      int      // of Layers, those mounted before they were complete
	Notes     []string // what the user should know besides
}

type jsonSummary struct {
	Type       string        `json:"type"` // "summary"
	Reference  string        `json:"reference"`
	Digest     digest.Digest `json:"digest"`
	Target     string        `json:"target,omitempty"`
	UpToDate   bool          `json:"up_to_date"`
	Seconds    float64       `json:"seconds"`
	Size       int64         `json:"size"`
	FromCache  int64         `json:"from_cache"`
	FromOrigin int64         `json:"from_origin"`
	FromPeers  int64         `json:"from_peers"`
	Uploaded   int64         `json:"uploaded"`
	Layers     int           `json:"layers"`
	Lazy       int           `json:"lazy"`
	Notes      []string      `json:"notes,omitempty"`
}

// Finish closes the reporter with the result. The summary goes to the progress stream, the reference to the data
// stream; in JSON the summary itself is the data. The error is that of writing the data.
func (r *Reporter) Finish(s Summary) error {
	r.Stop()
	defer r.Close()
	if r.mode == JSON {
		b, err := json.Marshal(jsonSummary{
			Type: "summary", Reference: s.Reference, Digest: s.Digest, Target: s.Target, UpToDate: s.UpToDate,
			Seconds: float64(s.Duration.Milliseconds()) / 1000, Size: s.Total.Size,
			FromCache: s.Total.FromCache, FromOrigin: s.Total.FromOrigin, FromPeers: s.Total.FromPeers,
			Uploaded: s.Total.Uploaded, Layers: s.Layers, Lazy: s.Lazy, Notes: s.Notes,
		})
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(r.data, "%s\n", b)
		return err
	}
	for _, l := range s.lines() {
		r.Say("%s", l)
	}
	r.Close()
	_, err := fmt.Fprintln(r.data, s.Reference)
	return err
}

func (s Summary) lines() []string {
	lines := []string{"Digest: " + s.Digest.String()}
	what := "Pulled"
	switch {
	case s.Seeded:
		what = "Seeded"
	case s.UpToDate:
		what = "Up to date"
	}
	line := fmt.Sprintf("%s: %s in %s", what, size(s.Total.Size), seconds(s.Duration))
	if by := split(s.Total); by != "" {
		line += " (" + by + ")"
	}
	if s.Total.Uploaded > 0 {
		line += ", uploaded " + size(s.Total.Uploaded)
	}
	lines = append(lines, line)
	if s.Lazy > 0 {
		lines = append(lines, fmt.Sprintf("Lazy: %d of %d layers were mounted before they were complete", s.Lazy, s.Layers))
	}
	for _, n := range s.Notes {
		if n = strings.TrimSpace(n); n != "" {
			lines = append(lines, "Note: "+n)
		}
	}
	if s.Target != "" {
		lines = append(lines, "Into: "+s.Target)
	}
	return lines
}
