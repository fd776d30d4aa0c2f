package e2e

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// otherVersion is what the second binary calls itself.
const otherVersion = "other"

// upgrade is a daemon's program with another to take its place.
type upgrade struct {
	path     string // where the daemon is started from
	binaries [2]string
}

// newUpgrade builds the second program: as the first, but for the version. It takes the linker's time, which no world lasts.
func newUpgrade(t *testing.T) *upgrade {
	t.Helper()
	needsNodes(t)
	first, err := rig.Bin("containerd-quay-grpc")
	if err != nil {
		t.Skip(err)
	}
	if _, err := exec.LookPath("go"); err != nil {
		t.Skip("there is no go command to build another version with")
	}
	dir := t.TempDir()
	second := filepath.Join(dir, otherVersion)
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath",
		"-ldflags", "-s -w -X github.com/docker-quay/docker-quay/fetcher.Version="+otherVersion, "-o", second, "./snapshotter/containerd-quay-grpc")
	build.Dir, build.Env = rig.Root(), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build another version: %v: %s", err, out)
	}
	u := &upgrade{path: filepath.Join(dir, "containerd-quay-grpc"), binaries: [2]string{first, second}}
	u.install(t, 0)
	return u
}

// install puts one of the two where the daemon is started from, as package managers do: aside, and then by a rename.
func (u *upgrade) install(t *testing.T, which int) {
	t.Helper()
	b, err := os.ReadFile(u.binaries[which])
	if err == nil {
		err = os.WriteFile(u.path+".new", b, 0o755)
	}
	if err == nil {
		err = os.Rename(u.path+".new", u.path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// keeper is the process that keeps the daemon's connection with the kernel.
func (d *daemon) keeper() int {
	d.w.Helper()
	pid, err := d.findKeeper()
	d.w.must(err)
	return pid
}

// findKeeper asks the kernel who listens on the keeper's socket.
func (d *daemon) findKeeper() (int, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(d.w.ctx, "unixpacket", filepath.Join(filepath.Dir(d.root), "keeper.sock"))
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
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, err
	}
	if cerr != nil {
		return 0, cerr
	}
	return int(cred.Pid), nil
}

// TestUpgradeStorm: the daemon's program is replaced by another version, and back, while containers read what is not on the
// node yet; the new one starts after the former was stopped, or was killed. They read on, and nothing but what is in the image.
func TestUpgradeStorm(t *testing.T) {
	rounds := 4
	if n, err := strconv.Atoi(os.Getenv(killsEnv)); err == nil {
		rounds = max(n, rounds)
	}
	up := newUpgrade(t)
	w := newWorldFor(t, 1, rig.RegistryOptions{}, testTimeout+time.Duration(rounds)*3*time.Second)
	img := w.stock(image.EStargz)
	ref := w.push(img, "stock", "1")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{config: "[limits]\ndownload = \"1MiB\"\n[lazy]\nquiet = \"1h\"\n", program: up.path})
	d.needsEROFS()
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", ref))
	one, two := w.tenant(c, img, ref), w.tenant(c, img, ref)
	crowds := []*crowd{one.crowd(3), two.crowd(3)}
	crowds[0].goesOn("reads before any upgrade", 10)
	versions := [2]string{d.status().Version, otherVersion}
	kept := d.keeper()
	for i := range rounds {
		time.Sleep(rand.N(400 * time.Millisecond))
		now := (i + 1) % 2
		up.install(t, now)
		if i%4 < 2 {
			w.must(d.process.Stop())
		} else {
			w.must(d.process.Kill9())
		}
		d.start()
		if got := d.status().Version; got != versions[now] {
			t.Fatalf("version %q runs, not %q", got, versions[now])
		}
		for _, readers := range crowds {
			readers.goesOn(fmt.Sprintf("reads after upgrade %d", i), 5)
		}
	}
	for _, readers := range crowds {
		readers.end(false)
		readers.t.alive()
	}
	if now := d.keeper(); now != kept {
		t.Errorf("the keeper was process %d and is %d", kept, now)
	}
	one.reads("in the end")
}

// TestKeeperKilled: the keeper's death alone harms nobody, and another takes its place. With the daemon dead as well reads
// are errors: no wrong byte, and none hangs. The next daemon serves containers that start from then on.
func TestKeeperKilled(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	img := w.stock(image.EStargz)
	ref := w.push(img, "stock", "1")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{config: stormConfig})
	d.needsEROFS()
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", ref))
	one := w.tenant(c, img, ref)
	readers := one.crowd(4)
	readers.goesOn("reads before anything", 20)

	first := d.keeper()
	w.must(kill9(first))
	readers.goesOn("reads without a keeper", 50)
	w.until("another keeper", func() bool { pid, err := d.findKeeper(); return err == nil && pid != first })
	// The new one has the connection, too: the daemon's death is nothing to readers.
	w.until("the keeper's start", func() bool { return d.logs("the keeper had ended and was started again") })
	w.must(d.process.Kill9())
	d.start()
	readers.goesOn("reads with another keeper and another daemon", 20)
	one.alive()
	readers.end(false)

	for _, order := range []string{"keeper first", "daemon first"} {
		two := w.tenant(c, img, ref)
		readers := two.crowd(4)
		readers.goesOn(order+": reads before", 20)
		pid := d.keeper()
		if order == "keeper first" {
			w.must(kill9(pid))
			w.must(d.process.Kill9())
		} else {
			w.must(d.process.Kill9())
			w.must(kill9(pid))
		}
		w.until(order+": errors", func() bool { return readers.failed.Load() > 0 })
		two.alive()
		d.start()
		readers.end(true)
		two.alive()
		three := w.tenant(c, img, ref)
		three.reads(order + ": a container that was started later")
	}
}

func kill9(pid int) error {
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Kill()
	}
	if err != nil {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}
