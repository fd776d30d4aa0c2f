package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"text/template"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
)

// ContainerdOptions describe a containerd.
type ContainerdOptions struct {
	Node *Node // where it runs; nil: this process's namespace
	// Snapshotter, when set, is the socket of a remote snapshotter that becomes known as "quay"; SnapshotterRoot is its
	// folder, which containerd exports to clients.
	Snapshotter, SnapshotterRoot string
	// CertsDir is a certs.d root for pulls that containerd itself does (CRI, Containerd.Pull); "": the rig makes an empty
	// one, see Containerd.CertsDir.
	CertsDir string
	// CRI turns the Kubernetes interface on.
	CRI bool
	// Config is appended to config.toml.
	Config string
}

// Containerd is a containerd 2 with folders and a socket of its own.
type Containerd struct {
	rig     *Rig
	options ContainerdOptions
	name    string
	dir     string
	process *Process
}

// containerdConfig is a version 3 file. It imports nothing, so that the machine's own configuration plays no part.
var containerdConfig = template.Must(template.New("config.toml").Parse(`version = 3
root = "{{.Dir}}/root"
state = "{{.Dir}}/state"
imports = []
disabled_plugins = [{{if not .CRI}}"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.podsandbox.controller.v1.podsandbox", {{end -}}
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]

[grpc]
  address = "{{.Dir}}/containerd.sock"
[ttrpc]
  address = "{{.Dir}}/containerd.sock.ttrpc"

[plugins.'io.containerd.internal.v1.opt']
  path = "{{.Dir}}/opt"

# Naming any unpack platform drops the default: overlayfs is repeated.
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "{{.Platform}}"
  snapshotter = "overlayfs"
  differ = "walking"
{{if .Snapshotter}}
[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
  platform = "{{.Platform}}"
  snapshotter = "quay"
  differ = "walking"

[proxy_plugins.quay]
  type = "snapshot"
  address = "{{.Snapshotter}}"
  [proxy_plugins.quay.exports]
    root = "{{.SnapshotterRoot}}"
    enable_remote_snapshot_annotations = "true"
{{end}}{{if .CRI}}
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "{{if .Snapshotter}}quay{{else}}overlayfs{{end}}"
  disable_snapshot_annotations = false
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = "{{.CertsDir}}"
[plugins.'io.containerd.cri.v1.runtime']
  # Without CAP_SYS_RESOURCE, as in many a container, the score cannot be lowered.
  restrict_oom_score_adj = true
{{end}}
{{.Config}}
`))

// StartContainerd starts a containerd.
func (r *Rig) StartContainerd(ctx context.Context, o ContainerdOptions) (*Containerd, error) {
	name := r.nextName("containerd")
	dir, err := r.Dir(name)
	if err != nil {
		return nil, err
	}
	if o.CertsDir == "" {
		if o.CertsDir, err = r.Dir(name + "/certs.d"); err != nil {
			return nil, err
		}
	}
	var config bytes.Buffer
	err = containerdConfig.Execute(&config, struct {
		ContainerdOptions
		Dir, Platform string
	}{o, dir, "linux/" + runtime.GOARCH})
	if err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.toml"), config.Bytes(), 0o644); err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	c := &Containerd{rig: r, options: o, name: name, dir: dir}
	return c, c.Start(ctx)
}

// Start starts it again after Stop or Kill9, with what it held.
func (c *Containerd) Start(ctx context.Context) error {
	process, err := c.rig.Start(ctx, Command{
		Name: c.name, Path: "containerd", Args: []string{"--config", filepath.Join(c.dir, "config.toml"), "--log-level", "warn"},
		Node: c.options.Node,
		Env:  []string{"PATH=" + toolPath(), "NOTIFY_SOCKET="},
		Ready: func(ctx context.Context) error {
			// A short timeout: the next attempt comes soon, while the client's own backoff grows.
			client, err := containerd.New(c.Socket(), containerd.WithTimeout(time.Second))
			if err != nil {
				return err
			}
			defer client.Close()
			_, err = client.Version(ctx)
			return err
		},
	})
	if err != nil {
		return err
	}
	c.process = process
	// After this process's own Stop was registered, so called before it: tasks are ended while containerd still answers.
	c.rig.Cleanup(c.endTasks)
	return nil
}

// Stop ends containerd and leaves its containers running, as an upgrade does. Not concurrently with Start.
func (c *Containerd) Stop() error { return c.process.Stop() }

// Kill9 kills containerd. Its containers run on.
func (c *Containerd) Kill9() error { return c.process.Kill9() }

// Process is the running daemon.
func (c *Containerd) Process() *Process { return c.process }

// Socket is the path of the gRPC socket.
func (c *Containerd) Socket() string { return filepath.Join(c.dir, "containerd.sock") }

// Root is the folder with content and snapshots.
func (c *Containerd) Root() string { return filepath.Join(c.dir, "root") }

// CertsDir is the certs.d root of its own pulls; changes count from the next pull on.
func (c *Containerd) CertsDir() string { return c.options.CertsDir }

// Client connects to it, with a default containerd namespace: "" is "default". The caller closes it.
func (c *Containerd) Client(namespace string) (*containerd.Client, error) {
	if namespace == "" {
		namespace = namespaces.Default
	}
	client, err := containerd.New(c.Socket(), containerd.WithDefaultNamespace(namespace))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", c.name, err)
	}
	return client, nil
}

// endTimeout bounds the end of all tasks at take-down; what is left then is killed by its process.
const endTimeout = 20 * time.Second

// endTasks kills and deletes every task, so that no shim and no container outlives the rig.
func (c *Containerd) endTasks() error {
	select {
	case <-c.process.Done():
		return nil // nobody to ask: Rig.Close kills the shims
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	client, err := c.Client("")
	if err != nil {
		return err
	}
	defer client.Close()
	all, err := client.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list the namespaces of %s: %w", c.name, err)
	}
	var errs []error
	for _, namespace := range all {
		ctx := namespaces.WithNamespace(ctx, namespace)
		containers, err := client.Containers(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("list the containers of %s: %w", c.name, err))
			continue
		}
		for _, container := range containers {
			task, err := container.Task(ctx, nil)
			if errdefs.IsNotFound(err) {
				continue
			}
			if err == nil {
				_, err = task.Delete(ctx, containerd.WithProcessKill)
			}
			if err != nil && !errdefs.IsNotFound(err) {
				errs = append(errs, fmt.Errorf("end the container %s: %w", container.ID(), err))
			}
		}
	}
	return errors.Join(errs...)
}

// Ctr is a ctr command against this containerd and namespace ("" is "default").
func (c *Containerd) Ctr(ctx context.Context, namespace string, args ...string) (string, error) {
	if namespace == "" {
		namespace = namespaces.Default
	}
	return output(ctx, c.options.Node, nil, "ctr", append([]string{"--address", c.Socket(), "--namespace", namespace}, args...)...)
}

// Pull has containerd's transfer service pull and unpack a reference, as `ctr image pull` does, with the hosts of CertsDir.
// snapshotter "" is overlayfs; flags are ctr's own, such as --user.
func (c *Containerd) Pull(ctx context.Context, namespace, snapshotter, ref string, flags ...string) error {
	if snapshotter == "" {
		snapshotter = "overlayfs"
	}
	// The service's own config_path does not count for clients: they name the folder with each request.
	args := append([]string{"image", "pull", "--hosts-dir", c.CertsDir(), "--snapshotter", snapshotter}, flags...)
	_, err := c.Ctr(ctx, namespace, append(args, ref)...)
	return err
}

// ContainerID makes a container's name unique on the machine: runc's state and the cgroups are shared by all nodes.
func (c *Containerd) ContainerID(name string) string {
	return fmt.Sprintf("%s-%s-%s", c.rig.id, c.name, name)
}

// Run runs a container of a pulled image to its end and returns its standard output. snapshotter "" is overlayfs, no args is
// the image's command.
func (c *Containerd) Run(ctx context.Context, namespace, snapshotter, ref, name string, args ...string) (string, error) {
	if snapshotter == "" {
		snapshotter = "overlayfs"
	}
	run := []string{"run", "--rm", "--snapshotter", snapshotter, ref, c.ContainerID(name)}
	return c.Ctr(ctx, namespace, append(run, args...)...)
}

// CleanUnused runs containerd's garbage collector to its end and returns then.
func (c *Containerd) CleanUnused(ctx context.Context, namespace string) error {
	id := "rig-" + c.rig.id
	if _, err := c.Ctr(ctx, namespace, "leases", "create", "--id", id); err != nil {
		return err
	}
	_, err := c.Ctr(ctx, namespace, "leases", "rm", "--sync", id)
	return err
}

// Shims are the process IDs of the shims of this containerd, which outlive it.
func (c *Containerd) Shims() []int {
	// -address is what containerd starts a shim with.
	return processesNaming("-address\x00" + c.Socket() + "\x00")
}
