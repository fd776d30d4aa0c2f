package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestUninstall: make uninstall takes nothing away while the daemon runs. When it is stopped, no mount, no loop device, no keeper and
// no file of the installation is left, also where layers were still lazy.
func TestUninstall(t *testing.T) {
	program, err := exec.LookPath("make")
	if err != nil {
		t.Skip(err)
	}
	w := newWorld(t, 1, rig.RegistryOptions{})
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{config: "[lazy]\nquiet = \"24h\"\n"})
	d.needsEROFS()
	img, err := image.Busybox(w.ctx, rig.ImageDir(), image.EStargz)
	w.must(err)
	c := w.containerd(n, d)
	w.must(w.registry.WriteHosts(c.CertsDir()))
	w.must(c.Pull(w.ctx, "apps", "quay", w.push(img, "team/app", "uninstall")))

	// An installation of its own, whose daemon has the configuration of the one that runs.
	prefix := w.dir("prefix")
	binary, err := rig.Bin("containerd-quay-grpc")
	w.must(err)
	installed := []string{
		filepath.Join(prefix, "bin", "containerd-quay-grpc"), filepath.Join(prefix, "bin", "docker-quay"),
		filepath.Join(prefix, "lib", "systemd", "system", "containerd-quay-grpc.service"),
		filepath.Join(prefix, "host", "docker-quay"), filepath.Join(prefix, "user", "docker-quay"),
	}
	script := fmt.Sprintf("#!/bin/sh\nexec %s --config %s \"$@\"\n", binary, filepath.Join(filepath.Dir(d.root), "config.toml"))
	for _, path := range installed {
		w.must(os.MkdirAll(filepath.Dir(path), 0o755))
		w.must(os.WriteFile(path, []byte(script), 0o755))
	}
	uninstall := func(args ...string) error {
		cmd := exec.CommandContext(w.ctx, program, append([]string{"-C", rig.Root(), "uninstall", "PREFIX=" + prefix,
			"HOST_PLUGINS=" + filepath.Join(prefix, "host"), "USER_PLUGINS=" + filepath.Join(prefix, "user")}, args...)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	}
	there := func() (n int) {
		for _, path := range installed {
			if _, err := os.Lstat(path); err == nil {
				n++
			}
		}
		return n
	}
	mounts := func() int {
		all, err := mountinfo.GetMounts(mountinfo.PrefixFilter(d.root))
		w.must(err)
		return len(all)
	}

	if err := uninstall(); err == nil || !strings.Contains(err.Error(), "in use by another daemon") || !strings.Contains(err.Error(), "systemctl disable") {
		t.Errorf("while the daemon runs: %v", err)
	}
	if n, m := there(), mounts(); n != len(installed) || m != len(img.Layers)+1 {
		t.Errorf("%d of %d files and %d mounts are there, while the daemon runs", n, len(installed), m)
	}
	w.must(d.process.Stop())
	socket := filepath.Join(filepath.Dir(d.root), "keeper.sock")
	if _, err := keeper.Dial(w.ctx, socket); err != nil || mounts() != len(img.Layers)+1 {
		t.Errorf("the daemon's end left no keeper (%v), or not its %d mounts", err, mounts())
	}
	if err := uninstall(); err != nil {
		t.Error(err)
	}
	if n, m, l := there(), mounts(), len(loopDevices(w, d.root)); n != 0 || m != 0 || l != 0 {
		t.Errorf("left: %d files, %d mounts, %d loop devices", n, m, l)
	}
	if _, err := keeper.Dial(w.ctx, socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: a keeper: %v", err)
	}
	// Nothing of what was staged ever ran here.
	staged := w.dir("staged")
	path := filepath.Join(staged, prefix, "bin", "containerd-quay-grpc")
	w.must(os.MkdirAll(filepath.Dir(path), 0o755))
	w.must(os.WriteFile(path, []byte("#!/bin/sh\nexit 1\n"), 0o755))
	if err := uninstall("DESTDIR=" + staged); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was staged is left: %v", err)
	}
}
