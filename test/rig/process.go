package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	// pollInterval is how often a condition without a signal (does the server answer yet?) is looked at.
	pollInterval = 20 * time.Millisecond
	// readyTimeout bounds a daemon's start. containerd needs 0.4 s on an idle machine; a busy one was seen to need ten times that.
	readyTimeout = 30 * time.Second
	// stopTimeout is how long a daemon may take to end after SIGTERM before it is killed: dockerd gives its containers 10 s.
	stopTimeout = 15 * time.Second
)

// Command says what to run and how.
type Command struct {
	// Name is what the process is called in messages; its log is NAME.log. Unique in the rig: a restart appends.
	Name string
	Path string // found by Bin when it has no slash
	Args []string
	Env  []string // added to this process's environment, later entries win
	Dir  string
	Node *Node // the namespace to run in; nil is this process's own
	// Ready is called until it returns nil, the process ends or 30 s have passed. nil: ready at once.
	Ready func(ctx context.Context) error
	// Stdout, when set, gets what would else go to the log together with stderr.
	Stdout io.Writer
}

// Process is a running (or ended) child in a process group of its own. It dies with this process, however that ends.
type Process struct {
	command Command
	cmd     *exec.Cmd
	logPath string
	done    chan struct{} // closed when it has ended; err is set before
	err     error

	stopping sync.Mutex
}

// Start runs a command and waits until it is ready. The rig stops it on Close.
func (r *Rig) Start(ctx context.Context, c Command) (*Process, error) {
	p, err := r.launch(c)
	if err != nil {
		return nil, err
	}
	if err := p.waitReady(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w\n%s", c.Name, err, p.Tail(10)), p.Stop())
	}
	return p, nil
}

func (r *Rig) launch(c Command) (*Process, error) {
	path := c.Path
	if filepath.Base(path) == path {
		found, err := Bin(path)
		if err != nil {
			return nil, err
		}
		path = found
	}
	logs, err := r.Dir("logs")
	if err != nil {
		return nil, err
	}
	p := &Process{command: c, logPath: filepath.Join(logs, c.Name+".log"), done: make(chan struct{})}
	log, err := os.OpenFile(p.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", c.Name, err)
	}
	defer log.Close() // the child has its own

	p.cmd = exec.Command(path, c.Args...)
	if c.Node != nil {
		// nsenter and not `ip netns exec`: that one gives the process a mount namespace of its own as well, in which a
		// snapshotter's mounts would be invisible to everyone else. It ends in exec: the process ID stays.
		args := append([]string{"--net=" + c.Node.path(), "--", path}, c.Args...)
		p.cmd = exec.Command("nsenter", args...)
	}
	p.cmd.Dir = c.Dir
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if c.Stdout != nil {
		p.cmd.Stdout = c.Stdout
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	// Registered before the start and by one owner: Close cannot miss a process that is being started.
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, fmt.Errorf("start %s: the rig is being taken down", c.Name)
	}
	if err := startOnLastingThread(p.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	r.processes = append(r.processes, p)
	r.cleanups = append(r.cleanups, p.Stop)
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// waitReady polls the command's Ready.
func (p *Process) waitReady(ctx context.Context) error {
	if p.command.Ready == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := p.command.Ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("it ended before it was ready: %s", p.State())
		case <-ctx.Done():
			return fmt.Errorf("not ready in time: %w", err)
		case <-tick.C:
		}
	}
}

// Name is the command's.
func (p *Process) Name() string { return p.command.Name }

// Pid is the process ID, also after the end.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end and returns what exec.Cmd.Wait says, or ctx's error while it still runs.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
		return fmt.Errorf("wait for %s: %w", p.Name(), ctx.Err())
	}
}

// State says in words whether the process runs, and how it ended.
func (p *Process) State() string {
	select {
	case <-p.done:
		return p.cmd.ProcessState.String()
	default:
		return "running, pid " + strconv.Itoa(p.Pid())
	}
}

// Signal sends s to the process alone, not to its group.
func (p *Process) Signal(s syscall.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s: %w", p.Name(), err)
	}
	return nil
}

// Stop ends the process as an init system would: SIGTERM, 15 s, then SIGKILL, then SIGKILL to what is left of its group.
// It returns when the process is gone; one that had already ended is no error.
func (p *Process) Stop() error {
	p.stopping.Lock()
	defer p.stopping.Unlock()
	err := p.Signal(syscall.SIGTERM)
	if !p.ended(stopTimeout) {
		err = errors.Join(err, fmt.Errorf("%s did not end within %s of SIGTERM and was killed", p.Name(), stopTimeout))
	}
	p.killGroup()
	<-p.done
	return err
}

// Kill9 kills the process without a chance to clean up, as a crash would. Its children live on.
func (p *Process) Kill9() error {
	p.stopping.Lock()
	defer p.stopping.Unlock()
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	<-p.done
	return nil
}

func (p *Process) ended(within time.Duration) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
		return false
	}
}

// killGroup kills every member of the group. The group ID cannot have been reused while a member lives, and without one the
// signal fails.
func (p *Process) killGroup() {
	_ = syscall.Kill(-p.Pid(), syscall.SIGKILL)
}

// LogPath is the file with what the process wrote.
func (p *Process) LogPath() string { return p.logPath }

// Log is everything the process wrote, over all its starts.
func (p *Process) Log() string {
	raw, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	return string(raw)
}

// Tail is the last lines of Log.
func (p *Process) Tail(lines int) string {
	raw := bytes.TrimRight([]byte(p.Log()), "\n")
	for i := len(raw) - 1; i >= 0; i-- {
		if raw[i] == '\n' {
			if lines--; lines == 0 {
				return string(raw[i+1:])
			}
		}
	}
	return string(raw)
}
