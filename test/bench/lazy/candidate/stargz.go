package candidate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	stargzfs "github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/source"
	"github.com/containerd/stargz-snapshotter/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
)

// stargzArgument makes this program the stargz snapshotter; the next arguments are its folder and its socket.
const stargzArgument = "candidate-stargz"

// Init must be the first call in main. In the process of a candidate it does its work and does not return.
func Init() {
	if len(os.Args) != 4 || os.Args[1] != stargzArgument {
		return
	}
	if err := serveStargz(os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// serveStargz is that project's daemon, put together from its library: its own program lies in another module. Settings are the
// defaults: prefetch where an image asks for it, background fetch of the rest, chunks verified.
func serveStargz(root, socket string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fs, err := stargzfs.NewFilesystem(filepath.Join(root, "stargz"), config.Config{}, stargzfs.WithGetSources(criSources))
	if err != nil {
		return err
	}
	s, err := snapshot.NewSnapshotter(ctx, filepath.Join(root, "snapshotter"), fs, snapshot.AsynchronousRemove)
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return errors.Join(err, s.Close())
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	go func() {
		<-ctx.Done()
		server.Stop()
	}()
	return errors.Join(server.Serve(l), s.Close())
}

// criSources finds out from a snapshot's labels, those that containerd's transfer service sets, which layer it is of, and names the
// image's other layers, which are then resolved at the same time.
func criSources(labels map[string]string) ([]source.Source, error) {
	name, err := reference.Parse(labels[snapshotters.TargetRefLabel])
	if err != nil {
		return nil, fmt.Errorf("the snapshot's image: %w", err)
	}
	layer, err := digest.Parse(labels[snapshotters.TargetLayerDigestLabel])
	if err != nil {
		return nil, fmt.Errorf("the snapshot's layer: %w", err)
	}
	target := ocispec.Descriptor{Digest: layer, Annotations: labels}
	layers := []ocispec.Descriptor{target}
	for _, s := range strings.Split(labels[snapshotters.TargetImageLayersLabel], ",") {
		if d, err := digest.Parse(s); err == nil && d != layer {
			layers = append(layers, ocispec.Descriptor{Digest: d})
		}
	}
	return []source.Source{{Hosts: plainHosts, Name: name, Target: target, Manifest: ocispec.Manifest{Layers: layers}}}, nil
}

// transport keeps as many connections open as that project's own does: one more than there are CPUs for Go to use.
var transport = func() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost = runtime.GOMAXPROCS(0) + 1
	return t
}()

// plainHosts are an image's own registry, by plain HTTP.
func plainHosts(name reference.Spec) ([]docker.RegistryHost, error) {
	return []docker.RegistryHost{{
		Client: &http.Client{Transport: transport}, Host: name.Hostname(), Scheme: "http", Path: "/v2",
		Authorizer:   docker.NewDockerAuthorizer(),
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}}, nil
}
