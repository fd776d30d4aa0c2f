// Package daemon runs node daemons of docker quay in a rig: each with a configuration, a store and sockets of its own, in the
// namespace of its node, as a member of one cluster. The demo, the end-to-end tests and the benchmarks start theirs with it.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// PeerPort is the port that every daemon has for the others: each is in a namespace of its own.
	PeerPort = 6881
	// joinWithin bounds how long daemons take to find each other: they say hello every few seconds, and sixteen that start at
	// once share what cores there are.
	joinWithin = time.Minute
	// pollEvery is how often something without a signal is looked at.
	pollEvery = 50 * time.Millisecond
)

// Options describe a daemon. Rig, Name and Dir are required.
type Options struct {
	Rig *rig.Rig
	// Name is the process's, unique in the rig.
	Name string
	// Dir holds the configuration, the sockets and the store. Short: the path of a socket has at most 107 bytes.
	Dir string
	// Node is where it runs; nil: this process's namespace, on loopback and any port.
	Node *rig.Node
	// Secret is the file with the cluster's secret; "": no peers.
	Secret string
	// Peers are other nodes to say hello to; one that is up is enough to find all.
	Peers []*rig.Node
	// Registry is the one whose certificate and scheme the node is told; nil: none.
	Registry *rig.Registry
	// Config is added to the configuration, first to its section [origin].
	Config string
	// SnapshotterConfig is added to the section [snapshotter].
	SnapshotterConfig string
	// Program is the daemon's binary; "": the one that was built.
	Program string
}

// Daemon is a node daemon.
type Daemon struct {
	Name        string
	Node        *rig.Node
	Root, Store string // folders
	Socket      string // of the node API
	Snapshotter string // socket of the snapshotter
	CertsDir    string // certs.d root
	Logins      string // the folder with the node's own logins; made by who has any
	Process     *rig.Process

	rig     *rig.Rig
	program string
	config  string // the file
}

// Address is how others reach the daemon of a node.
func Address(n *rig.Node) string { return fmt.Sprintf("%s:%d", n.Addr, PeerPort) }

// Start writes the configuration of a daemon and starts it.
func Start(ctx context.Context, o Options) (*Daemon, error) {
	d := &Daemon{
		Name: o.Name, Node: o.Node, rig: o.Rig, program: cmp.Or(o.Program, "containerd-quay-grpc"),
		Root: filepath.Join(o.Dir, "root"), Store: filepath.Join(o.Dir, "root", "store"),
		Socket: filepath.Join(o.Dir, "api.sock"), Snapshotter: filepath.Join(o.Dir, "sn.sock"),
		CertsDir: filepath.Join(o.Dir, "certs.d"), Logins: filepath.Join(o.Dir, "docker"),
		config: filepath.Join(o.Dir, "config.toml"),
	}
	if err := os.MkdirAll(d.CertsDir, 0o755); err != nil {
		return nil, fmt.Errorf("make the folder of %s: %w", d.Name, err)
	}
	if o.Registry != nil {
		if err := o.Registry.WriteHosts(d.CertsDir); err != nil {
			return nil, err
		}
	}
	listen, ports := "127.0.0.1", "0"
	if o.Node != nil {
		listen, ports = o.Node.Addr.String(), fmt.Sprint(PeerPort)
	}
	secret := o.Secret
	if secret == "" {
		secret = filepath.Join(o.Dir, "none")
	}
	var peers []string
	for _, p := range o.Peers {
		peers = append(peers, fmt.Sprintf("%q", Address(p)))
	}
	text := fmt.Sprintf(`root = %q
state = %q
[snapshotter]
socket = %q
%s
[api]
socket = %q
[peers]
secret_file = %q
listen = %q
ports = %q
peers = [%s]
[origin]
host_dirs = [%q]
docker_config = %q
%s`, d.Root, o.Dir, d.Snapshotter, o.SnapshotterConfig, d.Socket, secret, listen, ports, strings.Join(peers, ", "), d.CertsDir, d.Logins, o.Config)
	if err := os.WriteFile(d.config, []byte(text), 0o644); err != nil {
		return nil, fmt.Errorf("write the configuration of %s: %w", d.Name, err)
	}
	return d, d.Start(ctx)
}

// Start starts it again after it ended, with what it held. It returns when the node API answers.
func (d *Daemon) Start(ctx context.Context) (err error) {
	d.Process, err = d.rig.Start(ctx, rig.Command{
		Name: d.Name, Path: d.program, Args: []string{"--config", d.config}, Node: d.Node,
		// Not what the service manager of this process wants to hear.
		Env: []string{"NOTIFY_SOCKET="},
		Ready: func(ctx context.Context) error {
			c, _, err := api.Dial(ctx, d.Socket)
			if err == nil {
				err = c.Close()
			}
			return err
		},
	})
	return err
}

// Joined waits until each of these daemons knows all the others.
func Joined(ctx context.Context, all ...*Daemon) error {
	var errs []error
	for _, d := range all {
		errs = append(errs, d.Knows(ctx, len(all)-1))
	}
	return errors.Join(errs...)
}

// Knows waits until the daemon knows so many other nodes.
func (d *Daemon) Knows(ctx context.Context, peers int) error {
	ctx, cancel := context.WithTimeout(ctx, joinWithin)
	defer cancel()
	client, st, err := api.Dial(ctx, d.Socket)
	if err != nil {
		return err
	}
	defer client.Close()
	t := time.NewTicker(pollEvery)
	defer t.Stop()
	for len(st.Peers) < peers {
		select {
		case <-t.C:
		case <-ctx.Done():
			return fmt.Errorf("%s knows %d other nodes instead of %d: %w", d.Name, len(st.Peers), peers, ctx.Err())
		}
		if st, err = client.Status(ctx); err != nil {
			return fmt.Errorf("ask %s for its peers: %w", d.Name, err)
		}
	}
	return nil
}
