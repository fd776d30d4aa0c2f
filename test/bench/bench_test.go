package bench

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"
)

// ballast is more than the programs measured in the tests need.
var ballast []byte

func TestMain(m *testing.M) {
	Init()
	m.Run()
}

func TestSeries(t *testing.T) {
	for _, c := range []struct {
		name             string
		s                Series
		median, min, max float64
	}{
		{"none", nil, 0, 0, 0},
		{"one", Series{2}, 2, 2, 2},
		{"even", Series{4, 1, 3, 2}, 2.5, 1, 4},
		{"odd", Series{9, 1, 5}, 5, 1, 9},
	} {
		if m, lo, hi := c.s.Median(), c.s.Min(), c.s.Max(); m != c.median || lo != c.min || hi != c.max {
			t.Errorf("%s: median %v, min %v, max %v; want %v, %v, %v", c.name, m, lo, hi, c.median, c.min, c.max)
		}
	}
}

// A child's peak is its own, however large the process is that asked.
func TestMeasure(t *testing.T) {
	ballast = make([]byte, 256<<20)
	for i := range ballast {
		ballast[i] = byte(i)
	}
	u, err := Measure(context.Background(), []string{"WORD=hello"}, "/bin/sh", "-c", `test "$WORD" = hello && sleep 0.1`)
	if err != nil {
		t.Fatal(err)
	}
	if u.Seconds < 0.1 || u.Seconds > 10 {
		t.Errorf("sleep 0.1 took %v s", u.Seconds)
	}
	if u.PeakRSS < 100<<10 || u.PeakRSS > 128<<20 {
		t.Errorf("a shell's peak is %d bytes", u.PeakRSS)
	}
	_, err = Measure(context.Background(), nil, "/bin/sh", "-c", "echo too bad >&2; exit 3")
	if err == nil || !strings.Contains(err.Error(), "too bad") {
		t.Errorf("a program that fails: %v", err)
	}
}

func TestTable(t *testing.T) {
	type row struct {
		Candidate string  `json:"candidate"`
		Bytes     int64   `json:"bytes"`
		Seconds   float64 `json:"seconds"`
	}
	r := New[row]("none")
	r.Rows = []row{{"http", 1 << 20, 1.25}, {"quay", 1 << 20, 1234.5}}
	var b strings.Builder
	if err := r.Table(&b); err != nil {
		t.Fatal(err)
	}
	want := "  candidate    bytes  seconds\n       http  1048576    1.250\n       quay  1048576     1234\n"
	if b.String() != want {
		t.Errorf("table:\n%s\nwant:\n%s", b.String(), want)
	}
	if r.CPUs < 1 || r.Kernel == "" || r.Commit == "" {
		t.Errorf("report about %d CPUs, kernel %q, commit %q", r.CPUs, r.Kernel, r.Commit)
	}
}

func TestQuantile(t *testing.T) {
	s := Series{}
	for i := range 200 {
		s = append(s, float64(200-i))
	}
	for _, c := range []struct{ q, want float64 }{{0, 1}, {0.5, 100}, {0.99, 198}, {1, 200}} {
		if got := s.Quantile(c.q); got != c.want {
			t.Errorf("quantile %v of 1 to 200 is %v, want %v", c.q, got, c.want)
		}
	}
	if got := (Series{}).Quantile(0.5); got != 0 {
		t.Errorf("quantile of nothing is %v", got)
	}
}

// What /proc says of this process is what it does.
func TestProcess(t *testing.T) {
	pid := os.Getpid()
	machine, err := MachineNow()
	if err != nil {
		t.Fatal(err)
	}
	before, err := CPUTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	for begun := time.Now(); ; {
		used, err := CPUTime(pid)
		if err != nil {
			t.Fatal(err)
		}
		if used -= before; used >= 100*time.Millisecond {
			break
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("a loop of 10 s used %v", used)
		}
	}
	after, err := MachineNow()
	if err != nil {
		t.Fatal(err)
	}
	if busy := after.Busy(machine); busy <= 0 || busy > 100 {
		t.Errorf("the machine was %v %% busy", busy)
	}
	rss, err := RSS(pid)
	peak, perr := PeakRSS(pid)
	if err != nil || perr != nil || rss < 1<<20 || peak < rss {
		t.Errorf("memory %d, %v; peak %d, %v", rss, err, peak, perr)
	}
	fds, err := FDs(pid)
	f, ferr := os.Open(os.DevNull)
	if err != nil || ferr != nil {
		t.Fatal(err, ferr)
	}
	defer f.Close()
	if more, err := FDs(pid); err != nil || more != fds+1 {
		t.Errorf("%d files are open, and with one more %d, %v", fds, more, err)
	}
	const nobody = 1 << 30 // above the kernel's largest pid
	for name, f := range map[string]func(int) error{
		"CPU":    func(pid int) error { _, err := CPUTime(pid); return err },
		"memory": func(pid int) error { _, err := RSS(pid); return err },
		"files":  func(pid int) error { _, err := FDs(pid); return err },
	} {
		if f(nobody) == nil {
			t.Errorf("%s of a process that does not exist", name)
		}
	}
}
