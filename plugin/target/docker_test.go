package target_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/client"

	"github.com/docker-quay/docker-quay/plugin/target"
)

// startDockerd starts a Docker Engine without networking and returns a client and its URL. flags choose the storage.
func startDockerd(t *testing.T, netns, binary string, flags ...string) (*client.Client, string) {
	t.Helper()
	dir := shortTemp(t)
	socket := filepath.Join(dir, "d.sock")
	args := append([]string{
		binary, "--host", "unix://" + socket, "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--config-file", filepath.Join(dir, "daemon.json"),
		"--bridge", "none", "--iptables=false", "--ip-forward=false",
	}, flags...)
	// runc before 1.2 knows no time namespaces; engines before 29 do not know the feature and ignore it.
	config := []byte(`{"features": {"time-namespaces": false}}`)
	if err := os.WriteFile(filepath.Join(dir, "daemon.json"), config, 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, socket, netns, args...)
	api, err := client.New(client.WithHost("unix://" + socket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { api.Close() })
	return api, "unix://" + socket
}

func docker29(t *testing.T, netns string) (*client.Client, string, string) {
	t.Helper()
	needs(t, "containerd", "dockerd", "docker")
	ctrd := startContainerd(t, netns)
	api, host := startDockerd(t, netns, filepath.Join(binDir(), "dockerd"), "--containerd", ctrd)
	return api, host, ctrd
}

func dockerClassic(t *testing.T) (*client.Client, string) {
	t.Helper()
	needs(t, "docker")
	dir := filepath.Join(binDir(), "..", "classic")
	found, _ := filepath.Glob(filepath.Join(dir, "*", "sbin", "dockerd"))
	if len(found) == 0 {
		found, _ = filepath.Glob(filepath.Join(dir, "usr", "sbin", "dockerd"))
	}
	if len(found) == 0 {
		t.Skip("needs build/classic, Debian's docker.io (make tools)")
	}
	ctrd := startContainerd(t, "")
	return startDockerd(t, "", found[0], "--containerd", ctrd, "--storage-driver", "overlay2")
}

func options(api *client.Client, to string) target.Options {
	return target.Options{To: to, Docker: func() (target.DockerAPI, error) { return api, nil }}
}

// docker runs the CLI and returns what it printed.
func docker(t *testing.T, host string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), filepath.Join(binDir(), "docker"), append([]string{"--host", host}, args...)...)
	cmd.Env = append(os.Environ(), "DOCKER_CONFIG="+t.TempDir())
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("docker %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// pull pulls and runs an image in a Docker Engine, and looks at its name and digest.
func pullAndRun(t *testing.T, host string, opts target.Options, ref, greeting string, index bool, wantTarget string) {
	t.Helper()
	ctx := testContext(t)
	var said []string
	opts.Say = func(f string, a ...any) { said = append(said, f) }
	tgt, err := target.Find(ctx, opts)
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	if !strings.Contains(tgt.String(), wantTarget) {
		t.Fatalf("target %q, want one with %q (said %q)", tgt, wantTarget, said)
	}
	img := busybox(t, ref, greeting, index)
	res, err := tgt.Pull(ctx, img)
	if err != nil {
		t.Fatal(err)
	}
	if res.UpToDate {
		t.Errorf("first pull: %+v", res)
	}
	if out := docker(t, host, "run", "--rm", "--network", "none", res.Reference); out != greeting+"\n" {
		t.Errorf("docker run printed %q, want %q", out, greeting)
	}
	names := strings.Fields(docker(t, host, "images", "--format", "{{.Repository}}:{{.Tag}}"))
	if !slices.Contains(names, res.Reference) {
		t.Errorf("docker images lists %q, not %q", names, res.Reference)
	}
	for _, n := range names {
		if strings.HasPrefix(n, "127.0.0.1") {
			t.Errorf("a temporary name is left: %s", n)
		}
	}
	if _, ok := tgt.(*target.Containerd); ok {
		digests := strings.TrimSpace(docker(t, host, "inspect", "--format", "{{index .RepoDigests 0}}", res.Reference))
		if want := img.Target().Digest.String(); !strings.HasSuffix(digests, "@"+want) {
			t.Errorf("RepoDigests %s, want %s", digests, want)
		}
	}
	docker(t, host, "save", "-o", filepath.Join(t.TempDir(), "save.tar"), res.Reference)
	if res, err = tgt.Pull(ctx, img); err != nil || !res.UpToDate && !index {
		t.Errorf("second pull: %+v, %v", res, err)
	}
	if !index {
		return
	}
	// A new image takes the name away from the old one, which stays, as with `docker pull`.
	newer := busybox(t, ref, greeting+" again", index)
	if _, err := tgt.Pull(ctx, newer); err != nil {
		t.Fatal(err)
	}
	if out := docker(t, host, "run", "--rm", "--network", "none", res.Reference); out != greeting+" again\n" {
		t.Errorf("docker run of the newer image printed %q", out)
	}
	if out := docker(t, host, "images", "--all", "--filter", "dangling=true", "--quiet"); strings.TrimSpace(out) == "" {
		t.Error("the replaced image is gone instead of dangling")
	}
}

// TestDocker29 is dockerd 29 with the containerd image store.
func TestDocker29(t *testing.T) {
	t.Parallel()
	api, host, _ := docker29(t, "")
	t.Run("failure", func(t *testing.T) { failingPulls(t, api, host) })
	t.Run("direct", func(t *testing.T) { // our pull goes through its containerd
		opts := options(api, "")
		pullAndRun(t, host, opts, "example.test/team/plain:v1", "plain", false, "containerd image store, snapshotter overlayfs) at unix://")
		pullAndRun(t, host, opts, "hub", "from Docker Hub's namespace", true, "containerd image store, snapshotter overlayfs) at unix://")
	})
	t.Run("mirror", func(t *testing.T) { // its containerd is not ours to use
		opts := options(api, "")
		opts.ContainerdAddress = filepath.Join(t.TempDir(), "no.sock")
		pullAndRun(t, host, opts, "example.test/mirrored:v1", "indexed", true, "mirror on loopback")
	})
	t.Run("wrong containerd", func(t *testing.T) { // docker's images are not in the one that is named
		opts := options(api, "")
		opts.ContainerdAddress = startContainerd(t, "")
		tgt, err := target.Find(testContext(t), opts)
		if err != nil {
			t.Fatal(err)
		}
		defer tgt.Close()
		if _, direct := tgt.(*target.Containerd); direct {
			t.Error("a containerd that is not docker's was taken for it")
		}
	})
}

// TestDockerOtherNetwork: an engine that cannot reach our loopback (a virtual machine, rootless) gets an archive.
func TestDockerOtherNetwork(t *testing.T) {
	t.Parallel()
	needs(t, "containerd", "dockerd", "docker")
	api, host, _ := docker29(t, newNetns(t))
	pullAndRun(t, host, options(api, "classic"), "example.test/far:v1", "far away", false, "mirror on loopback")
	pullAndRun(t, host, options(api, "load"), "example.test/remote:v1", "remote", false, "by image load")
}

// TestDockerClassic: the graph driver of Docker 20.10.
func TestDockerClassic(t *testing.T) {
	t.Parallel()
	api, host := dockerClassic(t)
	pullAndRun(t, host, options(api, ""), "example.test/plain:v1", "plain", true, "graph driver overlay2, from a mirror on loopback")
	pullAndRun(t, host, options(api, "load"), "example.test/loaded:v1", "loaded", false, "graph driver overlay2, by image load")
}

// failingPulls: what a blob cannot be read for is what the user hears, not what the engine makes of it.
func failingPulls(t *testing.T, api *client.Client, host string) {
	t.Helper()
	ctx := testContext(t)
	gone := errors.New("every peer is away")
	for _, to := range []string{"docker", "classic", "load"} {
		tgt, err := target.Find(ctx, options(api, to))
		if err != nil {
			t.Fatal(err)
		}
		img := busybox(t, "example.test/broken:v1", "broken", false)
		img.FailOpen(img.Layers()[1].Digest, gone)
		if _, err := tgt.Pull(ctx, img); !errors.Is(err, gone) {
			t.Errorf("--to %s: error %v, want one that wraps %v", to, err, gone)
		}
		tgt.Close()
	}
	if out := docker(t, host, "images", "--quiet"); out != "" {
		t.Errorf("failed pulls left images: %s", out)
	}
}
