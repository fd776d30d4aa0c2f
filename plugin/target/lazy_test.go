package target_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/docker-quay/docker-quay/plugin/target"
	"github.com/docker-quay/docker-quay/plugin/target/targettest"
)

// remote is the least of a remote snapshotter: asked to prepare a layer whose labels tell which it is, it takes the
// layer itself, commits it and answers "already exists", so that containerd does not fetch it.
type remote struct {
	snapshots.Snapshotter
	img target.Image

	mu   sync.Mutex
	took []string // guarded by mu
}

func (r *remote) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	mounts, err := r.Snapshotter.Prepare(ctx, key, parent, opts...)
	if err != nil {
		return nil, err
	}
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	layer, chain := info.Labels["containerd.io/snapshot/cri.layer-digest"], info.Labels[snapshots.LabelSnapshotRef]
	if layer == "" || chain == "" {
		return mounts, nil
	}
	if ref := info.Labels["containerd.io/snapshot/cri.image-ref"]; ref != r.img.Ref().String() {
		return nil, fmt.Errorf("image-ref label %q, want %q", ref, r.img.Ref())
	}
	rc, err := r.img.Open(ctx, ocispec.Descriptor{Digest: digest.Digest(layer)})
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	raw, err := compression.DecompressStream(rc)
	if err != nil {
		return nil, err
	}
	// The native snapshotter's mounts are one bind of a plain directory.
	if _, err := archive.Apply(ctx, mounts[0].Source, raw); err != nil {
		return nil, err
	}
	if err := r.Commit(ctx, chain, key, opts...); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.took = append(r.took, layer)
	r.mu.Unlock()
	return nil, fmt.Errorf("%s: %w", chain, errdefs.ErrAlreadyExists)
}

// TestLazy: with a remote snapshotter containers start while the content store has no layers; what then becomes of
// them is what --lazy says.
func TestLazy(t *testing.T) {
	needs(t, "containerd", "containerd-shim-runc-v2")
	dir := shortTemp(t)
	socket := filepath.Join(dir, "s.sock")
	base, err := native.NewSnapshotter(filepath.Join(dir, "snapshots"))
	if err != nil {
		t.Fatal(err)
	}
	sn := &remote{Snapshotter: base}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(srv, snapshotservice.FromSnapshotter(sn))
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Stop(); <-served; base.Close() })

	address := startContainerd(t, "", fmt.Sprintf("[proxy_plugins.remote]\n  type = \"snapshot\"\n  address = %q\n", socket))
	ctx := testContext(t)
	client, err := containerd.New(address)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	nsctx := namespaces.WithNamespace(ctx, "moby")

	for _, c := range []struct {
		lazy                  target.Lazy
		taken, lazyLayers, in int // by the snapshotter; reported; in the content store after
	}{
		{target.KeepLazy, 2, 2, 0},
		{target.AutoLazy, 2, 2, 2},
		{target.NeverLazy, 0, 0, 2},
	} {
		t.Run(string(c.lazy), func(t *testing.T) {
			// Each image has its own first layer too: a shared one is lazy only once.
			img := busyboxWith(t, "example.test/lazy:"+string(c.lazy), "lazy "+string(c.lazy), true,
				targettest.File{Name: "name", Mode: 0o644, Body: []byte(c.lazy)})
			sn.img, sn.took = img, nil
			tgt, err := target.NewContainerd(ctx, target.ContainerdOptions{Address: address, Namespace: "moby", Snapshotter: "remote", Lazy: c.lazy})
			if err != nil {
				t.Fatal(err)
			}
			defer tgt.Close()
			res, err := tgt.Pull(ctx, img)
			if err != nil {
				t.Fatal(err)
			}
			if len(sn.took) != c.taken || len(res.Lazy) != c.lazyLayers {
				t.Errorf("the snapshotter took %d layers, want %d; reported lazy %d, want %d", len(sn.took), c.taken, len(res.Lazy), c.lazyLayers)
			}
			collectGarbage(t, nsctx, client)
			in := 0
			for _, d := range img.Layers() {
				if _, err := client.ContentStore().Info(nsctx, d.Digest); err == nil {
					in++
				}
			}
			if in != c.in {
				t.Errorf("%d layers are in the content store, want %d", in, c.in)
			}
			got, err := client.GetImage(nsctx, img.Ref().String())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := content.ReadBlob(nsctx, client.ContentStore(), img.Config()); err != nil {
				t.Error(err)
			}
			if out := runOn(t, nsctx, client, got, "remote"); out != "lazy "+string(c.lazy)+"\n" {
				t.Errorf("the container printed %q", out)
			}
			if c.lazy != target.KeepLazy {
				return
			}
			// What was kept lazy is completed by a pull without --lazy=keep, and nothing else is done.
			auto, err := target.NewContainerd(ctx, target.ContainerdOptions{Address: address, Namespace: "moby", Snapshotter: "remote"})
			if err != nil {
				t.Fatal(err)
			}
			defer auto.Close()
			if res, err := auto.Pull(ctx, img); err != nil || len(res.Lazy) != 2 || len(sn.took) != 2 {
				t.Errorf("completing pull: %+v, %v; %d layers taken", res, err, len(sn.took))
			}
			if res, err := auto.Pull(ctx, img); err != nil || !res.UpToDate {
				t.Errorf("third pull: %+v, %v", res, err)
			}
		})
	}
}
