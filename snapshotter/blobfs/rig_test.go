package blobfs

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
)

// rig is a folder with keeper, mount and processes, that leaves nothing behind.
type rig struct {
	t   *testing.T
	dir string
}

func newRig(t *testing.T) *rig {
	t.Helper()
	needFuse(t)
	return newRigIn(t, t.TempDir())
}

func newRigIn(t *testing.T, dir string) *rig {
	t.Helper()
	r := &rig{t: t, dir: dir}
	t.Cleanup(func() { unmount(mountOf(r.dir)) })
	t.Setenv(dirEnv, r.dir)
	t.Setenv(roleEnv, "keeper")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err := keeper.Start(ctx, socketOf(r.dir), []string{executable(t), "-test.run=^$"})
	os.Unsetenv(roleEnv)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.killKeeper)
	return r
}

func needFuse(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("needs /dev/fuse")
	}
}

func executable(t testing.TB) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

func unmount(path string) {
	for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
	}
}

// store is the rig's keeper.
func (r *rig) store() keeper.Store {
	r.t.Helper()
	c, err := keeper.Dial(context.Background(), socketOf(r.dir))
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

// killKeeper kills the process that listens on the socket, if there is one.
func (r *rig) killKeeper() {
	c, err := net.Dial("unixpacket", socketOf(r.dir))
	if err != nil {
		return
	}
	defer c.Close()
	raw, _ := c.(*net.UnixConn).SyscallConn()
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil && int(cred.Pid) != os.Getpid() {
			unix.Kill(int(cred.Pid), unix.SIGKILL)
		}
	})
}

// process is a re-execution of the test binary.
type process struct {
	*exec.Cmd
	t    *testing.T
	mu   sync.Mutex
	text bytes.Buffer
	read chan struct{} // closed when its output ended
	line chan string   // the first line
	once sync.Once
	err  error
}

func (r *rig) start(role string, args ...string) *process {
	r.t.Helper()
	p := &process{Cmd: exec.Command(executable(r.t), "-test.run=^$"), t: r.t, read: make(chan struct{}), line: make(chan string, 1)}
	p.Env = append(os.Environ(), roleEnv+"="+role, dirEnv+"="+r.dir, argsEnv+"="+strings.Join(args, " "))
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, w, err := os.Pipe()
	if err != nil {
		r.t.Fatal(err)
	}
	p.Stdout, p.Stderr = w, w
	err = p.Start()
	w.Close()
	if err != nil {
		r.t.Fatal(err)
	}
	go func() {
		defer close(p.read)
		defer close(p.line)
		defer out.Close()
		first := true
		for s := bufio.NewScanner(out); s.Scan(); first = false {
			p.mu.Lock()
			fmt.Fprintln(&p.text, s.Text())
			p.mu.Unlock()
			if first {
				p.line <- s.Text()
			}
		}
	}()
	r.t.Cleanup(func() { p.end(unix.SIGKILL) })
	return p
}

// end sends a signal and waits; it gives the output.
func (p *process) end(sig syscall.Signal) (string, error) {
	p.once.Do(func() {
		p.Process.Signal(sig)
		p.err = p.Wait()
		<-p.read
	})
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.String(), p.err
}

// serving waits until a daemon said that it serves.
func (p *process) serving() string {
	p.t.Helper()
	select {
	case l := <-p.line:
		if strings.HasPrefix(l, "serving") {
			return l
		}
		text, _ := p.end(unix.SIGKILL)
		p.t.Fatalf("the daemon does not serve: %s", text)
	case <-time.After(30 * time.Second):
		p.t.Fatal("the daemon does not serve for 30 s")
	}
	return ""
}

// finish has a reader end and complains of what it saw.
func (p *process) finish() {
	p.t.Helper()
	text, err := p.end(unix.SIGTERM)
	if err != nil {
		p.t.Errorf("a reader failed: %v: %s", err, text)
		return
	}
	var n int
	if _, err := fmt.Sscanf(text, "reads %d", &n); err != nil || n < 10 {
		p.t.Errorf("a reader read too little: %q", text)
	}
	p.t.Log("reader: ", strings.TrimSpace(text))
}
