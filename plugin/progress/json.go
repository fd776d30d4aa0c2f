package progress

import (
	"encoding/json"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
)

// jsonInterval bounds the lines a program must read: one a second for each blob that moves; changes of state are
// looked for four times as often and never held back.
const (
	jsonPoll     = 250 * time.Millisecond
	jsonInterval = time.Second
)

// jsonRenderer writes one object per line. "type" tells them apart: message, blob, total; the summary, type summary,
// goes to standard output.
type jsonRenderer struct {
	w    io.Writer
	now  func() time.Time
	last map[digest.Digest]jsonSeen
}

type jsonSeen struct {
	at   time.Time
	blob Blob
}

type jsonLine struct {
	Time time.Time `json:"time"`
	Type string    `json:"type"`
	Text string    `json:"text,omitempty"`
	*Blob
	// Rate is bytes a second; ETA is seconds, absent when unknown.
	Rate int64 `json:"rate,omitempty"`
	ETA  int64 `json:"eta_seconds,omitempty"`
}

func (j *jsonRenderer) interval() time.Duration { return jsonPoll }
func (j *jsonRenderer) close()                  {}

func (j *jsonRenderer) message(text string) {
	j.write(jsonLine{Time: j.now(), Type: "message", Text: text})
}

func (j *jsonRenderer) draw(f frame) {
	if j.last == nil {
		j.last = map[digest.Digest]jsonSeen{}
	}
	for i := range f.rows {
		j.row(f, "blob", f.rows[i].Digest, &f.rows[i])
	}
	j.row(f, "total", totalKey, &f.total)
}

func (j *jsonRenderer) row(f frame, kind string, key digest.Digest, r *row) {
	seen, ok := j.last[key]
	if ok && seen.blob == r.Blob {
		return
	}
	if ok && seen.blob.State == r.State && !f.last && f.at.Sub(seen.at) < jsonInterval {
		return
	}
	j.last[key] = jsonSeen{f.at, r.Blob}
	line := jsonLine{Time: f.at, Type: kind, Blob: &r.Blob, Rate: int64(r.rate)}
	if r.eta > 0 {
		line.ETA = int64(r.eta.Round(time.Second).Seconds())
	}
	j.write(line)
}

func (j *jsonRenderer) write(line jsonLine) {
	line.Time = line.Time.UTC()
	b, err := json.Marshal(line)
	if err != nil {
		return // strings, numbers and times always marshal
	}
	_, _ = j.w.Write(append(b, '\n'))
}
