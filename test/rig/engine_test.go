package rig_test

import (
	"context"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// world is a network of one node with a registry that holds the small image as busybox:1.
func world(ctx context.Context, t *testing.T, o rig.RegistryOptions) (*rig.Rig, *rig.Network, *rig.Registry) {
	t.Helper()
	rig.RequireRoot(t)
	r := rig.ForTest(t)
	w, err := r.NewNetwork(rig.NetworkOptions{Nodes: 1, Rate: 200 * rig.Mbit})
	need(t, err)
	o.Node = w.Registry()
	g, err := r.StartRegistry(ctx, o)
	need(t, err)
	i, err := image.Busybox(ctx, rig.ImageDir(), image.Gzip)
	need(t, err)
	push(ctx, t, g, i, "busybox", "1")
	return r, w, g
}

// TestContainerd pulls with containerd's own transfer service over TLS, runs, and goes through a kill -9 with a running
// container, which nothing may notice.
func TestContainerd(t *testing.T) {
	ctx := testContext(t)
	r, w, g := world(ctx, t, rig.RegistryOptions{TLS: true})
	c, err := r.StartContainerd(ctx, rig.ContainerdOptions{Node: w.Node(1)})
	need(t, err)
	if err := g.WriteHosts(c.CertsDir()); err != nil {
		t.Fatal(err)
	}
	ref := g.Ref("busybox:1")
	if err := c.Pull(ctx, "", "", ref); err != nil {
		t.Fatal(err)
	}
	if out, err := c.Run(ctx, "", "", ref, "hello"); err != nil || out != "hello from busybox\n" {
		t.Errorf("the container wrote %q, %v", out, err)
	}
	if out, err := c.Ctr(ctx, "", "run", "--detach", ref, c.ContainerID("sleeper"), "sleep", "300"); err != nil {
		t.Fatal(out, err)
	}
	if len(c.Shims()) != 1 {
		t.Errorf("shims %v for one container", c.Shims())
	}
	if err := c.Kill9(); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(ctx); err != nil {
		t.Fatal(err)
	}
	client, err := c.Client("")
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	container, err := client.LoadContainer(ctx, c.ContainerID("sleeper"))
	if err != nil {
		t.Fatal(err)
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if status, err := task.Status(ctx); err != nil || status.Status != containerd.Running {
		t.Errorf("after containerd was killed the container is %q, %v", status.Status, err)
	}
	if err := c.CleanUnused(ctx, ""); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if left := c.Shims(); len(left) != 0 {
		t.Errorf("the rig is closed and these shims live: %v", left)
	}
}

// TestDockerd pulls and runs with Docker Engine 29, which keeps images in containerd.
func TestDockerd(t *testing.T) {
	ctx := testContext(t)
	r, w, g := world(ctx, t, rig.RegistryOptions{TLS: true, Username: "alice", Password: "secret"})
	c, err := r.StartContainerd(ctx, rig.ContainerdOptions{Node: w.Node(1)})
	need(t, err)
	e, err := r.StartDockerd(ctx, rig.EngineOptions{Node: w.Node(1), Containerd: c, StorageDriver: "overlayfs", Registries: []*rig.Registry{g}})
	need(t, err)
	testEngine(ctx, t, e, g, "29.0.0")
}

// TestDockerdWithoutNode runs the engine in this process's own network namespace, where it may not touch anything.
func TestDockerdWithoutNode(t *testing.T) {
	ctx := testContext(t)
	rig.RequireRoot(t)
	r := rig.ForTest(t)
	c, err := r.StartContainerd(ctx, rig.ContainerdOptions{})
	need(t, err)
	e, err := r.StartDockerd(ctx, rig.EngineOptions{Containerd: c})
	need(t, err)
	if out, err := e.Docker(ctx, "info", "--format", "{{.Driver}}"); err != nil || strings.TrimSpace(out) != "overlayfs" {
		t.Errorf("the storage driver is %q, %v", out, err)
	}
}

// TestClassic pulls and runs with the engine of graph drivers.
func TestClassic(t *testing.T) {
	ctx := testContext(t)
	r, w, g := world(ctx, t, rig.RegistryOptions{TLS: true, Username: "alice", Password: "secret"})
	e, err := r.StartClassic(ctx, rig.EngineOptions{Node: w.Node(1), StorageDriver: "overlay2", Registries: []*rig.Registry{g}})
	need(t, err)
	testEngine(ctx, t, e, g, "20.10.")
}

func testEngine(ctx context.Context, t *testing.T, e *rig.Engine, g *rig.Registry, version string) {
	t.Helper()
	if out, err := e.Docker(ctx, "version", "--format", "{{.Server.Version}}"); err != nil || !strings.HasPrefix(out, version) {
		t.Errorf("this is version %q, %v", out, err)
	}
	ref := g.Ref("busybox:1")
	if _, err := e.Docker(ctx, "pull", ref); err == nil {
		t.Error("pulled a private image without credentials")
	}
	if err := e.Login(ctx, g); err != nil {
		t.Fatal(err)
	}
	if out, err := e.Docker(ctx, "pull", ref); err != nil {
		t.Fatal(out, err)
	}
	// On the default bridge, so that its network is tried too.
	if out, err := e.Docker(ctx, "run", "--rm", ref); err != nil || out != "hello from busybox\n" {
		t.Errorf("the container wrote %q, %v", out, err)
	}
	if out, err := e.Docker(ctx, "run", "--detach", ref, "sleep", "300"); err != nil {
		t.Error(out, err)
	}
	begin := time.Now()
	if err := e.Kill9(); err != nil {
		t.Fatal(err)
	}
	if err := e.Start(ctx); err != nil {
		t.Fatal(err)
	}
	t.Logf("killed and started again in %s", time.Since(begin))
	if out, err := e.Docker(ctx, "image", "ls", "--format", "{{.Repository}}:{{.Tag}}"); err != nil || strings.TrimSpace(out) != ref {
		t.Errorf("images after a kill -9: %q, %v", out, err)
	}
}
