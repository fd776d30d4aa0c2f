package rig

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// sweep removes the rigs under base whose owner is dead. It is best effort: what cannot be removed now is tried again by
// the next rig.
func sweep(base string) {
	entries, err := os.ReadDir(base)
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(base, e.Name())
		if !e.IsDir() || ownerAlive(dir) {
			continue
		}
		killUnder(dir)
		forgetContainers(dir)
		_ = unmountUnder(dir)
		deleteNamespaces(e.Name())
		_ = os.RemoveAll(dir)
	}
}

// youngRig is how long a folder without an owner file counts as one that is being made.
const youngRig = time.Minute

func ownerAlive(dir string) bool {
	raw, err := os.ReadFile(filepath.Join(dir, ownerFile))
	if err != nil {
		info, err := os.Stat(dir)
		return err == nil && time.Since(info.ModTime()) < youngRig
	}
	pid, start, _ := strings.Cut(string(raw), " ")
	n, err := strconv.Atoi(pid)
	return err == nil && start != "" && startTime(n) == start
}

// startTime is a process's start in clock ticks since boot (proc(5), stat field 22), empty when there is no such process.
func startTime(pid int) string {
	fields := statFields(pid)
	const start = 22 - 3
	if len(fields) <= start {
		return ""
	}
	return fields[start]
}

// killUnder kills every process that names a path below dir on its command line, with all its descendants: shims, which
// outlive their containerd on purpose, and the containers below them. The folder is unique to one rig.
func killUnder(dir string) {
	doomed := processesNaming(dir + "/")
	if len(doomed) == 0 {
		return
	}
	children := map[int][]int{}
	for _, pid := range processes() {
		if fields := statFields(pid); len(fields) > 1 {
			if parent, err := strconv.Atoi(fields[1]); err == nil {
				children[parent] = append(children[parent], pid)
			}
		}
	}
	for i := 0; i < len(doomed); i++ {
		doomed = append(doomed, children[doomed[i]]...)
	}
	for _, pid := range doomed {
		if pid != os.Getpid() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	deadline := time.Now().Add(killPatience)
	for _, pid := range doomed {
		for time.Now().Before(deadline) && syscall.Kill(pid, 0) == nil && !isZombie(pid) {
			time.Sleep(pollInterval)
		}
	}
}

// killPatience bounds the wait for killed processes to be gone: a mount is busy until they are.
const killPatience = 5 * time.Second

// processes are the IDs of all processes that this one can see.
func processes() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// processesNaming are the processes, but this one, with the text on their command line.
func processesNaming(text string) []int {
	var pids []int
	for _, pid := range processes() {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && pid != os.Getpid() && bytes.Contains(line, []byte(text)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func isZombie(pid int) bool {
	fields := statFields(pid)
	return len(fields) > 0 && fields[0] == "Z"
}

// statFields are the fields of proc(5) stat from field 3, the state, on.
func statFields(pid int) []string {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// The command name, field 2, may hold spaces and parentheses: count from the last one.
	return strings.Fields(string(raw[bytes.LastIndexByte(raw, ')')+1:]))
}

// runcRoot is where containerd's shims keep runc's state unless told otherwise; dockerd's containers have theirs below its
// own folder.
const runcRoot = "/run/containerd/runc"

// forgetContainers removes runc's state and the cgroups of dead containers whose bundle was below dir.
func forgetContainers(dir string) {
	paths, err := filepath.Glob(filepath.Join(runcRoot, "*", "*", "state.json"))
	if err != nil {
		return
	}
	for _, path := range paths {
		raw, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(raw, []byte(dir+"/")) {
			continue
		}
		var state struct {
			CgroupPaths map[string]string `json:"cgroup_paths"`
		}
		if json.Unmarshal(raw, &state) == nil {
			for _, group := range state.CgroupPaths {
				_ = os.Remove(group) // rmdir: fails on a cgroup in use, which then is not ours
			}
		}
		_ = os.RemoveAll(filepath.Dir(path))
	}
}

// unmountUnder detaches every mount below dir, innermost first.
func unmountUnder(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("list the mounts below %s: %w", dir, err)
	}
	points := make([]string, 0, len(mounts))
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	slices.SortFunc(points, func(a, b string) int { return len(b) - len(a) })
	var errs []error
	for _, p := range points {
		// EINVAL: it went together with the mount it was below of.
		if err := unix.Unmount(p, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// deleteNamespaces removes the network namespaces of the rig with this ID.
func deleteNamespaces(id string) {
	entries, err := os.ReadDir(netnsDir)
	if err != nil {
		return
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), namespacePrefix(id)) {
			_ = exec.Command("ip", "netns", "del", e.Name()).Run()
		}
	}
}

// Sweep removes a folder of a node whose processes were ended, also when one of them was killed and left on purpose what outlives it:
// processes with a file below the folder on their command line, and mounts there, whose servers may be gone.
func Sweep(dir string) error {
	killUnder(dir)
	return errors.Join(unmountUnder(dir), os.RemoveAll(dir))
}
