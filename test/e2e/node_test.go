package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/test/rig"
)

// daemon is a node daemon, with a configuration, sockets and a store of its own.
type daemon struct {
	w           *world
	node        *rig.Node
	name        string
	root, store string
	socket      string // of the node API
	snapshotter string // socket of the snapshotter
	config      string // the file
	logins      string // docker configuration with the node's own logins
	process     *rig.Process
}

// daemonOptions say what is not as usual.
type daemonOptions struct {
	peers []*rig.Node // others to say hello to
	// config is added to the configuration.
	config string
}

// daemon starts the node daemon of a node: a member of the cluster that trusts the registry's certificate and has no login.
func (w *world) daemon(node *rig.Node, o daemonOptions) *daemon {
	w.Helper()
	d := &daemon{w: w, node: node, name: "quay-" + node.Name}
	dir := w.dir(d.name)
	d.root, d.store = filepath.Join(dir, "root"), filepath.Join(dir, "root", "store")
	d.socket, d.snapshotter = filepath.Join(dir, "api.sock"), filepath.Join(dir, "sn.sock")
	d.config, d.logins = filepath.Join(dir, "config.toml"), filepath.Join(dir, "docker")
	w.must(w.registry.WriteHosts(filepath.Join(dir, "certs.d")))
	var peers []string
	for _, p := range o.peers {
		peers = append(peers, fmt.Sprintf("%q", peer(p)))
	}
	text := fmt.Sprintf(`root = %q
state = %q
[snapshotter]
socket = %q
[api]
socket = %q
[peers]
secret_file = %q
listen = %q
ports = "%d"
peers = [%s]
[origin]
host_dirs = [%q]
docker_config = %q
%s`, d.root, dir, d.snapshotter, d.socket, w.secret, node.Addr, peerPort, strings.Join(peers, ", "),
		filepath.Join(dir, "certs.d"), d.logins, o.config)
	w.must(os.WriteFile(d.config, []byte(text), 0o644))
	d.start()
	return d
}

// start starts the daemon, at first or again.
func (d *daemon) start() {
	d.w.Helper()
	var err error
	d.process, err = d.w.rig.Start(d.w.ctx, rig.Command{
		Name: d.name, Path: "containerd-quay-grpc", Args: []string{"--config", d.config}, Node: d.node,
		Env: []string{"NOTIFY_SOCKET="},
		Ready: func(ctx context.Context) error {
			c, _, err := api.Dial(ctx, d.socket)
			if err == nil {
				err = c.Close()
			}
			return err
		},
	})
	d.w.must(err)
}

// login gives the node itself access to the registry, as its mirror and its snapshotter need.
func (d *daemon) login() {
	d.w.Helper()
	d.w.must(writeLogin(d.logins, d.w.registry))
}

// knows waits until the daemon has so many other nodes.
func (d *daemon) knows(peers int) {
	d.w.Helper()
	c, _, err := api.Dial(d.w.ctx, d.socket)
	d.w.must(err)
	defer c.Close()
	d.w.until("the nodes find each other", func() bool {
		st, err := c.Status(d.w.ctx)
		d.w.must(err)
		return len(st.Peers) >= peers
	})
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
