package blobfs

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// watchEvery is how often a reader that got a signal is looked at again. The kernel
// tells of the first signal only, and the one that kills may be the second.
const watchEvery = 100 * time.Millisecond

// harmless are the signals whose default is not to end the process.
const harmless = 1<<(unix.SIGCHLD-1) | 1<<(unix.SIGCONT-1) | 1<<(unix.SIGURG-1) | 1<<(unix.SIGWINCH-1) |
	1<<(unix.SIGSTOP-1) | 1<<(unix.SIGTSTP-1) | 1<<(unix.SIGTTIN-1) | 1<<(unix.SIGTTOU-1)

// dying tells whether a signal that ends the thread's process is waiting for it. When
// that cannot be told it is false: then the read goes on to its end.
func dying(tid uint32) bool {
	if tid == 0 {
		return false
	}
	b, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(tid), 10) + "/status")
	return err == nil && deadly(string(b))
}

// deadly judges the text of a /proc/TID/status.
func deadly(status string) bool {
	var pending, kept uint64 // kept: blocked, ignored or caught
	for l := range strings.Lines(status) {
		name, value, _ := strings.Cut(l, ":")
		var to *uint64
		switch name {
		case "SigPnd", "ShdPnd":
			to = &pending
		case "SigBlk", "SigIgn", "SigCgt":
			to = &kept
		default:
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
		if err != nil {
			return false
		}
		*to |= n
	}
	const kill = 1 << (unix.SIGKILL - 1)
	return pending&kill != 0 || pending&^kept&^harmless != 0
}
