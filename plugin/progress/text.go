package progress

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
)

// plainPoll is how often states are looked at, plainTotal how often the total is printed while something moves: a CI
// log of an hour's pull stays under a thousand lines.
const (
	plainPoll  = 250 * time.Millisecond
	plainTotal = 5 * time.Second
)

// plainRenderer prints lines that are right forever: a CI log, a pipe, a dumb terminal.
type plainRenderer struct {
	w     io.Writer
	state map[digest.Digest]State
	since map[digest.Digest]time.Time
	total time.Time // when the total was last printed
}

func (p *plainRenderer) interval() time.Duration { return plainPoll }
func (p *plainRenderer) message(text string)     { fmt.Fprintln(p.w, text) }
func (p *plainRenderer) close()                  {}

func (p *plainRenderer) draw(f frame) {
	if p.state == nil {
		p.state = map[digest.Digest]State{}
		p.since = map[digest.Digest]time.Time{}
		p.total = f.at
	}
	for _, r := range f.rows {
		if p.state[r.Digest] == r.State {
			continue
		}
		p.state[r.Digest] = r.State
		if r.State == Waiting {
			continue
		}
		if _, seen := p.since[r.Digest]; !seen {
			p.since[r.Digest] = f.at
		}
		fmt.Fprintln(p.w, p.line(r, f.at))
	}
	if moving := f.total.State == Fetching || f.total.State == Verifying; moving && (f.last || f.at.Sub(p.total) >= plainTotal) {
		p.total = f.at
		fmt.Fprintln(p.w, totalLine(f.total))
	}
}

func (p *plainRenderer) line(r row, at time.Time) string {
	s := fmt.Sprintf("%s: %s", r.name, r.State)
	switch r.State {
	case Fetching:
		s += fmt.Sprintf(" %s", size(r.Size))
		if r.Have > 0 {
			s += fmt.Sprintf(" (%s held)", size(r.Have))
		}
	case Complete:
		s += fmt.Sprintf(" %s", size(r.Size))
		if d := at.Sub(p.since[r.Digest]); d >= plainPoll {
			s += " in " + seconds(d)
		}
		if by := split(r.Blob); by != "" {
			s += " (" + by + ")"
		}
	}
	if r.Note != "" {
		s += ": " + r.Note
	}
	return s
}

func totalLine(r row) string {
	s := fmt.Sprintf("total: %s of %s", size(r.Have), size(r.Size))
	if by := split(r.Blob); by != "" {
		s += " (" + by + ")"
	}
	if r.rate > 0 {
		s += fmt.Sprintf(", %s/s", size(int64(r.rate)))
	}
	if e := eta(r.eta); e != "" {
		s += ", " + e
	}
	return s
}

// split names the sources that supplied something, "" when none did.
func split(b Blob) string {
	var parts []string
	for _, p := range []struct {
		name string
		n    int64
	}{{"cache", b.FromCache}, {"registry", b.FromOrigin}, {"peers", b.FromPeers}} {
		if p.n > 0 {
			parts = append(parts, p.name+" "+size(p.n))
		}
	}
	return strings.Join(parts, ", ")
}

// size is decimal, four significant digits, as docker prints sizes.
func size(n int64) string { return units.HumanSize(float64(n)) }

// seconds prints a duration with a precision that fits it: "0.4s", "12s", "3m5s".
func seconds(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// eta is "" when unknown, or longer than a day, which is as good as unknown.
func eta(d time.Duration) string {
	switch {
	case d < 0 || d > 24*time.Hour:
		return ""
	case d < time.Second:
		return "ETA 1s"
	default:
		return "ETA " + d.Round(time.Second).String()
	}
}
