package snapshotter

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
)

const (
	// leastCPUs is the smallest share that can be set: with less, handshakes with
	// other nodes time out.
	leastCPUs = 0.1
	// mostCPUs is beyond any machine; it keeps out what is no number.
	mostCPUs = 1 << 16
	// cpuPeriod is the period of the kernel's bound in microseconds, its default:
	// a share of a half is 50 ms of each 100 ms.
	cpuPeriod = 100_000
)

// cgroup is where a process finds the bounds that the kernel keeps (cgroups(7),
// version 2). Fields are replaced by tests.
type cgroup struct {
	self  string // /proc/self/cgroup
	mount string // /sys/fs/cgroup
	pid   int
}

func ownCgroup() cgroup {
	return cgroup{self: "/proc/self/cgroup", mount: "/sys/fs/cgroup", pid: os.Getpid()}
}

// limitCPUs bounds the daemon to a number of CPUs, 0 for no bound, until undo is
// called. Two bounds apply: Go code runs on that many CPUs at a time, rounded up;
// and the kernel keeps to the number itself, with all it does for the daemon
// (disk, network), where the daemon has a control group of its own that it may
// write. Where not, the log says so and what to do.
func limitCPUs(cpus float64, g cgroup, log *slog.Logger) (undo func()) {
	if cpus <= 0 {
		return func() {}
	}
	was := runtime.GOMAXPROCS(0)
	procs := min(max(int(math.Ceil(cpus)), 1), was)
	runtime.GOMAXPROCS(procs)
	restore, err := g.bound(cpus)
	if err != nil {
		log.Warn("limits.cpus is not kept by the kernel: Go code runs on so many CPUs at a time, rounded up, and the kernel's own work for it comes on top; "+
			"for a bound that holds set CPUQuota= in the daemon's systemd unit, or the CPU limit of its container",
			"cpus", cpus, "go", procs, "reason", err)
		restore = func() {}
	} else {
		log.Info("own share of the CPUs", "cpus", cpus, "go", procs)
	}
	return func() {
		restore()
		runtime.GOMAXPROCS(was)
	}
}

// bound sets the kernel's bound, unless there is a stricter one, until restore is
// called. It fails when others would be bound, too.
func (g cgroup) bound(cpus float64) (restore func(), err error) {
	dir, err := g.dir()
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "cpu.max")
	was, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("the daemon's control group has no CPU bound: %w", err)
	}
	old := strings.TrimSpace(string(was))
	if have, ok := parseCPUMax(old); !ok {
		return nil, fmt.Errorf("%s has %q, which is not understood", file, old)
	} else if have <= cpus {
		return func() {}, nil
	}
	if err := g.alone(dir); err != nil {
		return nil, err
	}
	if err := os.WriteFile(file, fmt.Appendf(nil, "%d %d", int64(cpus*cpuPeriod), cpuPeriod), 0); err != nil {
		return nil, fmt.Errorf("the daemon may not bound its control group: %w", err)
	}
	return func() { _ = os.WriteFile(file, []byte(old), 0) }, nil
}

// dir is the daemon's group in the unified hierarchy.
func (g cgroup) dir() (string, error) {
	text, err := os.ReadFile(g.self)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(g.mount, filepath.FromSlash(path)), nil
		}
	}
	return "", errors.New("this system has no control groups of version 2")
}

// alone reports whether the daemon is the only process below dir.
func (g cgroup) alone(dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range strings.Fields(string(text)) {
		if pid != strconv.Itoa(g.pid) {
			return fmt.Errorf("the daemon shares its control group %s with process %s", dir, pid)
		}
	}
	below, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range below {
		if e.IsDir() {
			return fmt.Errorf("there are other control groups in the daemon's own, %s", dir)
		}
	}
	return nil
}

// parseCPUMax reads "QUOTA PERIOD", where the quota may be "max", as CPUs.
func parseCPUMax(s string) (cpus float64, ok bool) {
	quota, period, ok := strings.Cut(s, " ")
	p, err := strconv.ParseFloat(period, 64)
	if !ok || err != nil || !(p > 0) {
		return 0, false
	}
	if quota == "max" {
		return math.Inf(1), true
	}
	q, err := strconv.ParseFloat(quota, 64)
	return q / p, err == nil && q >= 0
}
