package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/daemon"
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
	daemon     *daemon.Daemon
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
	config := ""
	if verbose {
		config = "[log]\nlevel = \"debug\"\n"
	}
	c := &cluster{nodes: make([]*node, len(network.Nodes()))}
	g, gctx := errgroup.WithContext(ctx)
	for i, n := range network.Nodes() {
		g.Go(func() (err error) {
			c.nodes[i], err = newNode(gctx, r, daemon.Options{
				Rig: r, Name: fmt.Sprintf("s%d-quay-%s", scenesSoFar, n.Name), Dir: filepath.Join(dir, n.Name), Node: n, Secret: secret,
				// One address is enough for a node to find all.
				Peers: network.Nodes()[:1], Registry: registry, Config: config,
			})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var daemons []*daemon.Daemon
	for _, n := range c.nodes {
		daemons = append(daemons, n.daemon)
	}
	return c, daemon.Joined(ctx, daemons...)
}

func newNode(ctx context.Context, r *rig.Rig, o daemon.Options) (_ *node, err error) {
	n := &node{net: o.Node}
	if n.daemon, err = daemon.Start(ctx, o); err != nil {
		return nil, err
	}
	n.containerd, err = r.StartContainerd(ctx, rig.ContainerdOptions{
		Node: o.Node, Snapshotter: n.daemon.Snapshotter, SnapshotterRoot: n.daemon.Root, CertsDir: n.daemon.CertsDir,
	})
	return n, err
}

// stop ends the nodes; what their rig still owns goes with it.
func (c *cluster) stop() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, n.containerd.Stop(), n.daemon.Process.Stop())
	}
	return errors.Join(errs...)
}

// play pulls the scene's image, runs its program at once, waits for the whole image and checks the files.
func (n *node) play(ctx context.Context, s scene, start time.Time, res *result) error {
	pull := func(args ...string) error {
		args = append([]string{"pull", "--socket", n.daemon.Socket, "--progress", "quiet"}, append(args, s.ref)...)
		_, err := n.net.Run(ctx, nil, "docker-quay", args...)
		return err
	}
	err := pull("--to", "containerd:default", "--containerd-address", n.containerd.Socket(), "--snapshotter", "quay", "--lazy", "keep")
	if err != nil {
		return err
	}
	// The session is a second pair of eyes on the node's store; the pull's own blobs are the same.
	client, _, err := api.Dial(ctx, n.daemon.Socket)
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
