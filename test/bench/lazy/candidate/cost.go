package candidate

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
)

// Cost is what programs took of a machine so far.
type Cost struct {
	CPU     time.Duration // of user and system time, that of ended children included
	PeakRSS int64         // bytes of resident memory, each program's peak
}

// Cost is that of the candidate with its containerd.
func (m *Machine) Cost() (Cost, error) {
	c, err := m.HelperCost()
	if err != nil {
		return c, err
	}
	return c, c.add(m.containerd.Process().Pid())
}

// HelperCost is that of what the candidate has beside containerd.
func (m *Machine) HelperCost() (c Cost, err error) {
	for _, pid := range processesUnder(m.dir) {
		// Shims name containerd's folder only; what is found here is the candidate's. One that has just ended counts no more.
		if _, statErr := os.Stat(fmt.Sprintf("/proc/%d", pid)); statErr != nil {
			continue
		}
		if err := c.add(pid); err != nil {
			return c, err
		}
	}
	return c, nil
}

// tick is the unit of the kernel's CPU times, see package bench.
const tick = 10 * time.Millisecond

func (c *Cost) add(pid int) error {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return fmt.Errorf("read the CPU time of process %d: %w", pid, err)
	}
	// The name, field 2 of proc_pid_stat(5), may hold anything; utime, stime, cutime and cstime are the fields 14 to 17.
	_, rest, _ := bytes.Cut(raw, []byte(") "))
	fields := strings.Fields(string(rest))
	if len(fields) < 15 {
		return fmt.Errorf("read the CPU time of process %d: %q", pid, raw)
	}
	for _, f := range fields[11:15] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return fmt.Errorf("read the CPU time of process %d: %w", pid, err)
		}
		c.CPU += time.Duration(n) * tick
	}
	peak, err := bench.PeakRSS(pid)
	c.PeakRSS += peak
	return err
}
