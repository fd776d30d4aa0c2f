package bench

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of the kernel's CPU times: USER_HZ is 100 on every architecture that Go runs on (proc(5)).
const tick = 10 * time.Millisecond

// CPUTime is the user and system time that a running process has used, its ended and awaited children not included.
func CPUTime(pid int) (time.Duration, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
	}
	// The name, field 2, may hold anything; utime and stime are the fields 14 and 15.
	_, rest, _ := bytes.Cut(raw, []byte(") "))
	fields := strings.Fields(string(rest))
	if len(fields) < 13 {
		return 0, fmt.Errorf("read the CPU time of process %d: %q", pid, raw)
	}
	return ticks(fields[11:13])
}

func ticks(fields []string) (sum time.Duration, err error) {
	for _, f := range fields {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time %q: %w", f, err)
		}
		sum += time.Duration(n) * tick
	}
	return sum, nil
}

// RSS is the resident memory of a running process, in bytes.
func RSS(pid int) (int64, error) { return memory(pid, "VmRSS:") }

// PeakRSS is the most resident memory that a running process had so far, in bytes.
func PeakRSS(pid int) (int64, error) { return memory(pid, "VmHWM:") }

// PSS is the resident memory of a running process with its part of what it shares, in bytes: of processes of one program that of the
// program itself is counted once among them, not once for each.
func PSS(pid int) (int64, error) { return memoryOf(pid, "smaps_rollup", "Pss:") }

// memory reads a line of proc_pid_status(5).
func memory(pid int, name string) (int64, error) { return memoryOf(pid, "status", name) }

func memoryOf(pid int, file, name string) (int64, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return 0, fmt.Errorf("read the memory of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(raw)) {
		if value, ok := strings.CutPrefix(line, name); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("process %d has no memory: it has ended", pid)
}

// FDs is how many files, sockets and the like a running process has open.
func FDs(pid int) (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return 0, fmt.Errorf("list the open files of process %d: %w", pid, err)
	}
	return len(entries), nil
}

// Machine is what all CPUs together did since the machine started.
type Machine struct{ busy, all time.Duration }

// MachineNow reads the counters of all CPUs.
func MachineNow() (Machine, error) {
	raw, err := os.ReadFile("/proc/stat")
	if err != nil {
		return Machine{}, fmt.Errorf("read what the CPUs do: %w", err)
	}
	line, _, _ := strings.Cut(string(raw), "\n")
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return Machine{}, fmt.Errorf("read what the CPUs do: %q", line)
	}
	// user nice system idle iowait irq softirq steal; guests are in user and nice already.
	all, err := ticks(fields[1:9])
	if err != nil {
		return Machine{}, err
	}
	idle, err := ticks(fields[4:6])
	return Machine{all - idle, all}, err
}

// Busy is how much of all CPUs was used between since and m, in percent: 100 means that nothing could go faster.
func (m Machine) Busy(since Machine) float64 {
	if m.all <= since.all {
		return 0
	}
	return 100 * float64(m.busy-since.busy) / float64(m.all-since.all)
}
