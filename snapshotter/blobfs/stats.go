package blobfs

import (
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
}

type counters struct {
	reads, bytes, errors, interrupted, waited atomic.Uint64
	wait                                      atomic.Int64              // nanoseconds
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
		Waiting: len(s.queue.pending), Files: len(s.files),
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
