package rig

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
)

// EngineOptions describe a Docker Engine.
type EngineOptions struct {
	// Node is where it runs, with a default bridge of its own. nil: this process's namespace, without any bridge, so that
	// containers need --network none or host.
	Node *Node
	// Containerd is the one it works with. StartDockerd pulls into it.
	Containerd *Containerd
	// StorageDriver is a snapshotter of Containerd (dockerd: overlayfs, quay) or a graph driver (classic: overlay2, vfs).
	// "" leaves the choice to the engine.
	StorageDriver string
	// Registries are those it shall trust: the CA of one with TLS, plain HTTP of one without.
	Registries []*Registry
	// Flags are appended to dockerd's.
	Flags []string
}

// Engine is a dockerd with folders and a socket of its own, and a docker CLI configuration that leads to it.
type Engine struct {
	rig     *Rig
	options EngineOptions
	name    string
	dir     string
	program string
	docker  string // the CLI
	path    string // PATH of the daemon
	// settings are added to daemon.json.
	settings map[string]any
	process  *Process
}

// StartDockerd starts Docker Engine 29 on a rig's containerd, with the containerd image store.
func (r *Rig) StartDockerd(ctx context.Context, o EngineOptions) (*Engine, error) {
	if o.Containerd == nil {
		return nil, errors.New("start dockerd: it needs a containerd")
	}
	return r.startEngine(ctx, &Engine{
		rig: r, options: o, name: r.nextName("dockerd"), program: "dockerd", docker: "docker", path: toolPath(),
		// Debian 12's runc 1.1 does not know time namespaces, which dockerd asks for wherever the kernel has them.
		settings: map[string]any{"features": map[string]bool{"time-namespaces": false}},
	})
}

// StartClassic starts the classic Docker Engine 20.10 of Debian 12, which keeps images in graph drivers. It runs containers
// through the containerd of its options, or one that is made for it. The error wraps ErrNoTool when it is not installed.
func (r *Rig) StartClassic(ctx context.Context, o EngineOptions) (*Engine, error) {
	program := filepath.Join(classicDir(), "usr/sbin/dockerd")
	if _, err := os.Stat(program); err != nil {
		return nil, fmt.Errorf("the classic engine is not at %s: run make deps: %w", program, ErrNoTool)
	}
	if o.Containerd == nil {
		c, err := r.StartContainerd(ctx, ContainerdOptions{Node: o.Node})
		if err != nil {
			return nil, err
		}
		o.Containerd = c
	}
	usr := filepath.Join(classicDir(), "usr")
	return r.startEngine(ctx, &Engine{
		rig: r, options: o, name: r.nextName("classic"), program: program, docker: "docker",
		path: toolPath(filepath.Join(usr, "sbin"), filepath.Join(usr, "bin")),
	})
}

func (r *Rig) startEngine(ctx context.Context, e *Engine) (*Engine, error) {
	var err error
	if e.dir, err = r.Dir(e.name); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(e.ConfigDir(), 0o755); err != nil {
		return nil, fmt.Errorf("make the docker CLI's configuration folder: %w", err)
	}
	if err := e.configure(); err != nil {
		return nil, err
	}
	return e, e.Start(ctx)
}

// configure writes daemon.json and the bundle of certificates that the daemon trusts.
func (e *Engine) configure() error {
	insecure := []string{}
	var bundle []byte
	for _, g := range e.options.Registries {
		if g.authority != nil {
			bundle = append(bundle, g.authority.PEM()...)
		} else {
			insecure = append(insecure, g.Addr())
		}
	}
	daemon := map[string]any{"insecure-registries": insecure}
	maps.Copy(daemon, e.settings)
	config, err := json.Marshal(daemon)
	if err != nil {
		return fmt.Errorf("configure %s: %w", e.name, err)
	}
	if err := os.WriteFile(e.file("daemon.json"), config, 0o644); err != nil {
		return fmt.Errorf("configure %s: %w", e.name, err)
	}
	if len(bundle) > 0 {
		if err := os.WriteFile(e.file("ca.pem"), bundle, 0o644); err != nil {
			return fmt.Errorf("configure %s: %w", e.name, err)
		}
	}
	return nil
}

func (e *Engine) file(name string) string { return filepath.Join(e.dir, name) }

// Start starts it again after Stop or Kill9, with what it held.
func (e *Engine) Start(ctx context.Context) error {
	// The daemon refuses to start beside the PID file of one that was killed, when that ID is in use again.
	_ = os.Remove(e.file("docker.pid"))
	args := []string{
		"--config-file", e.file("daemon.json"), "--data-root", e.file("data"), "--exec-root", e.file("exec"),
		"--pidfile", e.file("docker.pid"), "--host", "unix://" + e.Socket(), "--containerd", e.options.Containerd.Socket(),
		// The machine's routing is none of a test's business.
		"--ip-forward=false",
	}
	if e.options.Node == nil {
		args = append(args, "--bridge=none", "--iptables=false")
	}
	if e.options.StorageDriver != "" {
		args = append(args, "--storage-driver", e.options.StorageDriver)
	}
	env := []string{"PATH=" + e.path, "NOTIFY_SOCKET="}
	if _, err := os.Stat(e.file("ca.pem")); err == nil {
		// /etc/docker/certs.d is one for the whole machine; this is not.
		env = append(env, "SSL_CERT_FILE="+e.file("ca.pem"))
	}
	client := e.httpClient()
	defer client.CloseIdleConnections()
	process, err := e.rig.Start(ctx, Command{
		Name: e.name, Path: e.program, Args: append(args, e.options.Flags...), Env: env, Node: e.options.Node,
		Ready: func(ctx context.Context) error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
			if err != nil {
				return err
			}
			resp, err := client.Do(req)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("_ping answers %s", resp.Status)
			}
			return nil
		},
	})
	if err != nil {
		return err
	}
	e.process = process
	return nil
}

func (e *Engine) httpClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", e.Socket())
		},
	}}
}

// Stop ends the engine and, with it, its containers.
func (e *Engine) Stop() error { return e.process.Stop() }

// Kill9 kills the engine. Its containers run on, below containerd.
func (e *Engine) Kill9() error { return e.process.Kill9() }

// Process is the running daemon.
func (e *Engine) Process() *Process { return e.process }

// Socket is the path of the API's unix socket.
func (e *Engine) Socket() string { return e.file("docker.sock") }

// Containerd is the one the engine works with.
func (e *Engine) Containerd() *Containerd { return e.options.Containerd }

// ConfigDir is the docker CLI's configuration folder (credentials, cli-plugins) for this engine.
func (e *Engine) ConfigDir() string { return e.file("cli") }

// Env is the environment that leads the docker CLI, and what speaks its language, to this engine.
func (e *Engine) Env() []string {
	return []string{"DOCKER_HOST=unix://" + e.Socket(), "DOCKER_CONFIG=" + e.ConfigDir(), "DOCKER_CONTEXT=", "HOME=" + e.dir}
}

// Command is the docker CLI with these arguments, in the engine's namespace.
func (e *Engine) Command(ctx context.Context, args ...string) (*exec.Cmd, error) {
	return command(ctx, e.options.Node, e.Env(), e.docker, args...)
}

// Docker runs the docker CLI to its end and returns its standard output; the error holds its standard error.
func (e *Engine) Docker(ctx context.Context, args ...string) (string, error) {
	return output(ctx, e.options.Node, e.Env(), e.docker, args...)
}

// Login stores a registry's credentials as `docker login` does.
func (e *Engine) Login(ctx context.Context, g *Registry) error {
	username, password := g.Credentials()
	cmd, err := e.Command(ctx, "login", "--username", username, "--password-stdin", g.Addr())
	if err != nil {
		return err
	}
	cmd.Stdin = bytes.NewReader([]byte(password))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("log in to %s: %w: %s", g.Addr(), err, bytes.TrimSpace(out))
	}
	return nil
}
