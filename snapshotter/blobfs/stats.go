package blobfs

import (
	"slices"
	"sync/atomic"
	"time"
)

// Stats are counters since New, and the present numbers of some things.
type Stats struct {
	Reads       uint64        // answered with data
	Bytes       uint64        // of that data
	Errors      uint64        // reads answered with EIO
	Interrupted uint64        // reads whose reader was killed
	Waited      uint64        // reads that could not be answered at once
	Wait        time.Duration // their time until the answer, summed up
	Waiting     int           // reads that are not answered yet
	Files       int           // in the directory
	Late        Histogram     // waits of the reads that were answered with data after one
}

// WaitBuckets are the upper bounds of Histogram.Buckets in seconds: from a chunk that was being decoded to one that many
// deadlines have passed for.
var WaitBuckets = [...]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// Histogram counts waits.
type Histogram struct {
	// Buckets[i] counts those of at most WaitBuckets[i] seconds, those in the buckets before it included.
	Buckets [len(WaitBuckets)]uint64
	Count   uint64
	Sum     float64 // seconds
}

// waits is a Histogram in the making: each wait is counted in one place, the last is for those beyond all bounds.
type waits struct {
	in  [len(WaitBuckets) + 1]atomic.Uint64
	sum atomic.Int64 // nanoseconds
}

func (w *waits) add(d time.Duration) {
	i, _ := slices.BinarySearch(WaitBuckets[:], d.Seconds())
	w.in[i].Add(1)
	w.sum.Add(int64(d))
}

func (w *waits) histogram() (h Histogram) {
	for i := range w.in {
		h.Count += w.in[i].Load()
		if i < len(h.Buckets) {
			h.Buckets[i] = h.Count
		}
	}
	h.Sum = time.Duration(w.sum.Load()).Seconds()
	return h
}

type counters struct {
	reads, bytes, errors, interrupted, waited atomic.Uint64
	wait                                      atomic.Int64 // nanoseconds
	late                                      waits
	logged                                    atomic.Pointer[time.Time] // when a failed read was last logged: with the clock that does not jump
	unlogged                                  atomic.Int64              // how many failed since
}

// Stats tells what happened so far.
func (s *Server) Stats() Stats {
	c := &s.count
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{
		Reads: c.reads.Load(), Bytes: c.bytes.Load(), Errors: c.errors.Load(), Interrupted: c.interrupted.Load(),
		Waited: c.waited.Load(), Wait: time.Duration(c.wait.Load()),
		Waiting: len(s.queue.pending), Files: len(s.files), Late: c.late.histogram(),
	}
}

// logEvery is how often a failed read is worth a line: a layer whose source is gone
// fails thousands a second.
const logEvery = 5 * time.Second

// logFailure writes the first failure at once, then one each logEvery.
func (s *Server) logFailure(f *file, id uint64, off int64, n int, err error) {
	s.count.errors.Add(1)
	now, last := time.Now(), s.count.logged.Load()
	if last != nil && now.Sub(*last) < logEvery || !s.count.logged.CompareAndSwap(last, &now) {
		s.count.unlogged.Add(1)
		return
	}
	name := ""
	if f != nil {
		name = f.name
	}
	s.o.Log.Warn("a read of layer data failed, its reader gets EIO", "file", id, "name", name,
		"offset", off, "length", n, "error", err, "more_since_last_line", s.count.unlogged.Swap(0))
}
