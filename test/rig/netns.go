package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 keeps named network namespaces (ip-netns(8)).
const netnsDir = "/run/netns"

// namespacePrefix begins the names of a rig's namespaces.
func namespacePrefix(id string) string { return "q" + id + "-" }

// ErrNoNamespaces says that this machine or user cannot make network namespaces.
var ErrNoNamespaces = errors.New("network namespaces cannot be made here (they need root, CAP_SYS_ADMIN and CAP_NET_ADMIN)")

func (n *Node) path() string { return filepath.Join(netnsDir, n.netns) }

// Do calls f on a thread inside the node's namespace. Sockets that f makes itself stay in it for good; goroutines that f
// starts are outside.
func (n *Node) Do(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// Not unlocked unless the thread is back where it was: Go then ends the thread with the goroutine.
		result <- func() error {
			// /proc/thread-self: of a multi-threaded process's namespaces each thread has its own.
			home, err := os.Open("/proc/thread-self/ns/net")
			if err != nil {
				return fmt.Errorf("find the thread's network namespace: %w", err)
			}
			defer home.Close()
			away, err := os.Open(n.path())
			if err != nil {
				return fmt.Errorf("open the network namespace of %s: %w", n.Name, err)
			}
			defer away.Close()
			if err := unix.Setns(int(away.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the network namespace of %s: %w", n.Name, err)
			}
			err = f()
			if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			return err
		}()
	}()
	return <-result
}

// Listen opens a TCP listener of this process inside the node's namespace. A nil node is this process's own namespace.
func (n *Node) Listen(address string) (net.Listener, error) {
	if n == nil {
		return net.Listen("tcp", address)
	}
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// DialContext connects from inside the node's namespace; it fits http.Transport. The address must be numeric: a name would be
// looked up elsewhere. A nil node is this process's own namespace.
func (n *Node) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	if n == nil {
		return (&net.Dialer{}).DialContext(ctx, network, address)
	}
	var c net.Conn
	err := n.Do(func() (err error) {
		// FallbackDelay < 0: one address, one attempt, and in this goroutine.
		c, err = (&net.Dialer{FallbackDelay: -1 * time.Second}).DialContext(ctx, network, address)
		return err
	})
	return c, err
}
