package target_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/plugin/target/targettest"
)

// binDir is where the Makefile installs the servers for the tests.
func binDir() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..", "build", "bin")
}

// needs skips unless we are root and the servers are there.
func needs(t *testing.T, binaries ...string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to run containers")
	}
	for _, b := range binaries {
		if _, err := os.Stat(filepath.Join(binDir(), b)); err != nil {
			t.Skipf("needs build/bin/%s (make tools)", b)
		}
	}
	if _, err := os.Stat("/bin/busybox"); err != nil {
		t.Skip("needs busybox-static")
	}
}

// start runs a server until the test ends and waits until its socket answers.
func start(t *testing.T, socket, netns string, args ...string) {
	t.Helper()
	if netns != "" {
		args = append([]string{"nsenter", "--net=/run/netns/" + netns}, args...)
	}
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "PATH="+binDir()+":"+os.Getenv("PATH"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(15 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			lines := strings.Split(string(b), "\n")
			t.Logf("%s:\n%s", args[0], strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	})
	deadline := time.After(30 * time.Second)
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return
		}
		select {
		case <-done:
			b, _ := os.ReadFile(log.Name())
			t.Fatalf("%s ended:\n%s", args[0], b)
		case <-deadline:
			t.Fatalf("%s does not answer at %s", args[0], socket)
		case <-time.After(20 * time.Millisecond): // a socket file has no event that says "listening"
		}
	}
}

// startContainerd returns the socket of a containerd of our own. netns, when not "", names a network namespace; a daemon
// in it still has our mounts.
func startContainerd(t *testing.T, netns string, extra ...string) string {
	t.Helper()
	needs(t, "containerd", "containerd-shim-runc-v2")
	dir := shortTemp(t)
	socket := filepath.Join(dir, "c.sock")
	config := fmt.Sprintf(`version = 3
root = %q
state = %q
imports = []
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"]
[grpc]
  address = %q
[plugins.'io.containerd.internal.v1.opt']
  path = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket, filepath.Join(dir, "opt"))
	config += strings.Join(extra, "\n")
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, socket, netns, filepath.Join(binDir(), "containerd"), "--config", file)
	return socket
}

// shortTemp is a directory whose path leaves room for sockets (108 bytes, unix(7)). Mounts below it are taken away
// with it.
func shortTemp(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "quay-target-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		mounts, _ := os.ReadFile("/proc/self/mounts")
		lines := strings.Split(string(mounts), "\n")
		for i := len(lines) - 1; i >= 0; i-- {
			if f := strings.Fields(lines[i]); len(f) > 1 && strings.HasPrefix(f[1], dir) {
				_ = syscall.Unmount(f[1], syscall.MNT_DETACH)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// newNetns makes a network namespace with its loopback up.
func newNetns(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("quayt%d", os.Getpid())
	if out, err := exec.Command("ip", "netns", "add", name).CombinedOutput(); err != nil {
		t.Skipf("no network namespaces: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	if out, err := exec.Command("ip", "-n", name, "link", "set", "lo", "up").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return name
}

// busybox is an image of two layers that prints what the second holds.
func busybox(t *testing.T, ref, greeting string, index bool) *targettest.Image {
	t.Helper()
	return busyboxWith(t, ref, greeting, index)
}

// busyboxWith adds files to the first layer, so that no other image shares it.
func busyboxWith(t *testing.T, ref, greeting string, index bool, more ...targettest.File) *targettest.Image {
	t.Helper()
	bin, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	img, err := targettest.New(targettest.Spec{
		Ref: ref, Index: index,
		Layers: [][]targettest.File{
			append(more, targettest.File{Name: "bin/", Mode: 0o755}, targettest.File{Name: "bin/busybox", Mode: 0o755, Body: bin},
				targettest.File{Name: "bin/cat", Link: "busybox"}),
			{{Name: "etc/", Mode: 0o755}, {Name: "etc/greeting", Mode: 0o644, Body: []byte(greeting + "\n")}},
		},
		Config: ocispec.ImageConfig{Cmd: []string{"/bin/cat", "/etc/greeting"}, Env: []string{"PATH=/bin"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
