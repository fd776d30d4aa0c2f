package e2e

import (
	"strings"

	nodedaemon "github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/rig"
)

// daemon is a node daemon, with a configuration, sockets and a store of its own.
type daemon struct {
	w           *world
	node        *rig.Node
	started     *nodedaemon.Daemon
	root, store string
	socket      string // of the node API
	snapshotter string // socket of the snapshotter
	logins      string // docker configuration with the node's own logins
	process     *rig.Process
}

// daemonOptions say what is not as usual.
type daemonOptions struct {
	peers []*rig.Node // others to say hello to
	// config is added to the configuration.
	config string
	// program is its binary; "": the one that was built.
	program string
}

// daemon starts the node daemon of a node: a member of the cluster that trusts the registry's certificate and has no login.
func (w *world) daemon(node *rig.Node, o daemonOptions) *daemon {
	w.Helper()
	name := "quay-" + node.Name
	d, err := nodedaemon.Start(w.ctx, nodedaemon.Options{
		Rig: w.rig, Name: name, Dir: w.dir(name), Node: node, Secret: w.secret, Peers: o.peers, Registry: w.registry, Config: o.config,
		Program: o.program,
	})
	w.must(err)
	return &daemon{
		w: w, node: node, started: d, root: d.Root, store: d.Store, socket: d.Socket, snapshotter: d.Snapshotter, logins: d.Logins,
		process: d.Process,
	}
}

// start starts the daemon again.
func (d *daemon) start() {
	d.w.Helper()
	d.w.must(d.started.Start(d.w.ctx))
	d.process = d.started.Process
}

// logs tells whether a text is in its log.
func (d *daemon) logs(text string) bool { return strings.Contains(d.process.Log(), text) }

// login gives the node itself access to the registry, as its mirror and its snapshotter need.
func (d *daemon) login() {
	d.w.Helper()
	d.w.must(writeLogin(d.logins, d.w.registry))
}

// knows waits until the daemon has so many other nodes.
func (d *daemon) knows(peers int) {
	d.w.Helper()
	d.w.must(d.started.Knows(d.w.ctx, peers))
}

// containerd starts a containerd on a node; d, when not nil, is its snapshotter "quay".
func (w *world) containerd(node *rig.Node, d *daemon) *rig.Containerd {
	w.Helper()
	o := rig.ContainerdOptions{Node: node}
	if d != nil {
		o.Snapshotter, o.SnapshotterRoot = d.snapshotter, d.root
	}
	c, err := w.rig.StartContainerd(w.ctx, o)
	w.must(err)
	return c
}
