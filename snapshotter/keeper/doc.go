// Package keeper holds open files for a daemon that may die.
//
// A FUSE mount lives as long as its connection, an open /dev/fuse, and no longer: when
// the last process that has it open ends, every read that is not in the page cache
// fails, for good, also in the EROFS mounts of running containers above it. So
// somebody other than the daemon has to have it open too. Two can do that, and both
// are a Store:
//
//	Client   talks to a keeper, a tiny process of ours that does nothing else
//	Systemd  gives the files to systemd, where a unit with FileDescriptorStoreMax= runs us
//	Both     two of them
//
// # Life of a file
//
// The daemon puts a file under a name as soon as it has it, and before anything
// depends on it. From then on the daemon may be killed at any moment. The next daemon
// lists the names, gets what it knows, and drops what it does not. A name is put once;
// it has to be dropped before it can be put again, so that two daemons cannot replace
// each other's files unseen. The store never reads from a file, nor writes to it.
//
// # The keeper's process
//
// Run is its main loop and Start makes it: from the daemon's own binary, in a session
// and (where cgroup v2 lets us) a cgroup of its own, no child of the daemon, far back
// in the queue of the OOM killer. It serves one unix socket that only root and its
// own user may use, holds at most MaxFiles files, and has one lock, so that there is one
// keeper for a socket. It outlives upgrades of the binary: therefore its protocol is
// small, and has a version in every message.
//
// What it cannot outlive: a service manager that kills by cgroup and denies us another
// one (have Systemd beside it there, or KillMode=process), and the end of its container or pod.
package keeper
