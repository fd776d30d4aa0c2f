package target

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options say where to look for engines.
type Options struct {
	// To is what the user asked for: "auto" (or ""), "docker", "classic", "load", "containerd", "containerd:NAMESPACE",
	// "store".
	To string
	// Docker makes the client of the current Docker context. It is called only when Docker is considered.
	Docker func() (DockerAPI, error)
	// ContainerdAddress is a socket path that overrides what is found by looking.
	ContainerdAddress string
	// Snapshotter overrides the namespace's default for "containerd"; with Docker the engine's own is used.
	Snapshotter string
	Lazy        Lazy
	StoreDir    string                           // for Store's String
	Say         func(format string, args ...any) // tells the user what was looked at and why it was not taken
}

// Kinds lists what To accepts, for help and completion.
func Kinds() []string {
	return []string{"auto", "docker", "classic", "load", "containerd", "containerd:k8s.io", "store"}
}

// Where containerd listens: of its own, and when dockerd started it.
var containerdAddresses = []string{"/run/containerd/containerd.sock", "/var/run/docker/containerd/containerd.sock"}

const (
	dockerNamespace  = "moby" // dockerd's, unless it tells otherwise
	defaultNamespace = "default"
	// containerdStore in `docker info`'s DriverStatus tells the containerd image store from a graph driver.
	containerdStore = "io.containerd.snapshotter.v1"
)

// Find chooses the target. The error is an ErrNoTarget that says what was looked for and what can be done.
func Find(ctx context.Context, o Options) (Target, error) {
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	kind, namespace, _ := strings.Cut(o.To, ":")
	switch {
	case o.To == "" || o.To == "auto":
		return findAuto(ctx, o)
	case o.To == "docker" || o.To == "classic" || o.To == "load":
		t, err := findDocker(ctx, o)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoTarget, err)
		}
		return t, nil
	case kind == "containerd":
		t, err := findContainerd(ctx, o, namespace)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoTarget, err)
		}
		return t, nil
	case o.To == "store":
		return store(o), nil
	}
	return nil, fmt.Errorf("--to %q is not one of %s: %w", o.To, strings.Join(Kinds(), ", "), ErrUnknown)
}

func store(o Options) Target {
	what := "the store"
	if o.StoreDir != "" {
		what += " at " + o.StoreDir
	}
	return Store{What: what + " only"}
}

// findAuto: Docker, when an engine answers, for this is a plugin of Docker; else containerd, in Kubernetes' namespace
// when there is one.
func findAuto(ctx context.Context, o Options) (Target, error) {
	t, derr := findDocker(ctx, o)
	if derr == nil {
		return t, nil
	}
	t, cerr := findContainerd(ctx, o, "")
	if cerr == nil {
		o.Say("No Docker Engine (%v): using containerd", derr)
		return t, nil
	}
	return nil, fmt.Errorf("%w: %w; %w: start an engine, choose one with --context, --host or --containerd-address, or use `--to store` to fetch without one",
		ErrNoTarget, derr, cerr)
}

func findContainerd(ctx context.Context, o Options, namespace string) (Target, error) {
	addresses := containerdAddresses
	if o.ContainerdAddress != "" {
		addresses = []string{o.ContainerdAddress}
	}
	var errs []error
	for _, a := range addresses {
		if err := reachable(a); err != nil {
			errs = append(errs, err)
			continue
		}
		copts := ContainerdOptions{Address: a, Namespace: namespace, Snapshotter: o.Snapshotter, Lazy: o.Lazy, Say: o.Say}
		if namespace == "" {
			copts.Namespace = defaultNamespace
		}
		t, err := NewContainerd(ctx, copts)
		if err == nil && namespace == "" {
			if t.hasNamespace(ctx, criNamespace) {
				t.Close()
				copts.Namespace = criNamespace
				t, err = NewContainerd(ctx, copts)
			}
		}
		if err == nil {
			return t, nil
		}
		errs = append(errs, err)
	}
	return nil, sentence(errs)
}

// sentence joins what was found at several places into one line.
func sentence(errs []error) error {
	err := errs[0]
	for _, e := range errs[1:] {
		err = fmt.Errorf("%w, %w", err, e)
	}
	return err
}

func (t *Containerd) hasNamespace(ctx context.Context, name string) bool {
	all, err := t.client.NamespaceService().List(ctx)
	return err == nil && slices.Contains(all, name)
}

// reachable looks whether a unix socket can be used by us. gRPC would try again and again.
func reachable(path string) error {
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("no containerd at %s", path)
	case err != nil:
		return fmt.Errorf("containerd at %s: %w", path, err)
	case fi.Mode()&fs.ModeSocket == 0:
		return fmt.Errorf("%s is no socket", path)
	}
	return dialable(path)
}

// findDocker asks the engine what it is.
func findDocker(ctx context.Context, o Options) (Target, error) {
	if o.Docker == nil {
		return nil, errors.New("no Docker context")
	}
	api, err := o.Docker()
	if err != nil {
		return nil, err
	}
	answer, err := api.Info(ctx, client.InfoOptions{})
	if err != nil {
		return nil, fmt.Errorf("no Docker Engine answers at %s: %w", api.DaemonHost(), err)
	}
	info := answer.Info
	host := api.DaemonHost()
	local := strings.HasPrefix(host, "unix://")
	engine := &Engine{api: api, containerd: hasContainerdStore(info), say: o.Say}
	if info.OSType != "" && info.Architecture != "" {
		// docker tells the kernel's name of the architecture: x86_64, aarch64.
		p := platforms.Normalize(ocispec.Platform{OS: info.OSType, Architecture: info.Architecture})
		engine.platform = &p
	}
	storage := "graph driver " + info.Driver
	if engine.containerd {
		storage = "containerd image store, snapshotter " + info.Driver
	}
	engine.load = o.To == "load" || !local || rootless(info)
	switch {
	case o.To == "load" || !local:
		engine.what = fmt.Sprintf("Docker (%s, by image load) at %s", storage, host)
		return engine, nil
	case engine.load:
		engine.what = fmt.Sprintf("Docker (%s, rootless, by image load) at %s", storage, host)
	default:
		engine.what = fmt.Sprintf("Docker (%s, from a mirror on loopback) at %s", storage, host)
	}
	if !engine.containerd || o.To == "classic" {
		return engine, nil
	}
	direct, err := findDockersContainerd(ctx, o, api, info)
	if err != nil {
		o.Say("Docker's containerd cannot be used (%v): going through the engine instead, nothing will be lazy", err)
		return engine, nil
	}
	direct.what = fmt.Sprintf("Docker (%s) at %s", storage, host)
	return direct, nil
}

func hasContainerdStore(info system.Info) bool {
	return slices.Contains(info.DriverStatus, [2]string{"driver-type", containerdStore})
}

func rootless(info system.Info) bool {
	return slices.ContainsFunc(info.SecurityOptions, func(s string) bool { return strings.Contains(s, "name=rootless") })
}

// findDockersContainerd connects to the containerd that dockerd keeps its images in. dockerd tells the path of the
// socket as it sees it, which need not be on this machine: what containerd lists is compared with what docker lists.
func findDockersContainerd(ctx context.Context, o Options, api DockerAPI, info system.Info) (*Containerd, error) {
	addresses, namespace := containerdAddresses, dockerNamespace
	if c := info.Containerd; c != nil {
		if c.Address != "" {
			addresses = []string{c.Address}
		}
		if c.Namespaces.Containers != "" {
			namespace = c.Namespaces.Containers
		}
	}
	if o.ContainerdAddress != "" {
		addresses = []string{o.ContainerdAddress}
	}
	var errs []error
	for _, a := range addresses {
		if err := reachable(a); err != nil {
			errs = append(errs, err)
			continue
		}
		t, err := NewContainerd(ctx, ContainerdOptions{Address: a, Namespace: namespace, Snapshotter: info.Driver, Lazy: o.Lazy, Say: o.Say})
		if err == nil {
			if err = t.belongsTo(ctx, api); err != nil {
				t.Close()
			}
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		t.keepDangling = true
		t.confirm = func(ctx context.Context, img Image) error { return seenBy(ctx, api, t, img) }
		return t, nil
	}
	return nil, sentence(errs)
}
