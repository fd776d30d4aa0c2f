package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// Usage is what one run of a program took, from its start to its end.
type Usage struct {
	Seconds float64 `json:"seconds"`
	CPU     float64 `json:"cpu_s"`       // seconds of user and system time
	PeakRSS int64   `json:"peak_rss"`    // bytes of resident memory at most; page cache does not count
	User    float64 `json:"cpu_user_s"`  // the user part of CPU
	Major   int64   `json:"page_faults"` // that had to wait for the disk
}

// measureVariable marks a process as the one between a benchmark and what it measures.
const measureVariable = "QUAY_BENCH_MEASURE"

// Init must be the first call in main. In the process between it does its work and does not return.
//
// The process between is there because a child starts with its parent's peak: exec(2) counts the memory of the image that it
// replaces into ru_maxrss, and after vfork(2) that is the parent's. A benchmark that holds a registry or reads images
// would put its own peak under every candidate; the process between has none.
func Init() {
	if os.Getenv(measureVariable) == "" {
		return
	}
	os.Unsetenv(measureVariable)
	cmd := exec.Command(os.Args[1], os.Args[2:]...)
	cmd.Args[0] = os.Args[1]
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	start := time.Now()
	err := cmd.Run()
	took := time.Since(start)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	u := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	_ = json.NewEncoder(os.Stdout).Encode(Usage{
		Seconds: took.Seconds(),
		CPU:     (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds(),
		User:    cmd.ProcessState.UserTime().Seconds(),
		PeakRSS: u.Maxrss << 10,
		Major:   u.Majflt,
	})
	os.Exit(0)
}

// Measure runs a program to its end and tells what that took. env is added to this process's environment. A program that
// fails is an error with the end of what it wrote.
func Measure(ctx context.Context, env []string, program string, args ...string) (Usage, error) {
	self, err := os.Executable()
	if err != nil {
		return Usage{}, err
	}
	cmd := exec.CommandContext(ctx, self, append([]string{program}, args...)...)
	cmd.Env = append(append(os.Environ(), env...), measureVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return Usage{}, ctx.Err()
		}
		return Usage{}, fmt.Errorf("%s: %w: %s", program, err, strings.TrimSpace(stderr.String()))
	}
	var u Usage
	if err := json.Unmarshal(stdout.Bytes(), &u); err != nil {
		return Usage{}, fmt.Errorf("measure %s: %w", program, err)
	}
	return u, nil
}
