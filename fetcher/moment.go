package fetcher

import (
	"sync/atomic"
	"time"
)

// moment is a time that goroutines note and look at without a lock. It keeps the
// reading of the monotonic clock, so that a machine whose clock is set by hours during
// a fetch does not take that for hours without a byte. The zero value is long ago.
type moment struct{ p atomic.Pointer[time.Time] }

func (m *moment) set(t time.Time) { m.p.Store(&t) }

func (m *moment) time() time.Time {
	if p := m.p.Load(); p != nil {
		return *p
	}
	return time.Time{}
}

// before returns how long before now it was.
func (m *moment) before(now time.Time) time.Duration { return now.Sub(m.time()) }
