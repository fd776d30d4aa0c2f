package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/test/rig"
)

// user is somebody on a node who runs docker-quay, with a home, a store and logins of his own.
type user struct {
	w      *world
	name   string
	node   *rig.Node
	home   string
	store  string
	env    []string
	flags  []string    // of every verb
	plugin bool        // docker-quay is run as a plugin of the docker CLI: `docker quay`
	engine *rig.Engine // the CLI's, when there is one
}

// user makes a user on a node who fetches in his own process, trusts the registry's certificate and is not logged in.
func (w *world) user(node *rig.Node) *user {
	w.Helper()
	u := &user{w: w, name: fmt.Sprintf("user%d", w.people.Add(1)), node: node}
	u.home = w.dir(u.name)
	u.store = filepath.Join(u.home, ".cache", "quay")
	u.env = []string{
		"HOME=" + u.home, "DOCKER_CONFIG=" + filepath.Join(u.home, ".docker"), "DOCKER_CONTEXT=",
		"DOCKER_HOST=unix://" + filepath.Join(u.home, "no-engine.sock"), "XDG_CONFIG_HOME=", "XDG_CACHE_HOME=",
	}
	u.flags = []string{"--no-daemon"}
	u.trusts()
	return u
}

// dockerUser is a user of a Docker Engine, with docker-quay as a plugin of the docker CLI.
func (w *world) dockerUser(node *rig.Node, e *rig.Engine) *user {
	w.Helper()
	u := w.user(node)
	u.engine = e
	u.home = filepath.Dir(e.ConfigDir())
	u.store = filepath.Join(u.home, ".cache", "quay")
	u.env = append(e.Env(), "XDG_CONFIG_HOME=", "XDG_CACHE_HOME=")
	u.trusts()
	return u.installs(e.ConfigDir())
}

// installs puts docker-quay into the docker CLI's configuration folder and has the user run it from there.
func (u *user) installs(dir string) *user {
	u.w.Helper()
	binary, err := rig.Bin("docker-quay")
	u.w.must(err)
	plugins := filepath.Join(dir, "cli-plugins")
	u.w.must(os.MkdirAll(plugins, 0o755))
	u.w.must(os.Symlink(binary, filepath.Join(plugins, "docker-quay")))
	u.plugin = true
	return u
}

// trusts has the user accept the registry's certificate, or plain HTTP.
func (u *user) trusts() {
	u.w.Helper()
	u.w.must(u.w.registry.WriteHosts(filepath.Join(u.home, ".config", "quay", "certs.d")))
}

// login is what `docker login` leaves behind where there is no engine and no helper.
func (u *user) login() {
	u.w.Helper()
	if u.engine != nil {
		u.w.must(u.engine.Login(u.w.ctx, u.w.registry))
		return
	}
	u.w.must(writeLogin(filepath.Join(u.home, ".docker"), u.w.registry))
}

// writeLogin writes a config.json of docker's with the login for a registry.
func writeLogin(dir string, g *rig.Registry) error {
	username, password := g.Credentials()
	auth := base64.StdEncoding.EncodeToString([]byte(username + ":" + password))
	b, err := json.Marshal(map[string]any{"auths": map[string]any{g.Addr(): map[string]string{"auth": auth}}})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), b, 0o600)
}

// uses has the user fetch by a node daemon.
func (u *user) uses(d *daemon) *user {
	u.flags = []string{"--socket", d.socket}
	u.store = d.store
	return u
}

// joins has the user's own fetcher be a member of the cluster.
func (u *user) joins(secret string, peers ...*rig.Node) *user {
	u.flags = append(u.flags, "--secret-file", secret, "--ports", fmt.Sprint(peerPort))
	for _, p := range peers {
		u.flags = append(u.flags, "--peer", peer(p))
	}
	return u
}

// outcome is what one command line came to.
type outcome struct {
	line           string
	stdout, stderr string
	code           int
	took           time.Duration
}

func (o outcome) String() string {
	return fmt.Sprintf("%s: exit %d after %s\n%s%s", o.line, o.code, o.took.Round(time.Millisecond), o.stdout, o.stderr)
}

// summary is the last line of a pull with --progress json.
type summary struct {
	Type       string        `json:"type"`
	Reference  string        `json:"reference"`
	Digest     digest.Digest `json:"digest"`
	Target     string        `json:"target"`
	UpToDate   bool          `json:"up_to_date"`
	Size       int64         `json:"size"`
	FromCache  int64         `json:"from_cache"`
	FromOrigin int64         `json:"from_origin"`
	FromPeers  int64         `json:"from_peers"`
	Uploaded   int64         `json:"uploaded"`
	Layers     int           `json:"layers"`
	Lazy       int           `json:"lazy"`
}

// args are those of docker-quay, or of docker, for a verb.
func (u *user) args(verb string, args []string) (program string, all []string) {
	program = "docker-quay"
	if u.plugin {
		program, all = "docker", []string{"quay"}
	}
	all = append(all, verb)
	if verb == "pull" || verb == "seed" {
		all = append(all, u.flags...)
	}
	return program, append(all, args...)
}

// quay runs a verb to its end.
func (u *user) quay(verb string, args ...string) outcome {
	u.w.Helper()
	program, args := u.args(verb, args)
	return u.run(program, args...)
}

// run runs a program to its end, as this user.
func (u *user) run(program string, args ...string) outcome {
	u.w.Helper()
	cmd, err := u.node.Command(u.w.ctx, u.env, program, args...)
	u.w.must(err)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		u.w.Fatal(err)
	}
	if err := u.w.ctx.Err(); err != nil {
		u.w.Fatalf("%s %s took too long:\n%s%s", program, strings.Join(args, " "), &stdout, &stderr)
	}
	o := outcome{
		line: program + " " + strings.Join(args, " "), stdout: stdout.String(), stderr: stderr.String(),
		code: cmd.ProcessState.ExitCode(), took: time.Since(start),
	}
	u.w.Log(o.line, "→", o.code, o.took.Round(time.Millisecond))
	return o
}

// pull runs a pull that must succeed.
func (u *user) pull(args ...string) summary {
	u.w.Helper()
	o := u.quay("pull", append([]string{"--progress", "json"}, args...)...)
	if o.code != 0 {
		u.w.Fatalf("the pull failed: %s", o)
	}
	var s summary
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil || s.Type != "summary" {
		u.w.Fatalf("standard output of a pull is no summary (%v): %s", err, o)
	}
	u.w.Logf("  %d bytes: %d from the registry, %d from peers, %d from the cache; %d layers, %d lazy", s.Size, s.FromOrigin, s.FromPeers, s.FromCache, s.Layers, s.Lazy)
	return s
}

// start starts a verb and returns at once. What it writes is in the process's log.
func (u *user) start(verb string, args ...string) *rig.Process {
	u.w.Helper()
	program, args := u.args(verb, args)
	p, err := u.w.rig.Start(u.w.ctx, rig.Command{
		Name: fmt.Sprintf("%s-%s-%d", u.name, verb, u.w.people.Add(1)), Path: program, Args: args, Env: u.env, Node: u.node,
	})
	u.w.must(err)
	return p
}

// seed starts seeding and returns when the image is given to others.
func (u *user) seed(ref string) *rig.Process {
	u.w.Helper()
	p := u.start("seed", "--progress", "plain", ref)
	u.w.until("seeding", func() bool {
		select {
		case <-p.Done():
			u.w.Fatalf("seeding ended (%s): %s", p.State(), p.Log())
		default:
		}
		return strings.Contains(p.Log(), "giving it to peers")
	})
	return p
}

// code is the exit code of a process that ends by itself.
func (w *world) code(p *rig.Process) int {
	w.Helper()
	err := p.Wait(w.ctx)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.ExitCode()
	}
	w.Fatal(err)
	return -1
}
