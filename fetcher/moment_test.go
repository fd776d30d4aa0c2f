package fetcher

import (
	"strings"
	"testing"
	"time"
)

// TestMomentIsMonotonic: what was noted keeps the monotonic clock's reading, by which
// package time measures whatever the machine's clock is set to meanwhile.
func TestMomentIsMonotonic(t *testing.T) {
	var m moment
	now := time.Now()
	if m.before(now) < 1000*time.Hour {
		t.Errorf("a moment that was never set was %s ago", m.before(now))
	}
	m.set(now.Add(-time.Second))
	if got := m.before(now); got != time.Second {
		t.Errorf("%s ago", got)
	}
	if got := m.time().String(); !strings.Contains(got, " m=") {
		t.Errorf("%s has no reading of the monotonic clock", got)
	}
}
