package target_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/platforms"

	"github.com/docker-quay/docker-quay/plugin/target"
)

// TestContainerd pulls into a real containerd and runs what it pulled.
func TestContainerd(t *testing.T) {
	socket := startContainerd(t, "")
	ctx := testContext(t)
	tgt, err := target.Find(ctx, target.Options{To: "containerd:k8s.io", ContainerdAddress: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	if want := "containerd (namespace k8s.io, snapshotter overlayfs) at " + socket; tgt.String() != want {
		t.Errorf("String() = %q, want %q", tgt, want)
	}

	client, err := containerd.New(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	nsctx := namespaces.WithNamespace(ctx, "k8s.io")

	for _, index := range []bool{false, true} {
		ref, greeting := "example.test/plain", "plain manifest"
		if index {
			ref, greeting = "example.test/indexed:v1", "from an index"
		}
		img := busybox(t, ref, greeting, index)
		res, err := tgt.Pull(ctx, img)
		if err != nil {
			t.Fatal(err)
		}
		if res.UpToDate || len(res.Lazy) != 0 {
			t.Errorf("first pull of %s: %+v", ref, res)
		}
		got, err := client.GetImage(nsctx, img.Ref().String())
		if err != nil {
			t.Fatal(err)
		}
		if got.Target().Digest != img.Target().Digest {
			t.Errorf("%s is %s, want %s", ref, got.Target().Digest, img.Target().Digest)
		}
		if got.Labels()["io.cri-containerd.image"] != "managed" {
			t.Errorf("%s lacks the label of CRI: %v", ref, got.Labels())
		}
		collectGarbage(t, nsctx, client)
		available, required, present, missing, err := images.Check(nsctx, client.ContentStore(), img.Target(), platforms.Default())
		if err != nil || !available || len(missing) > 0 || len(present) != len(required) {
			t.Errorf("%s after garbage collection: available %v, missing %v, error %v", ref, available, missing, err)
		}
		if out := run(t, nsctx, client, got); out != greeting+"\n" {
			t.Errorf("the container printed %q, want %q", out, greeting)
		}

		before := img.Opened(img.Layers()[0].Digest)
		res, err = tgt.Pull(ctx, img)
		if err != nil {
			t.Fatal(err)
		}
		if !res.UpToDate || img.Opened(img.Layers()[0].Digest) != before {
			t.Errorf("second pull of %s did something: %+v", ref, res)
		}
	}
}

// TestContainerdFailure: a layer that cannot be had ends the pull with its reason, leaves no image record, and the next
// pull goes on.
func TestContainerdFailure(t *testing.T) {
	socket := startContainerd(t, "")
	ctx := testContext(t)
	tgt, err := target.NewContainerd(ctx, target.ContainerdOptions{Address: socket, Namespace: "default"})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	img := busybox(t, "example.test/broken:v1", "healed", false)
	gone := errors.New("every peer is away")
	img.FailOpen(img.Layers()[1].Digest, gone)
	if _, err := tgt.Pull(ctx, img); !errors.Is(err, gone) || !strings.Contains(err.Error(), "example.test/broken:v1") {
		t.Fatalf("error %v, want one that names the image and wraps %v", err, gone)
	}
	client, err := containerd.New(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.GetImage(namespaces.WithNamespace(ctx, "default"), img.Ref().String()); err == nil {
		t.Error("a failed pull left an image")
	}
	img.FailOpen(img.Layers()[1].Digest, nil)
	if res, err := tgt.Pull(ctx, img); err != nil || res.UpToDate {
		t.Errorf("pull after the failure: %+v, %v", res, err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := tgt.Pull(cancelled, busybox(t, "example.test/late:v1", "late", false)); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled pull: %v", err)
	}
}

// TestFindNothing: the error says what was looked for and what to do.
func TestFindNothing(t *testing.T) {
	missing := t.TempDir() + "/none.sock"
	_, err := target.Find(testContext(t), target.Options{ContainerdAddress: missing})
	if !errors.Is(err, target.ErrNoTarget) || !strings.Contains(err.Error(), missing) || !strings.Contains(err.Error(), "--to store") {
		t.Errorf("error %v", err)
	}
	if _, err := target.Find(testContext(t), target.Options{To: "cloud"}); !errors.Is(err, target.ErrUnknown) {
		t.Errorf("error %v", err)
	}
}

// collectGarbage makes containerd throw away whatever nothing refers to (a synchronous lease deletion collects).
func collectGarbage(t *testing.T, ctx context.Context, c *containerd.Client) {
	t.Helper()
	l, err := c.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.LeasesService().Delete(ctx, l, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
}

// run starts a container without network and returns what it printed.
func run(t *testing.T, ctx context.Context, c *containerd.Client, img containerd.Image) string {
	t.Helper()
	return runOn(t, ctx, c, img, "overlayfs")
}

func runOn(t *testing.T, ctx context.Context, c *containerd.Client, img containerd.Image, snapshotter string) string {
	t.Helper()
	c2, err := c.NewContainer(ctx, "hello", containerd.WithSnapshotter(snapshotter), containerd.WithNewSnapshot("hello", img),
		containerd.WithNewSpec(oci.WithImageConfig(img), oci.WithoutRunMount))
	if err != nil {
		t.Fatal(err)
	}
	defer c2.Delete(ctx, containerd.WithSnapshotCleanup)
	// A file, written by the shim itself: no pipe whose reader may come too late for a process as short as this.
	out := filepath.Join(t.TempDir(), "out")
	task, err := c2.NewTask(ctx, cio.LogFile(out))
	if err != nil {
		t.Fatal(err)
	}
	exited, err := task.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(ctx); err != nil {
		t.Fatal(err)
	}
	status := <-exited
	if status.ExitCode() != 0 || status.Error() != nil {
		t.Errorf("the container ended with %d: %v", status.ExitCode(), status.Error())
	}
	if _, err := task.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
