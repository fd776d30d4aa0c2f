package plugin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	dockerplugin "github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/plugin"
	"github.com/docker-quay/docker-quay/plugin/target/targettest"
)

var update = flag.Bool("update", false, "write the golden files")

// behaviour is the variable that makes this test binary be docker-quay, with images from memory; its value is how
// opening one goes: "real" is from a registry.
const behaviour = "QUAY_TEST_OPEN"

func TestMain(m *testing.M) {
	how, ok := os.LookupEnv(behaviour)
	if !ok {
		os.Exit(m.Run())
	}
	if dockerplugin.RunningStandalone() {
		os.Args = plugin.StandaloneArgs(os.Args)
	}
	dockerplugin.Run(func(dockerCLI command.Cli) *cobra.Command {
		o := plugin.Options{
			Version: "1.2.3-test",
			Open: func(ctx context.Context, r plugin.Request) (plugin.Source, error) {
				return open(ctx, how, r)
			},
			Stranger: func(context.Context, plugin.Request, digest.Digest, digest.Digest) (plugin.Stranger, error) {
				return stranger(how)
			},
			Publish: func(_ context.Context, _ plugin.Request, subject ocispec.Descriptor, torrents []*published.Torrent) error {
				for _, t := range torrents {
					fmt.Fprintf(os.Stderr, "stored private=%t trackers=%v web seeds=%v\n", t.Private, t.Trackers, t.WebSeeds)
				}
				return nil
			},
			Manifests: func(ctx context.Context, r plugin.Request) ([]ocispec.Descriptor, error) {
				return manifests(ctx, how, r)
			},
			PublishIndexes: storeIndexes,
		}
		if how == "real" {
			o.Open, o.Stranger, o.Publish = plugin.OpenImage, plugin.AskAsStranger, plugin.StoreTorrents
			o.Manifests, o.PublishIndexes = plugin.ImageManifests, plugin.StoreIndexes
		}
		return plugin.New(dockerCLI, os.Args[0], o)
	}, plugin.Metadata(os.Args[0], "1.2.3-test"))
}

// source is an image in memory.
type source struct {
	*targettest.Image
	block bool // Fetch never ends by itself
}

func (s *source) Via() string     { return "this process" }
func (s *source) Notes() []string { return []string{"the registry did not answer"} }

func (s *source) Publish(_ context.Context, torrents []*published.Torrent) error {
	fmt.Fprintf(os.Stderr, "seeding %d torrents\n", len(torrents))
	return nil
}

func (s *source) Fetch(ctx context.Context) error {
	if s.block {
		fmt.Fprintln(os.Stderr, "fetching")
		<-ctx.Done()
		return ctx.Err()
	}
	return s.Image.Fetch(ctx)
}

func open(ctx context.Context, how string, r plugin.Request) (plugin.Source, error) {
	switch how {
	case "notfound":
		return nil, &origin.Error{Op: "read the manifest of", Reference: r.Ref.String(), Host: "example.test", Status: 404, Err: origin.ErrNotFound}
	case "denied":
		return nil, fmt.Errorf("%s: %w", r.Ref, origin.ErrDenied)
	case "mismatch":
		return nil, fmt.Errorf("%s: %w", r.Ref, fetcher.ErrMismatch)
	}
	img, err := targettest.New(targettest.Spec{Ref: r.Ref.String(), Layers: [][]targettest.File{{{Name: "a", Mode: 0o644, Body: []byte("a")}}}})
	return &source{Image: img, block: how == "block"}, err
}

type result struct {
	stdout, stderr string
	code           int
}

// run is one run of a program to its end.
func run(t *testing.T, how, program string, args ...string) result {
	t.Helper()
	cmd, out := process(t, how, program, args...)
	return out(cmd.Run())
}

// process makes a command; the function returned turns what became of it into a result.
func process(t *testing.T, how, program string, args ...string) (*exec.Cmd, func(error) result) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	if filepath.IsAbs(program) {
		cmd.Path = program
	}
	cmd.Args[0] = program
	home := t.TempDir()
	cmd.Env = append(os.Environ(), behaviour+"="+how, "HOME="+home, "XDG_CACHE_HOME=", "XDG_CONFIG_HOME=",
		"DOCKER_HOST=unix://"+filepath.Join(home, "none.sock"), "COLUMNS=")
	if os.Getenv("DOCKER_CONFIG") == "" {
		cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+home)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	return cmd, func(err error) result {
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
	}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

func noControl(t *testing.T, s string) {
	t.Helper()
	for _, r := range s {
		if r != '\n' && unicode.IsControl(r) {
			t.Errorf("%q in output off a terminal:\n%s", r, s)
			return
		}
	}
}

func TestHelp(t *testing.T) {
	for name, args := range map[string][]string{
		"help":             {"--help"},
		"help-pull":        {"pull", "--help"},
		"help-seed":        {"seed", "--help"},
		"help-index":       {"index", "--help"},
		"help-node-secret": {"node", "secret", "--help"},
		"help-version":     {"version", "--help"},
		"help-peers":       {"peers", "--help"},
		"help-status":      {"status", "--help"},
	} {
		t.Run(name, func(t *testing.T) {
			r := run(t, "ok", "docker-quay", args...)
			if r.code != 0 || r.stderr != "" {
				t.Errorf("exit code %d, standard error %q", r.code, r.stderr)
			}
			noControl(t, r.stdout)
			golden(t, name, r.stdout)
		})
	}
}

func TestPull(t *testing.T) {
	const digestLine = "Digest: sha256:"
	for _, c := range []struct {
		name, program string
		args          []string
		stdout        string
		stderr        []string // each must be there
	}{
		{"plain", "docker-quay", []string{"pull", "--to", "store", "example.test/app"}, "example.test/app:latest\n",
			[]string{"Pulling example.test/app:latest into the store at ", "fetched by this process\n", "Note: the registry did not answer\n", "complete", digestLine, "Into: the store"}},
		{"quiet", "docker-quay", []string{"pull", "-q", "--to", "store", "alpine"}, "alpine:latest\n", nil},
		{"global flags", "docker-quay", []string{"--log-level", "error", "pull", "-q", "--to=store", "alpine:3"}, "alpine:3\n", nil},
		{"its own name", "docker-quay", []string{"quay", "pull", "-q", "--to", "store", "alpine"}, "alpine:latest\n", nil},
		{"quayctl's line", "docker-quay", []string{"torrent", "pull", "-q", "--to", "store", "--lower-port", "7000", "alpine"}, "alpine:latest\n", nil},
		{"docker torrent", "docker-torrent", []string{"pull", "-q", "--to", "store", "alpine"}, "alpine:latest\n", nil},
		{"seed", "docker-quay", []string{"seed", "--duration", "1ms", "example.test/app:1"}, "example.test/app:1\n",
			[]string{"Seeding example.test/app:1", "giving it to peers for 1ms"}},
		{"pull and seed", "docker-quay", []string{"pull", "--duration", "1ms", "--to", "store", "example.test/app:1"}, "example.test/app:1\n",
			[]string{"giving it to peers for 1ms"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := run(t, "ok", c.program, c.args...)
			if r.code != 0 || r.stdout != c.stdout {
				t.Errorf("exit code %d, standard output %q, want %q; standard error:\n%s", r.code, r.stdout, c.stdout, r.stderr)
			}
			if c.stderr == nil && r.stderr != "" {
				t.Errorf("standard error %q", r.stderr)
			}
			for _, s := range c.stderr {
				if !strings.Contains(r.stderr, s) {
					t.Errorf("standard error lacks %q:\n%s", s, r.stderr)
				}
			}
			noControl(t, r.stdout+r.stderr)
		})
	}
}

func TestPullJSON(t *testing.T) {
	r := run(t, "ok", "docker-quay", "pull", "--progress", "json", "--to", "store", "example.test/app:1")
	var sum struct {
		Type, Reference, Digest string
		Seconds                 float64
	}
	if err := json.Unmarshal([]byte(r.stdout), &sum); err != nil || sum.Type != "summary" || sum.Reference != "example.test/app:1" {
		t.Errorf("standard output %q: %v", r.stdout, err)
	}
	for _, l := range strings.Split(strings.TrimSpace(r.stderr), "\n") {
		var v map[string]any
		if err := json.Unmarshal([]byte(l), &v); err != nil {
			t.Errorf("line %q: %v", l, err)
		}
	}
}

// TestFailures: what a user and a script get to know.
func TestFailures(t *testing.T) {
	for _, c := range []struct {
		how  string
		args []string
		code int
		says string
	}{
		{"notfound", []string{"pull", "--to", "store", "example.test/none:1"}, 3, "quay: cannot read the manifest of example.test/none:1"},
		{"denied", []string{"seed", "example.test/private:1"}, 4, "access denied"},
		{"mismatch", []string{"pull", "--to", "store", "example.test/bad:1"}, 6, "does not match"},
		{"ok", []string{"pull", "--to", "docker", "example.test/app:1"}, 7, "nothing to pull into: no Docker Engine answers at unix://"},
		{"ok", []string{"pull", "--to", "moon", "example.test/app:1"}, 125, "--to \"moon\""},
		{"ok", []string{"pull"}, 125, "requires 1 argument"},
		{"ok", []string{"pull", "--nonsense", "x"}, 125, "unknown flag"},
		{"ok", []string{"pull", "--upload-rate", "fast", "x"}, 125, "is not a rate"},
		{"ok", []string{"pull", "--progress", "fancy", "x"}, 125, "choose one of auto"},
		{"ok", []string{"pull", "--lazy", "often", "x"}, 125, "--lazy"},
		{"ok", []string{"pull", "--peer", "nowhere", "x"}, 125, "HOST:PORT"},
		{"ok", []string{"pull", "--zone", "rack 4", "x"}, 125, "--zone: zone \"rack 4\""},
		{"ok", []string{"pull", "--max-connections", "3", "x"}, 125, "3 is too few for a node to work with: 16 or more"},
		{"ok", []string{"peers", "--socket", "/nonexistent/quay.sock"}, 5, "no node daemon answers at /nonexistent/quay.sock"},
		{"ok", []string{"status", "--socket", "/nonexistent/quay.sock"}, 5, "no node daemon answers at /nonexistent/quay.sock"},
		{"ok", []string{"status", "a"}, 125, "accepts no arguments"},
		{"ok", []string{"peers", "a", "b"}, 125, "at most 1 argument"},
		{"ok", []string{"pull", "UPPER/Case"}, 125, "is not the name of an image"},
		{"ok", []string{"node", "secret", "/nonexistent/folder/secret"}, 1, "cannot write the cluster secret"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			r := run(t, c.how, "docker-quay", c.args...)
			if r.code != c.code || !strings.Contains(r.stderr, c.says) || r.stdout != "" {
				t.Errorf("exit code %d, want %d; standard error %q, want one with %q; standard output %q", r.code, c.code, r.stderr, c.says, r.stdout)
			}
		})
	}
}

// TestInterrupt: a signal amid a pull ends it cleanly with 130; a signal while seeding is the ordinary end.
func TestInterrupt(t *testing.T) {
	for _, c := range []struct {
		name, how, until string
		args             []string
		signal           syscall.Signal
		code             int
		says             string
	}{
		{"pull", "block", "fetching\n", []string{"pull", "--to", "store", "example.test/app:1"}, syscall.SIGINT, 130, "interrupted: what was fetched is kept"},
		{"terminate", "block", "fetching\n", []string{"pull", "--to", "store", "example.test/app:1"}, syscall.SIGTERM, 130, "interrupted"},
		{"seed", "ok", "until interrupted\n", []string{"seed", "example.test/app:1"}, syscall.SIGINT, 0, "Digest: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd, out := process(t, c.how, "docker-quay", c.args...)
			watch := &watcher{until: c.until, seen: make(chan struct{})}
			cmd.Stderr = watch
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			<-watch.seen
			if err := cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			r := out(cmd.Wait())
			if r.code != c.code || !strings.Contains(watch.buf.String(), c.says) {
				t.Errorf("exit code %d, want %d; standard error:\n%s", r.code, c.code, watch.buf.String())
			}
		})
	}
}

// watcher tells when something was written.
type watcher struct {
	until string
	seen  chan struct{}
	buf   bytes.Buffer
	done  bool
}

func (w *watcher) Write(p []byte) (int, error) {
	w.buf.Write(p)
	if !w.done && strings.Contains(w.buf.String(), w.until) {
		w.done = true
		close(w.seen)
	}
	return len(p), nil
}

func TestVersionAndSecret(t *testing.T) {
	if r := run(t, "ok", "docker-quay", "version", "--format", "{{.Version}}"); r.stdout != "1.2.3-test\n" {
		t.Errorf("version: %+v", r)
	}
	var v map[string]string
	if r := run(t, "ok", "docker-quay", "version", "--format", "json"); json.Unmarshal([]byte(r.stdout), &v) != nil || v["Version"] != "1.2.3-test" {
		t.Errorf("version as JSON: %+v", r)
	}
	file := filepath.Join(t.TempDir(), "secret")
	r := run(t, "ok", "docker-quay", "node", "secret", file)
	if r.code != 0 || r.stdout != file+"\n" {
		t.Errorf("node secret: %+v", r)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the secret's file: %v, %v", fi, err)
	}
	if r := run(t, "ok", "docker-quay", "node", "secret", file); r.code != 1 || !strings.Contains(r.stderr, "not overwritten") {
		t.Errorf("second time: %+v", r)
	}
}

// TestDockerCLI: the real docker CLI finds the plugin, lists it, and gives its exit code on; docker-torrent works and
// is not listed.
func TestDockerCLI(t *testing.T) {
	docker := filepath.Join("..", "build", "bin", "docker")
	if _, err := os.Stat(docker); err != nil {
		if docker, err = exec.LookPath("docker"); err != nil {
			t.Skip("needs the docker CLI")
		}
	}
	docker, err := filepath.Abs(docker)
	if err != nil {
		t.Fatal(err)
	}
	self, err := filepath.Abs(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	config := t.TempDir()
	dir := filepath.Join(config, "cli-plugins")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, n := range []string{"docker-quay", "docker-torrent"} {
		if err := os.Symlink(self, filepath.Join(dir, n)); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("DOCKER_CONFIG", config)
	help := run(t, "ok", docker, "help")
	if !strings.Contains(help.stdout, "quay*") || strings.Contains(help.stdout, "torrent") {
		t.Errorf("docker help:\n%s", help.stdout)
	}
	for _, args := range [][]string{
		{"quay", "pull", "-q", "--to", "store", "alpine"},
		{"quay", "torrent", "pull", "-q", "--to", "store", "alpine"},
		{"torrent", "pull", "-q", "--to", "store", "alpine"},
	} {
		if r := run(t, "ok", docker, args...); r.code != 0 || r.stdout != "alpine:latest\n" {
			t.Errorf("docker %s: %+v", strings.Join(args, " "), r)
		}
	}
	if r := run(t, "notfound", docker, "quay", "pull", "--to", "store", "alpine"); r.code != 3 {
		t.Errorf("exit code through docker: %+v", r)
	}
	if r := run(t, "ok", docker, "__complete", "quay", "pull", "--to", ""); !strings.Contains(r.stdout, "containerd:k8s.io\n") {
		t.Errorf("completion: %+v", r)
	}
}
