package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/rig"
)

// outputWithin bounds the wait for a program's first output.
const outputWithin = 5 * time.Minute

// cluster is the nodes of one scene, cold and joined.
type cluster struct {
	nodes []*node
}

// node is one machine: a namespace with a node daemon and a containerd.
type node struct {
	net        *rig.Node
	containerd *rig.Containerd
	daemon     *rig.Process
	socket     string // of the node API
}

// scenesSoFar numbers the clusters of this process: their folders and processes have names of their own.
var scenesSoFar int

func newCluster(ctx context.Context, r *rig.Rig, network *rig.Network, registry *rig.Registry, verbose bool) (*cluster, error) {
	scenesSoFar++
	dir, err := r.Dir(fmt.Sprintf("s%d", scenesSoFar))
	if err != nil {
		return nil, err
	}
	secret := filepath.Join(dir, "cluster.secret")
	if err := trust.NewSecret().Save(secret); err != nil {
		return nil, err
	}
	certs := filepath.Join(dir, "certs.d")
	if err := registry.WriteHosts(certs); err != nil {
		return nil, err
	}
	// One address is enough for a node to find all.
	first := fmt.Sprintf("%s:6881", network.Node(1).Addr)
	c := &cluster{nodes: make([]*node, len(network.Nodes()))}
	g, gctx := errgroup.WithContext(ctx)
	for i, n := range network.Nodes() {
		g.Go(func() (err error) {
			c.nodes[i], err = newNode(gctx, r, n, filepath.Join(dir, n.Name), secret, certs, first, verbose)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return c, c.joined(ctx)
}

func newNode(ctx context.Context, r *rig.Rig, net *rig.Node, dir, secret, certs, peer string, verbose bool) (*node, error) {
	n := &node{net: net, socket: filepath.Join(dir, "quay.sock")}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.toml")
	level := "info"
	if verbose {
		level = "debug"
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
ports = "6881"
peers = [%q]
[origin]
host_dirs = [%q]
[log]
level = %q
`, filepath.Join(dir, "root"), dir, filepath.Join(dir, "sn.sock"), n.socket, secret, net.Addr, peer, certs, level)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	var err error
	n.daemon, err = r.Start(ctx, rig.Command{
		Name: filepath.Base(filepath.Dir(dir)) + "-quay-" + net.Name, Path: "containerd-quay-grpc", Args: []string{"--config", config},
		Node: net, Env: []string{"NOTIFY_SOCKET="},
		Ready: func(ctx context.Context) error {
			c, _, err := api.Dial(ctx, n.socket)
			if err == nil {
				err = c.Close()
			}
			return err
		},
	})
	if err != nil {
		return nil, err
	}
	n.containerd, err = r.StartContainerd(ctx, rig.ContainerdOptions{
		Node: net, Snapshotter: filepath.Join(dir, "sn.sock"), SnapshotterRoot: filepath.Join(dir, "root"), CertsDir: certs,
	})
	return n, err
}

// joined waits until every node knows every other.
func (c *cluster) joined(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	for _, n := range c.nodes {
		client, st, err := api.Dial(ctx, n.socket)
		if err != nil {
			return err
		}
		for len(st.Peers) < len(c.nodes)-1 {
			select {
			case <-ctx.Done():
				_ = client.Close()
				return fmt.Errorf("node %s knows only %d peers", n.net.Name, len(st.Peers))
			case <-t.C:
			}
			if st, err = client.Status(ctx); err != nil {
				_ = client.Close()
				return err
			}
		}
		_ = client.Close()
	}
	return nil
}

// stop ends the nodes; what their rig still owns goes with it.
func (c *cluster) stop() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, n.containerd.Stop(), n.daemon.Stop())
	}
	return errors.Join(errs...)
}

// play pulls the scene's image, runs its program at once, waits for the whole image and checks the files.
func (n *node) play(ctx context.Context, s scene, start time.Time, res *result) error {
	pull := func(args ...string) error {
		args = append([]string{"pull", "--socket", n.socket, "--progress", "quiet"}, append(args, s.ref)...)
		_, err := n.net.Run(ctx, nil, "docker-quay", args...)
		return err
	}
	err := pull("--to", "containerd:default", "--containerd-address", n.containerd.Socket(), "--snapshotter", "quay", "--lazy", "keep")
	if err != nil {
		return err
	}
	// The session is a second pair of eyes on the node's store; the pull's own blobs are the same.
	client, _, err := api.Dial(ctx, n.socket)
	if err != nil {
		return err
	}
	defer client.Close()
	session, err := client.Image(ctx, api.ImageRequest{Ref: s.ref})
	if err != nil {
		return err
	}
	defer session.Close()
	err = n.run(ctx, s, func(line string) {
		res.output, res.firstOutput = line, time.Since(start)
		res.atFirstOutput = sum(session.Progress(), func(p fetcher.Progress) int64 { return p.Have })
	})
	if err != nil {
		return err
	}
	// Only now: a fetch that somebody waits for gives way less to what a container reads.
	if err := session.Fetch(ctx); err != nil {
		return err
	}
	res.complete = time.Since(start)
	ps := session.Progress()
	res.registry = sum(ps, func(p fetcher.Progress) int64 { return p.FromOrigin })
	res.peers = sum(ps, func(p fetcher.Progress) int64 { return p.FromPeers })
	res.was = sum(ps, func(p fetcher.Progress) int64 { return p.FromCache })
	if s.treeSum == "" {
		return nil
	}
	out, err := n.containerd.Run(ctx, "default", "quay", s.ref, "tree", "/app/treesum.py")
	if err != nil {
		return err
	}
	res.treeOK = strings.TrimSpace(out) == strings.TrimSpace(s.treeSum)
	return nil
}

func sum(ps []fetcher.Progress, f func(fetcher.Progress) int64) (n int64) {
	for _, p := range ps {
		n += f(p)
	}
	return n
}

// run starts the scene's program in a container and calls first with its first line. The container is ended then: an
// image's own command may be a server.
func (n *node) run(ctx context.Context, s scene, first func(line string)) error {
	ctx, cancel := context.WithTimeout(ctx, outputWithin)
	defer cancel()
	id := n.containerd.ContainerID("run")
	args := append([]string{"-a", n.containerd.Socket(), "run", "--rm", "--snapshotter", "quay", s.ref, id}, s.program...)
	cmd, err := n.net.Command(ctx, nil, "ctr", args...)
	if err != nil {
		return err
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	line, rerr := bufio.NewReader(out).ReadString('\n')
	if line != "" {
		first(strings.TrimSpace(line))
	}
	kill, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer stop()
	if len(s.program) == 0 {
		_, _ = n.containerd.Ctr(kill, "default", "tasks", "kill", "-s", "KILL", id)
	}
	err = cmd.Wait()
	if line == "" {
		return fmt.Errorf("the program printed nothing (%w): %s", errors.Join(rerr, err), bytes.TrimSpace(stderr.Bytes()))
	}
	if len(s.program) == 0 {
		return nil
	}
	return err
}
