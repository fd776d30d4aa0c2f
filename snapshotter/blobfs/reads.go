package blobfs

import (
	"container/list"
	"context"
	"errors"
	"slices"
	"syscall"
	"time"
)

const (
	// maxWaiting bounds the records of requests that wait, to some 40 MiB. The kernel has
	// at most maxBackground of them, and one for each thread besides.
	maxWaiting = 64 << 10
	// keepBuffers is how many buffers of finished reads are kept for the next ones.
	keepBuffers = 16
	// keepSignals is how many signals to requests that nobody has seen yet are
	// remembered: another worker may be about to see them.
	keepSignals = 64
)

var (
	errRemoved = errors.New("the file was removed")
	errUnknown = errors.New("the file is not known")
	errTimeout = errors.New("the read took longer than it may")
	errKilled  = errors.New("the reader was killed")
	errTooMany = errors.New("too many reads wait")
)

// reads are the requests that wait. Server.mu guards it.
type reads struct {
	pending   map[uint64]*call // all that wait, by unique
	parked    calls            // those whose file is not there yet
	ready     []*file          // files with waiting reads, in the order in which it is their turn
	running   int              // goroutines
	free      []*buffer
	signalled map[*call]bool      // whose readers got a signal
	watched   bool                // watch runs
	early     [keepSignals]uint64 // signals to unknown requests, a ring
	earlyAt   int
}

// call is one request that waits: for its File, a goroutine, or data.
//
//	parked --Add--> waiting --startReads--> running --> retired
//
// It is retired from any of these states when it fails. Whoever retires it answers it,
// nobody else does.
type call struct {
	op     uint32
	unique uint64
	node   uint64
	pid    uint32
	off    int64
	size   int
	name   string // of a LOOKUP
	since  time.Time

	file    *file // nil while parked
	ctx     context.Context
	cancel  context.CancelFunc
	stop    func() bool // the deadline
	retired bool
	in      *calls // nil when in none
	at      *list.Element
}

// calls is a queue of which any call can leave.
type calls struct{ l list.List }

func (q *calls) push(c *call) { c.in, c.at = q, q.l.PushBack(c) }

func (q *calls) pop() *call {
	c := q.l.Front().Value.(*call)
	c.leave()
	return c
}

func (q *calls) empty() bool { return q.l.Len() == 0 }

func (q *calls) all() []*call {
	var l []*call
	for e := q.l.Front(); e != nil; e = e.Next() {
		l = append(l, e.Value.(*call))
	}
	return l
}

func (c *call) leave() {
	if c.in != nil {
		c.in.l.Remove(c.at)
		c.in, c.at = nil, nil
	}
}

// release gives back what the context of a retired call holds.
func (c *call) release() {
	c.stop()
	c.cancel()
}

// waitLocked makes c wait for f, or for a file of its id when f is nil. It tells false
// when there is no room.
func (s *Server) waitLocked(c *call, f *file) bool {
	if s.stopped {
		return true // the next daemon's
	}
	if len(s.queue.pending) >= maxWaiting {
		return false
	}
	c.since = time.Now()
	c.ctx, c.cancel = context.WithTimeout(s.ctx, s.o.ReadTimeout)
	ctx := c.ctx
	c.stop = context.AfterFunc(ctx, func() {
		if ctx.Err() == context.DeadlineExceeded {
			s.abandon(c, errTimeout)
		}
	})
	s.queue.pending[c.unique] = c
	if f == nil {
		s.queue.parked.push(c)
	} else {
		s.enqueueLocked(c, f)
	}
	if slices.Contains(s.queue.early[:], c.unique) {
		s.signalLocked(c)
	}
	return true
}

func (s *Server) enqueueLocked(c *call, f *file) {
	c.file = f
	if f.waiting.empty() {
		s.queue.ready = append(s.queue.ready, f)
	}
	f.waiting.push(c)
}

// unparkLocked lets go what waits for f, and gives the answers that can be given.
func (s *Server) unparkLocked(f *file) (answers [][]byte) {
	for _, c := range s.queue.parked.all() {
		if c.op == opLookup && c.name != f.name || c.op != opLookup && c.node != f.id {
			continue
		}
		if c.op == opRead {
			c.leave()
			c.size = f.clip(c.off, c.size)
			s.enqueueLocked(c, f)
			continue
		}
		s.retireLocked(c)
		c.release()
		f.opened(c.op)
		answers = append(answers, describe(c.op, c.unique, f))
	}
	return answers
}

// startReadsLocked starts goroutines as long as a read may run that does not.
func (s *Server) startReadsLocked() {
	for !s.stopped {
		c := s.pickLocked()
		if c == nil {
			return
		}
		s.reads.Add(1)
		go s.run(c)
	}
}

// pickLocked takes the read out of the queues whose turn it is, and counts it as
// running. A quarter of the goroutines is for files that have none yet: so a few files
// whose source stalls cannot have all of them.
func (s *Server) pickLocked() *call {
	q := &s.queue
	if q.running >= s.o.Reads {
		return nil
	}
	scarce := q.running >= s.o.Reads-s.o.Reads/4
	for i := 0; i < len(q.ready); {
		f := q.ready[i]
		if f.waiting.empty() { // all of them were retired
			q.ready = slices.Delete(q.ready, i, i+1)
			continue
		}
		if f.running >= s.o.ReadsPerFile || scarce && f.running > 0 {
			i++
			continue
		}
		c := f.waiting.pop()
		q.ready = slices.Delete(q.ready, i, i+1)
		if !f.waiting.empty() {
			q.ready = append(q.ready, f)
		}
		f.running++
		q.running++
		return c
	}
	return nil
}

// run is one goroutine: it reads c, then what comes next.
func (s *Server) run(c *call) {
	defer s.reads.Done()
	var b *buffer
	for c != nil {
		if b == nil || b.room() < c.size {
			b = s.buffer(c.size)
		}
		var err error
		if c.size > 0 { // a read beyond the end that was parked before the end was known
			err = c.file.f.ReadAt(c.ctx, b.data(c.size), c.off)
		}
		s.mu.Lock()
		mine := s.retireLocked(c)
		s.mu.Unlock()
		switch {
		case mine && err == nil:
			s.answered(c)
			s.count.reads.Add(1)
			s.count.bytes.Add(uint64(c.size))
			s.count.late.add(time.Since(c.since))
			s.replied(b.reply(c.unique, 0, c.size))
		case mine:
			s.fail(c, err)
		}
		c = s.following(c, b)
	}
}

// following ends c's turn and gives the goroutine its next read, or nil after taking
// back its buffer.
func (s *Server) following(c *call, b *buffer) *call {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.file.running--
	c.file.idleLocked()
	s.queue.running--
	if !s.stopped {
		if next := s.pickLocked(); next != nil {
			return next
		}
	}
	if b.room() == maxRead && len(s.queue.free) < keepBuffers {
		s.queue.free = append(s.queue.free, b)
	}
	return nil
}

func (s *Server) buffer(size int) *buffer {
	if size > maxRead {
		return newBuffer(s.dev, size)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.queue.free); n > 0 {
		b := s.queue.free[n-1]
		s.queue.free = s.queue.free[:n-1]
		return b
	}
	return newBuffer(s.dev, maxRead)
}

// retireLocked takes c out of everything, or tells that somebody else did.
func (s *Server) retireLocked(c *call) bool {
	if c.retired {
		return false
	}
	c.retired = true
	c.leave()
	delete(s.queue.pending, c.unique)
	delete(s.queue.signalled, c)
	return true
}

// abandon answers c with an error although its File may still be at it.
func (s *Server) abandon(c *call, err error) {
	s.mu.Lock()
	mine := s.retireLocked(c)
	s.mu.Unlock()
	if mine {
		s.fail(c, err)
	}
}

// fail answers c, which the caller retired, with the error that err means.
func (s *Server) fail(c *call, err error) {
	s.answered(c)
	errno := syscall.EIO
	switch {
	case errors.Is(err, errKilled):
		s.count.interrupted.Add(1)
		errno = syscall.EINTR
	case c.op == opLookup && errors.Is(err, errUnknown):
		errno = syscall.ENOENT
	default:
		s.logFailure(c.file, c.node, c.off, c.size, err)
	}
	s.sendError(c.unique, errno)
}

// answered accounts for c's wait and ends its context.
func (s *Server) answered(c *call) {
	c.release()
	s.count.waited.Add(1)
	s.count.wait.Add(int64(time.Since(c.since)))
}

// interrupt hears of a signal to the reader of a request.
func (s *Server) interrupt(unique uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.queue.pending[unique]; c != nil {
		s.signalLocked(c)
		return
	}
	// Answered already, being answered, or in the hands of another worker.
	s.queue.early[s.queue.earlyAt] = unique
	s.queue.earlyAt = (s.queue.earlyAt + 1) % keepSignals
}

// signalLocked has watch look at c's reader.
func (s *Server) signalLocked(c *call) {
	if s.stopped {
		return
	}
	s.queue.signalled[c] = true
	if !s.queue.watched {
		s.queue.watched = true
		s.reads.Add(1)
		go s.watch()
	}
}

// watch abandons the reads of readers that are about to die, until none is left that
// got a signal.
func (s *Server) watch() {
	defer s.reads.Done()
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	for {
		s.mu.Lock()
		var l []*call
		for c := range s.queue.signalled {
			l = append(l, c)
		}
		if len(l) == 0 {
			s.queue.watched = false
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		for _, c := range l {
			if dying(c.pid) {
				s.abandon(c, errKilled)
			}
		}
		select {
		case <-t.C:
		case <-s.ctx.Done():
			return
		}
	}
}
