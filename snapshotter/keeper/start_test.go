package keeper

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pid tells who listens on the socket.
func pid(t *testing.T, path string) int {
	t.Helper()
	c, err := net.Dial("unixpacket", path)
	if err != nil {
		return 0
	}
	defer c.Close()
	p := 0
	raw, _ := c.(*net.UnixConn).SyscallConn()
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			p = int(cred.Pid)
		}
	})
	return p
}

// startRig is a socket whose keeper ends with the test.
func startRig(t *testing.T) (path string, argv []string) {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "keeper.sock")
	t.Setenv(socketEnv, path)
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	t.Cleanup(func() {
		if p := pid(t, path); p > 1 && p != os.Getpid() {
			unix.Kill(p, unix.SIGKILL)
		}
	})
	return path, []string{exe, "-test.run=^$"}
}

func TestStart(t *testing.T) {
	path, argv := startRig(t)
	// Several daemons at once: one keeper.
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if err := Start(t.Context(), path, argv); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	p := pid(t, path)
	if p == 0 {
		t.Fatal("there is no keeper")
	}
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Put(t.Context(), "a", pipe(t, "x")); err != nil {
		t.Fatal(err)
	}
	if err := Start(t.Context(), path, argv); err != nil || pid(t, path) != p {
		t.Errorf("Start beside a keeper: %v, process %d became %d", err, p, pid(t, path))
	}

	if sid, err := unix.Getsid(p); err != nil || sid != p {
		t.Errorf("its session is %d, %v", sid, err)
	}
	proc := "/proc/" + strconv.Itoa(p)
	if cwd, err := os.Readlink(proc + "/cwd"); err != nil || cwd != "/" {
		t.Errorf("its folder is %s, %v", cwd, err)
	}
	for _, fd := range []string{"0", "1", "2"} {
		if to, err := os.Readlink(proc + "/fd/" + fd); err != nil || to != "/dev/null" {
			t.Errorf("its descriptor %s is %s, %v", fd, to, err)
		}
	}
	stat, _ := os.ReadFile(proc + "/stat")
	_, rest, _ := strings.Cut(string(stat), ") ")
	if f := strings.Fields(rest); len(f) < 2 || f[1] == strconv.Itoa(os.Getpid()) {
		t.Errorf("it is a child of the daemon: %s", stat)
	}
	if env, _ := os.ReadFile(proc + "/environ"); strings.Contains(string(env), "NOTIFY_SOCKET") {
		t.Error("it has the daemon's notify socket")
	}
	if mayShelter() {
		if score, err := os.ReadFile(proc + "/oom_score_adj"); err != nil || strings.TrimSpace(string(score)) != oomScore {
			t.Errorf("its OOM score is %s, %v", score, err)
		}
	}

	// A killed keeper leaves socket and lock; the next one is made over them.
	unix.Kill(p, unix.SIGKILL)
	for pid(t, path) != 0 {
		time.Sleep(time.Millisecond)
	}
	if err := Start(t.Context(), path, argv); err != nil {
		t.Fatal(err)
	}
	if l, err := c.List(t.Context()); len(l) != 0 || err != nil {
		t.Errorf("a new keeper has %v, %v", l, err)
	}
}

// mayShelter tells whether this process may lower an OOM score, as it is now.
func mayShelter() bool {
	const own = "/proc/self/oom_score_adj"
	was, err := os.ReadFile(own)
	if err != nil || os.WriteFile(own, []byte(oomScore), 0) != nil {
		return false
	}
	return os.WriteFile(own, was, 0) == nil
}

func TestStartFails(t *testing.T) {
	path, argv := startRig(t)
	if err := Start(t.Context(), path, nil); err == nil {
		t.Error("without a command")
	}
	if err := Start(t.Context(), path, []string{"/bin/false"}); err == nil {
		t.Error("with a command that fails")
	}
	if err := Start(t.Context(), path, []string{"/nowhere/at/all"}); err == nil {
		t.Error("with a command that is not there")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := Start(ctx, path, []string{"/bin/sleep", "20"}); err == nil {
		t.Error("with a command that is no keeper")
	}
	t.Setenv(socketEnv, filepath.Join(path, "no", "folder"))
	if err := Start(t.Context(), path, argv); err == nil || !strings.Contains(err.Error(), "lock") {
		t.Errorf("with a keeper that cannot make its socket: %v", err)
	}
}

// TestEnd: the keeper ends when it is told to, and to end none is no error.
func TestEnd(t *testing.T) {
	path, argv := startRig(t)
	if err := Start(t.Context(), path, argv); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := End(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		if p := pid(t, path); p != 0 {
			t.Errorf("process %d is the keeper still", p)
		}
	}
}
