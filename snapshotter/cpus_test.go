package snapshotter

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// TestLimitCPUs: the kernel's bound is set where it binds the daemon alone, and put back; where it cannot be, that is said.
func TestLimitCPUs(t *testing.T) {
	procs := runtime.GOMAXPROCS(0)
	for _, c := range []struct {
		name   string
		cpus   float64
		self   string // of /proc/self/cgroup
		max    string // of cpu.max, "" for none
		pids   string
		nested bool
		want   string // of cpu.max while it holds
		says   string
	}{
		{"a half", 0.5, "0::/system.slice/quay.service\n", "max 100000\n", "42\n", false, "50000 100000", "own share of the CPUs"},
		{"more than one", 1.5, "1:cpuset:/\n0::/quay\n", "max 100000\n", "42\n", false, "150000 100000", "own share"},
		{"tighten", 0.5, "0::/quay\n", "80000 100000\n", "42\n", false, "50000 100000", "own share"},
		{"stricter already", 2, "0::/quay\n", "50000 100000\n", "42\n", false, "50000 100000\n", "own share"},
		{"none", 0, "0::/quay\n", "max 100000\n", "42\n", false, "max 100000\n", ""},
		{"shared with another", 0.5, "0::/session\n", "max 100000\n", "1\n42\n", false, "max 100000\n", "shares its control group"},
		{"groups within", 0.5, "0::/pod\n", "max 100000\n", "42\n", true, "max 100000\n", "other control groups"},
		{"no controller", 1, "0::/quay\n", "", "42\n", false, "", "no CPU bound"},
		{"version 1", 1, "4:cpu:/quay\n", "max 100000\n", "42\n", false, "max 100000\n", "no control groups of version 2"},
		{"nonsense", 1, "0::/quay\n", "much\n", "42\n", false, "much\n", "is not understood"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			g := cgroup{self: filepath.Join(dir, "self"), mount: filepath.Join(dir, "fs"), pid: 42}
			_, path, _ := strings.Cut(c.self[strings.LastIndex(strings.TrimSpace(c.self), "\n")+1:], ":/")
			own := filepath.Join(g.mount, strings.TrimSpace(path))
			file := filepath.Join(own, "cpu.max")
			if err := os.MkdirAll(own, 0o755); err != nil {
				t.Fatal(err)
			}
			if c.nested {
				if err := os.Mkdir(filepath.Join(own, "child"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for name, text := range map[string]string{g.self: c.self, file: c.max, filepath.Join(own, "cgroup.procs"): c.pids} {
				if text == "" {
					continue
				}
				if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			var log bytes.Buffer
			undo := limitCPUs(c.cpus, g, slog.New(slog.NewTextHandler(&log, nil)))
			if got, _ := os.ReadFile(file); string(got) != c.want {
				t.Errorf("cpu.max is %q, want %q", got, c.want)
			}
			if want := min(max(int(c.cpus+0.999), 1), procs); c.cpus > 0 && runtime.GOMAXPROCS(0) != want {
				t.Errorf("Go runs on %d, want %d", runtime.GOMAXPROCS(0), want)
			}
			if !strings.Contains(log.String(), c.says) || c.says == "" && log.Len() > 0 {
				t.Errorf("the log says %q", log.String())
			}
			undo()
			if got, _ := os.ReadFile(file); strings.TrimSpace(string(got)) != strings.TrimSpace(c.max) || runtime.GOMAXPROCS(0) != procs {
				t.Errorf("in the end cpu.max is %q and Go runs on %d", got, runtime.GOMAXPROCS(0))
			}
		})
	}
}
