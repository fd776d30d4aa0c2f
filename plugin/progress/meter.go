package progress

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// rateWindow is the span over which a rate is measured: long enough that pieces of 1 MiB on a slow link do not make
// the figure jump between zero and double, short enough to show a stall while one watches.
const rateWindow = 5 * time.Second

// meter turns successive byte counts into rates. Not safe for concurrent use.
type meter struct {
	samples map[digest.Digest][]sample
}

type sample struct {
	at    time.Time
	bytes int64
}

// rate records that key stood at bytes at the time at, and returns the bytes a second over the last rateWindow;
// 0 until two samples lie apart.
func (m *meter) rate(key digest.Digest, at time.Time, bytes int64) float64 {
	if m.samples == nil {
		m.samples = map[digest.Digest][]sample{}
	}
	s := append(m.samples[key], sample{at, bytes})
	for len(s) > 2 && at.Sub(s[1].at) >= rateWindow {
		s = s[1:]
	}
	m.samples[key] = s
	first := s[0]
	span := at.Sub(first.at).Seconds()
	if span <= 0 || bytes <= first.bytes {
		return 0
	}
	return float64(bytes-first.bytes) / span
}

// row is a blob, or the total, with what was measured of it.
type row struct {
	Blob
	name string
	rate float64       // bytes a second
	eta  time.Duration // until complete; negative when unknown
}

// frame is all that one redraw shows.
type frame struct {
	at    time.Time
	since time.Duration // since the reporter was started
	rows  []row
	total row
	last  bool // nothing follows
}

// totalKey is the meter's key for the sum; no digest looks like it.
const totalKey digest.Digest = "total"

func (m *meter) frame(at time.Time, since time.Duration, blobs []Blob, last bool) frame {
	f := frame{at: at, since: since, last: last}
	for _, b := range blobs {
		f.rows = append(f.rows, m.row(at, b.Digest, shortDigest(b.Digest), b))
	}
	f.total = m.row(at, totalKey, "total", Sum(blobs))
	return f
}

func (m *meter) row(at time.Time, key digest.Digest, name string, b Blob) row {
	b.Note = printable(b.Note)
	r := row{Blob: b, name: name, eta: -1}
	// What was on disk before says nothing about how fast the rest comes.
	r.rate = m.rate(key, at, b.Have-b.FromCache)
	if left := b.Size - b.Have; left > 0 && r.rate > 0 {
		r.eta = time.Duration(float64(left) / r.rate * float64(time.Second))
	}
	return r
}
