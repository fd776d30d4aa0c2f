package rig_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/rig"
)

// victimVariable makes TestMain play the run that is ended in the middle.
const victimVariable = "QUAY_RIG_TEST_VICTIM"

func TestMain(m *testing.M) {
	if os.Getenv(victimVariable) != "" {
		if err := victim(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// victim starts a rig with a network, a mount and a process, says its ID and waits for its end.
func victim() error {
	r, err := rig.New()
	if err != nil {
		return err
	}
	w, err := r.NewNetwork(rig.NetworkOptions{Nodes: 1})
	if err != nil {
		return err
	}
	dir, err := r.Dir("mounted")
	if err != nil {
		return err
	}
	if err := syscall.Mount("none", dir, "tmpfs", 0, ""); err != nil {
		return err
	}
	// setsid: like a shim, it is in no group of ours and does not die with its parent.
	script := "setsid sh -c 'echo $$ > " + dir + "/pid; while :; do sleep 300; done' " + dir + "/orphan & wait"
	if _, err := r.Start(context.Background(), rig.Command{
		Name: "parent", Path: "/bin/sh", Args: []string{"-c", script}, Node: w.Node(1),
		Ready: func(context.Context) error { return nonEmpty(dir + "/pid") },
	}); err != nil {
		return err
	}
	fmt.Println(r.ID(), dir)
	select {}
}

func nonEmpty(path string) error {
	raw, err := os.ReadFile(path)
	if err == nil && len(raw) == 0 {
		err = errors.New("empty")
	}
	return err
}

// TestNothingIsLeftBehind ends a run that has everything in use: by a signal, which it takes itself down at, and by kill -9,
// after which the next rig sweeps.
func TestNothingIsLeftBehind(t *testing.T) {
	rig.RequireRoot(t)
	for _, signal := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			ctx := testContext(t)
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), victimVariable+"=1")
			cmd.Stderr = os.Stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(stdout).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			id, dir, _ := strings.Cut(strings.TrimSpace(line), " ")
			if len(namespaces(t, id)) == 0 {
				t.Fatal("the victim has no namespaces")
			}
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != signal {
				t.Errorf("it ended with %s, not by the signal", cmd.ProcessState)
			}
			if signal == syscall.SIGKILL {
				rig.ForTest(t) // sweeps
			}
			if left := namespaces(t, id); len(left) != 0 {
				t.Errorf("namespaces are left: %v", left)
			}
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the folder is left: %v", err)
			}
			mounts, err := os.ReadFile("/proc/self/mountinfo")
			if err != nil || strings.Contains(string(mounts), dir) {
				t.Errorf("a mount is left: %v", err)
			}
			if naming := commandLines(t, dir); len(naming) != 0 {
				t.Errorf("processes are left: %q", naming)
			}
		})
	}
}

func namespaces(t *testing.T, id string) []string {
	t.Helper()
	found, err := filepath.Glob("/run/netns/q" + id + "-*")
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func commandLines(t *testing.T, text string) []string {
	t.Helper()
	paths, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, path := range paths {
		if raw, err := os.ReadFile(path); err == nil && strings.Contains(string(raw), text) {
			found = append(found, string(raw))
		}
	}
	return found
}

// TestProcess covers the ends a process can have.
func TestProcess(t *testing.T) {
	ctx := testContext(t)
	r := rig.ForTest(t)
	p, err := r.Start(ctx, rig.Command{Name: "sleeper", Path: "sleep", Args: []string{"300"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Stop(); err != nil {
		t.Error(err)
	}
	if p.State() != "signal: terminated" {
		t.Errorf("stopped: %s", p.State())
	}
	if err := p.Stop(); err != nil {
		t.Errorf("stopped twice: %v", err)
	}
	p, err = r.Start(ctx, rig.Command{Name: "victim", Path: "sleep", Args: []string{"300"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill9(); err != nil || p.State() != "signal: killed" {
		t.Errorf("killed: %s, %v", p.State(), err)
	}
	begin := time.Now()
	_, err = r.Start(ctx, rig.Command{
		Name: "broken", Path: "/bin/sh", Args: []string{"-c", "echo what is wrong; exit 3"},
		Ready: func(context.Context) error { return errors.New("never") },
	})
	if err == nil || !strings.Contains(err.Error(), "what is wrong") || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("a daemon that fails at start: %v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("its failure was seen after %s", took)
	}
	if _, err := r.Start(ctx, rig.Command{Name: "none", Path: "no-such-program"}); !errors.Is(err, rig.ErrNoTool) {
		t.Errorf("a program that is not there: %v", err)
	}
}
