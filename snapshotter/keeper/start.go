package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stageEnv tells Run what Start wants of it: "leave" to the first process, which makes
// the second and ends, so that the keeper is no child of the daemon; "stay" to the
// second. In both, descriptor readyFD is a pipe to Start that wants to hear one line.
const (
	stageEnv = "DOCKER_QUAY_KEEPER_STAGE"
	readyFD  = 3
	ready    = "ready"
)

const (
	// startTimeout is how long a keeper may take to be ready when the caller's context
	// says nothing; it takes some 50 ms on an idle machine.
	startTimeout = 20 * time.Second
	// retry is how often Start looks for a keeper that someone else just made.
	retry = 20 * time.Millisecond
	// oomScore is the keeper's place with the OOM killer: as little as root may ask for
	// short of "never", which would count against us if it ever leaked.
	oomScore = "-999"
	// cgroupName is the keeper's cgroup below the root of cgroup v2.
	cgroupName = "docker-quay-keeper"
)

// Start makes sure that socketPath has a keeper, and returns when it answers. argv is
// the command whose process calls Run with the same path, its file first (by
// os.Executable: the daemon's own binary). The process is in its own session, in / and
// without terminal, no child of ours.
func Start(ctx context.Context, socketPath string, argv []string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if _, err := Dial(ctx, socketPath); err == nil {
		return nil
	}
	if len(argv) == 0 {
		return errors.New("there is no command to start the keeper with")
	}
	err := spawn(ctx, argv)
	// When somebody else's keeper has the lock, it will answer soon.
	for errors.Is(err, ErrRunning) {
		_, derr := Dial(ctx, socketPath)
		if derr == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("a keeper has the lock of %s and does not answer: %w", socketPath, derr)
		case <-time.After(retry):
		}
	}
	if err != nil {
		return fmt.Errorf("the keeper of %s cannot be started: %w", socketPath, err)
	}
	_, err = Dial(ctx, socketPath)
	return err
}

// spawn runs argv in its first stage and waits for the second's line.
func spawn(ctx context.Context, argv []string) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), stageEnv+"=leave")
	apart(cmd, w)
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { r.SetReadDeadline(time.Unix(1, 0)) })()
	// The pipe ends when both stages have closed it: the second does so after its line.
	line, err := io.ReadAll(io.LimitReader(r, 4096))
	if werr := cmd.Wait(); err == nil && len(line) == 0 {
		err = fmt.Errorf("%s ended before its keeper was ready: %w", argv[0], errors.Join(werr, ctx.Err()))
	}
	switch text := string(line); {
	case err != nil:
		return err
	case text == ready:
		return nil
	case strings.HasPrefix(text, ErrRunning.Error()):
		return ErrRunning
	default:
		return errors.New(text)
	}
}

// apart has cmd run away from this process: own session, no terminal, in /.
func apart(cmd *exec.Cmd, report *os.File) {
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
}

// inherited tells what Start left in this process's environment, and takes it away.
// report tells Start how it went.
func inherited() (leave bool, report func(error)) {
	stage := os.Getenv(stageEnv)
	os.Unsetenv(stageEnv)
	switch stage {
	case "leave":
		return true, nil
	case "stay":
		pipe := os.NewFile(readyFD, "ready")
		return false, func(err error) {
			text := ready
			if err != nil {
				text = err.Error()
			}
			io.WriteString(pipe, text)
			pipe.Close()
		}
	}
	return false, func(error) {}
}

// detach starts this process's command once more, as the keeper proper.
func detach() error {
	pipe := os.NewFile(readyFD, "ready")
	defer pipe.Close()
	exe, err := os.Executable()
	if err == nil {
		cmd := exec.Command(exe, os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		// One thread is enough for what it does, and for its memory.
		cmd.Env = append(keeperEnv(os.Environ()), stageEnv+"=stay", "GOMAXPROCS=1")
		apart(cmd, pipe)
		if err = cmd.Start(); err == nil {
			shelter(cmd.Process.Pid)
			return cmd.Process.Release()
		}
	}
	io.WriteString(pipe, err.Error())
	return err
}

// keeperEnv leaves out what belongs to the daemon alone: systemd's notify socket would
// take the keeper's messages for the daemon's.
func keeperEnv(env []string) []string {
	var l []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		switch name {
		case "NOTIFY_SOCKET", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", "WATCHDOG_USEC":
		default:
			l = append(l, e)
		}
	}
	return l
}

// shelter does for the process what needs rights that we may not have: a small chance
// with the OOM killer, and a cgroup that does not end with the daemon's. Without them
// the keeper works, and dies sooner.
func shelter(pid int) {
	p := strconv.Itoa(pid)
	_ = os.WriteFile("/proc/"+p+"/oom_score_adj", []byte(oomScore), 0)
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return
	}
	for l := range strings.Lines(string(own)) {
		path, ok := strings.CutPrefix(strings.TrimSpace(l), "0::")
		if !ok || path == "/" {
			continue // version 1, or in the root, which nobody kills
		}
		const root = "/sys/fs/cgroup"
		if _, err := os.Stat(filepath.Join(root, "cgroup.controllers")); err != nil {
			continue
		}
		dir := filepath.Join(root, cgroupName)
		if err := os.Mkdir(dir, 0o755); err == nil || errors.Is(err, os.ErrExist) {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(p), 0)
		}
	}
}

// End has the keeper of socketPath end, and with it what it holds. It returns when nobody answers
// there any more, at once when nobody did.
func End(ctx context.Context, socketPath string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		pid, err := pidOf(ctx, socketPath)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
		if err == nil {
			err = syscall.Kill(pid, syscall.SIGTERM)
		}
		if err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("the keeper of %s cannot be ended: %w", socketPath, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the keeper of %s does not end: %w", socketPath, ctx.Err())
		case <-time.After(retry):
		}
	}
}

// pidOf is the process that listens on a keeper's socket.
func pidOf(ctx context.Context, socketPath string) (int, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", socketPath)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var cerr error
	err = raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, cerr); err != nil {
		return 0, err
	}
	if int(cred.Pid) == os.Getpid() || cred.Pid <= 1 {
		return 0, fmt.Errorf("process %d is no keeper", cred.Pid)
	}
	return int(cred.Pid), nil
}
