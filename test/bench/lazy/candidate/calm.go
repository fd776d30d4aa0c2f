package candidate

import (
	"context"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
)

const (
	// settle is the time in which everything is left alone before something is measured.
	settle = time.Second
	// memory is about what a pull and its page cache take.
	memory = 1 << 30
	// quiet is how long a link must have brought nothing to count as done. Both lazy snapshotters begin with what nobody asked for
	// when nobody has asked for anything for 5 s.
	quiet = 8 * time.Second
	// stillWithin bounds the wait for that.
	stillWithin = 2 * time.Minute
	// lookEvery is how often the link is looked at.
	lookEvery = 50 * time.Millisecond
	// trickle is what a link brings within lookEvery at most while nothing is fetched: members saying hello.
	trickle = 8 << 10
)

// Calm prepares what all candidates run on for one of them: memory is at hand, and then everything is left alone for a moment. It
// says what there was to do all the same, in percent of all CPUs.
func Calm(ctx context.Context) (float64, error) {
	if err := bench.TouchMemory(memory); err != nil {
		return 0, err
	}
	idle, err := bench.MachineNow()
	if err != nil {
		return 0, err
	}
	if err := bench.Wait(ctx, settle); err != nil {
		return 0, err
	}
	now, err := bench.MachineNow()
	return now.Busy(idle), err
}

// Still waits until the machine's link brings nothing any more, and says when that began and what it had brought.
func (m *Machine) Still(ctx context.Context) (at time.Time, got int64, err error) {
	if got, err = m.Received(); err != nil {
		return at, got, err
	}
	begun := time.Now()
	for at = begun; time.Since(at) < quiet && time.Since(begun) < stillWithin; {
		if err := bench.Wait(ctx, lookEvery); err != nil {
			return at, got, err
		}
		now, err := m.Received()
		if err != nil {
			return at, got, err
		}
		if now-got > trickle {
			at = time.Now()
		}
		got = now
	}
	return at, got, nil
}
