package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// Stream delivers a range of a blob in order, from Offset() on, Length() bytes, then io.EOF. A cut connection does not
// show: it goes on from the same byte with a new request. Read is for one goroutine; Close may be called from any, also
// during a Read, which then fails.
type Stream struct {
	repository *Repository
	ctx        context.Context // of Open, ended by Close
	cancel     context.CancelFunc
	call       call
	size       int64 // of the blob
	off, end   int64 // the range delivered
	whole      bool

	// Only Read uses these.
	pos      int64 // the next byte to deliver
	idle     int   // attempts in a row that brought nothing
	restarts int   // answers with the whole blob to a request for its rest
	cut      error // what ended the last part
	err      error // what Read returns from now on

	mu     sync.Mutex // guards part and closed
	part   *part      // nil between parts
	closed bool
}

// Offset is where in the blob the stream begins: what was asked for, or 0 when Whole.
func (s *Stream) Offset() int64 { return s.off }

// Length is how many bytes the stream delivers in all.
func (s *Stream) Length() int64 { return s.end - s.off }

// Whole reports that a part was asked for but the server cannot do parts: the stream then begins at 0 and runs to the end of
// the blob. Asking it for more parts of this blob side by side would only bring the blob several times. It is false when
// the whole blob was asked for.
func (s *Stream) Whole() bool { return s.whole }

// Close ends the stream. It is not an error to close before the end, or twice.
func (s *Stream) Close() error {
	s.cancel()
	s.mu.Lock()
	p := s.part
	s.part, s.closed = nil, true
	s.mu.Unlock()
	if p != nil {
		return p.Body.Close()
	}
	return nil
}

var errClosed = errors.New("the stream is closed")

// Read is io.Reader's. It returns an error only when the stream is over: at its end, by ctx, or because going on is in vain.
func (s *Stream) Read(b []byte) (int, error) {
	if s.err == nil && s.pos == s.end {
		s.err = io.EOF
	}
	if s.err != nil || len(b) == 0 {
		return 0, s.err
	}
	for {
		p, err := s.current()
		if err != nil {
			s.err = err
			return 0, err
		}
		want := min(int64(len(b)), s.end-s.pos, p.end-s.pos)
		n, err := p.Body.Read(b[:want])
		if n > 0 {
			s.pos += int64(n)
			s.idle = 0
		}
		switch {
		case s.pos == s.end, s.pos == p.end:
			if err != io.EOF && surplus(p, s.pos, s.repository.client.limits.probe) {
				s.err = s.mismatch(p, "more bytes came than were announced")
			}
			s.drop()
		case err == io.EOF && framed(p.Response):
			s.err = s.mismatch(p, fmt.Sprintf("it ended at byte %d of %d", s.pos, p.end))
			s.drop()
		case err != nil:
			s.cut = bare(err)
			s.drop()
			if s.idle > 0 && !p.ep.isLast(s.repository) {
				s.repository.client.pauses.fail(p.ep.Host, s.repository.client.limits.mirrorDown)
			}
		}
		if n > 0 {
			return n, nil // an error shows at the next call
		}
		if s.err != nil {
			return 0, s.err
		}
	}
}

// framed reports whether the end of a body is known to be where its sender wanted it: by its length, which net/http checks, or by
// the last chunk. Without either a cut looks like an end.
func framed(resp *http.Response) bool {
	return resp.ContentLength >= 0 || len(resp.TransferEncoding) > 0
}

// surplus reports whether a body of unknown length goes on behind the last byte that was announced. It does not wait for long:
// the digest will tell in the end.
func surplus(p *part, pos int64, patience time.Duration) bool {
	if pos != p.end || p.ContentLength >= 0 {
		return false
	}
	t := time.AfterFunc(patience, func() { p.Body.Close() })
	defer t.Stop()
	var b [1]byte
	n, _ := io.ReadFull(p.Body, b[:])
	return n > 0
}

func (ep *endpoint) isLast(r *Repository) bool { return ep == r.endpoints[len(r.endpoints)-1] }

// current returns the part to read from, asking for the rest of the range when there is none.
func (s *Stream) current() (*part, error) {
	s.mu.Lock()
	p, closed := s.part, s.closed
	s.mu.Unlock()
	if closed {
		return nil, errClosed
	}
	if p != nil {
		return p, nil
	}
	c := s.repository.client
	for {
		if s.idle >= c.limits.cuts {
			return nil, s.gaveUp(fmt.Sprintf("%d connections in a row were cut without a byte", s.idle))
		}
		if s.idle > 0 {
			_ = sleep(s.ctx, c.limits.wait(c.limits.backoff, s.idle-1))
		}
		if err := ended(s.ctx); err != nil {
			return nil, fmt.Errorf("cannot %s %s: %w", s.call.op, s.call.reference, err)
		}
		s.idle++
		c.counts.resumes.Add(1)
		c.log.Debug("going on with a blob", "blob", s.call.blob, "at", s.pos, "attempt", s.idle, "cut", s.cut)
		p, err := s.repository.openPart(s.ctx, s.call, s.pos, s.end, s.size)
		if err != nil {
			return nil, err
		}
		if p.whole && s.pos > 0 {
			if s.restarts++; s.restarts > c.limits.restarts {
				p.Body.Close()
				return nil, s.gaveUp(fmt.Sprintf("it sends blobs only from their beginning and was cut %d times", s.restarts))
			}
			if n, err := s.skip(p); err != nil {
				s.cut = fmt.Errorf("cut at byte %d while skipping to %d: %w", n, s.pos, bare(err))
				continue
			}
		}
		if !s.adopt(p) {
			return nil, errClosed
		}
		return p, nil
	}
}

// skip reads what was delivered before.
func (s *Stream) skip(p *part) (int64, error) {
	if !s.adopt(p) {
		return 0, errClosed
	}
	n, err := io.CopyN(io.Discard, p.Body, s.pos)
	if err != nil {
		s.drop()
	}
	return n, err
}

// adopt makes p the current part, unless the stream was closed meanwhile.
func (s *Stream) adopt(p *part) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		p.Body.Close()
		return false
	}
	s.part = p
	return true
}

// drop ends the current part.
func (s *Stream) drop() {
	s.mu.Lock()
	p := s.part
	s.part = nil
	s.mu.Unlock()
	if p != nil {
		p.Body.Close()
	}
}

func (s *Stream) mismatch(p *part, what string) error {
	return s.repository.failed(p.ep, s.call, p.host, ticket{}, failure{kind: ErrMismatch, cause: errors.New(what), status: p.StatusCode})
}

func (s *Stream) gaveUp(what string) error {
	ep := s.repository.endpoints[len(s.repository.endpoints)-1]
	cause := errors.New(what)
	if s.cut != nil {
		cause = fmt.Errorf("%s: %w", what, s.cut)
	}
	return s.repository.failed(ep, s.call, ep.Host, ticket{}, failure{kind: ErrUnavailable, cause: cause})
}
