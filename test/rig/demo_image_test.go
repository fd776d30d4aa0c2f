package rig_test

import (
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestDemoImage runs both programs of the demo image in a container: what Go computes from the layers is what Python sees.
func TestDemoImage(t *testing.T) {
	if testing.Short() {
		t.Skip("makes an image of over 100 MB")
	}
	rig.RequireRoot(t)
	i, err := image.Demo(t.Context(), rig.ImageDir(), image.Gzip)
	if err != nil {
		t.Fatal(err)
	}
	if i.Size() < 100_000_000 || len(i.Layers) < 3 {
		t.Errorf("the demo image has %d bytes in %d layers", i.Size(), len(i.Layers))
	}
	want, err := i.TreeSum()
	if err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t)
	r := rig.ForTest(t)
	g, err := r.StartRegistry(ctx, rig.RegistryOptions{})
	need(t, err)
	push(ctx, t, g, i, "demo", "gzip")
	c, err := r.StartContainerd(ctx, rig.ContainerdOptions{})
	need(t, err)
	ref := g.Ref("demo:gzip")
	if err := c.Pull(ctx, "", "", ref, "--plain-http"); err != nil {
		t.Fatal(err)
	}
	out, err := c.Run(ctx, "", "", ref, "hello")
	if err != nil || !strings.HasPrefix(out, "hello from python 3") {
		t.Errorf("the program wrote %q, %v", out, err)
	}
	out, err = c.Run(ctx, "", "", ref, "treesum", "/app/treesum.py")
	if got := strings.TrimSpace(out); err != nil || got != want {
		t.Errorf("the container's tree is %s, the image's %s, %v", got, want, err)
	}
}
