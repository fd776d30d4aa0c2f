package rig

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/crypto/bcrypt"
)

// RegistryOptions describe a registry.
type RegistryOptions struct {
	Node *Node  // where it runs; nil: this process's namespace, on loopback
	Dir  string // its storage; "": a new folder of the rig, kept over Stop and Start
	TLS  bool   // with a certificate of the registry's own Authority
	// Username and Password, when set, are asked for with every request (htpasswd).
	Username, Password string
}

// Registry is the CNCF distribution registry behind an in-process reverse proxy that counts and, when told so, misbehaves.
type Registry struct {
	rig       *Rig
	options   RegistryOptions
	name      string
	dir       string // configuration, keys, storage
	addr      string // of the front
	direct    string // of the registry itself
	authority *Authority
	tls       *tls.Config

	mu      sync.Mutex // guards following
	front   *front     // nil while stopped
	process *Process
	stats   Stats // of the last front, while stopped
}

// StartRegistry starts a registry.
func (r *Rig) StartRegistry(ctx context.Context, o RegistryOptions) (*Registry, error) {
	name := r.nextName("registry")
	dir, err := r.Dir(name)
	if err != nil {
		return nil, err
	}
	if o.Dir == "" {
		o.Dir = filepath.Join(dir, "storage")
	}
	g := &Registry{rig: r, options: o, name: name, dir: dir}
	host := "127.0.0.1"
	if o.Node != nil {
		host = o.Node.Addr.String()
	}
	if g.addr, err = freeAddress(o.Node, host); err != nil {
		return nil, err
	}
	if g.direct, err = freeAddress(o.Node, "127.0.0.1"); err != nil {
		return nil, err
	}
	if err := g.configure(host); err != nil {
		return nil, err
	}
	r.Cleanup(g.Stop)
	return g, g.Start(ctx)
}

// freeAddress is host with a port that nobody listens on just now, taken from below the range that the kernel gives to
// outgoing connections (32768 and up): one of those could have it before the registry starts.
func freeAddress(node *Node, host string) (string, error) {
	const first, count, tries = 20000, 10000, 50
	var err error
	for range tries {
		var l net.Listener
		l, err = node.Listen(net.JoinHostPort(host, strconv.Itoa(first+rand.IntN(count))))
		if err == nil {
			defer l.Close()
			return l.Addr().String(), nil
		}
	}
	return "", fmt.Errorf("find a free port on %s: %w", host, err)
}

// configure writes what the registry reads at its start.
func (g *Registry) configure(host string) error {
	config := fmt.Sprintf(`version: 0.1
log:
  level: error
  accesslog:
    disabled: true
storage:
  filesystem:
    rootdirectory: %s
  delete:
    enabled: true
  maintenance:
    uploadpurging:
      enabled: false
http:
  addr: %s
  secret: %s
  relativeurls: true
`, g.options.Dir, g.direct, g.rig.id)
	if g.options.TLS {
		authority, err := NewAuthority()
		if err != nil {
			return err
		}
		addresses := []net.IP{net.ParseIP(host), net.IPv4(127, 0, 0, 1)}
		certPath, keyPath, cert, err := authority.issue(g.dir, addresses, []string{"localhost"})
		if err != nil {
			return err
		}
		if err := os.WriteFile(g.CAFile(), authority.PEM(), 0o644); err != nil {
			return fmt.Errorf("write the registry's CA: %w", err)
		}
		g.authority = authority
		g.tls = &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2", "http/1.1"}}
		config += fmt.Sprintf("  tls:\n    certificate: %s\n    key: %s\n", certPath, keyPath)
	}
	if g.options.Username != "" {
		// The lowest cost: every request of a test is checked against it.
		hash, err := bcrypt.GenerateFromPassword([]byte(g.options.Password), bcrypt.MinCost)
		if err != nil {
			return fmt.Errorf("hash the registry's password: %w", err)
		}
		path := filepath.Join(g.dir, "htpasswd")
		if err := os.WriteFile(path, fmt.Appendf(nil, "%s:%s\n", g.options.Username, hash), 0o600); err != nil {
			return fmt.Errorf("write the registry's users: %w", err)
		}
		config += fmt.Sprintf("auth:\n  htpasswd:\n    realm: test\n    path: %s\n", path)
	}
	if err := os.WriteFile(filepath.Join(g.dir, "config.yml"), []byte(config), 0o644); err != nil {
		return fmt.Errorf("configure the registry: %w", err)
	}
	return nil
}

// Start starts a stopped registry again, at the same addresses and with what it held. Counters go on, faults do not.
func (g *Registry) Start(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.front != nil {
		return nil
	}
	scheme, transport := "http", &http.Transport{DialContext: g.options.Node.DialContext, DisableCompression: true}
	if g.options.TLS {
		scheme = "https"
		transport.TLSClientConfig = &tls.Config{RootCAs: g.authority.Pool()}
	}
	upstream := &url.URL{Scheme: scheme, Host: g.direct}
	process, err := g.rig.Start(ctx, Command{
		Name: g.name, Path: "registry", Args: []string{"serve", filepath.Join(g.dir, "config.yml")}, Node: g.options.Node,
		// Without this the registry warns about traces it cannot send.
		Env: []string{"OTEL_TRACES_EXPORTER=none"},
		Ready: func(ctx context.Context) error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, upstream.String()+"/v2/", nil)
			if err != nil {
				return err
			}
			resp, err := transport.RoundTrip(req)
			if err != nil {
				return err
			}
			return resp.Body.Close()
		},
	})
	if err != nil {
		return err
	}
	l, err := g.options.Node.Listen(g.addr)
	if err != nil {
		return errors.Join(fmt.Errorf("listen for the registry: %w", err), process.Stop())
	}
	g.process = process
	g.front = newFront(l, g.tls, upstream, transport, g.options.Username, g.options.Password)
	if g.stats.Requests != nil { // it ran before
		g.front.stats = g.stats
	}
	return nil
}

// Stop ends the registry: connections are refused until Start.
func (g *Registry) Stop() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.front == nil {
		return nil
	}
	err := errors.Join(g.front.close(), g.process.Stop())
	g.stats = g.front.snapshot()
	g.front = nil
	return err
}

// Addr is the host and port that clients use.
func (g *Registry) Addr() string { return g.addr }

// Direct is the host and port of the registry itself, on loopback of its namespace: not counted, without faults, for
// benchmarks that must not pay for the proxy.
func (g *Registry) Direct() string { return g.direct }

// Ref is the reference of NAME:TAG in this registry.
func (g *Registry) Ref(name string) string { return g.addr + "/" + name }

// Scheme is http or https.
func (g *Registry) Scheme() string {
	if g.options.TLS {
		return "https"
	}
	return "http"
}

// URL is the registry's root as clients see it, without a slash at the end.
func (g *Registry) URL() string { return g.Scheme() + "://" + g.addr }

// CAFile is the PEM file of the registry's authority; it exists only with TLS.
func (g *Registry) CAFile() string { return filepath.Join(g.dir, "ca.crt") }

// Credentials are the username and password asked for, empty for none.
func (g *Registry) Credentials() (username, password string) {
	return g.options.Username, g.options.Password
}

// Client is an HTTP client that reaches the registry from this process, whatever namespace it is in, and trusts its
// certificate. It sends no credentials.
func (g *Registry) Client() *http.Client {
	transport := &http.Transport{DialContext: g.options.Node.DialContext, ForceAttemptHTTP2: true, DisableCompression: true}
	if g.authority != nil {
		transport.TLSClientConfig = &tls.Config{RootCAs: g.authority.Pool()}
	}
	return &http.Client{Transport: transport}
}

// WriteHosts writes the registry's folder into a certs.d root: a hosts.toml with its scheme and CA, as containerd and others
// read them.
func (g *Registry) WriteHosts(root string) error {
	dir := filepath.Join(root, g.addr)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write the registry's hosts.toml: %w", err)
	}
	hosts := fmt.Sprintf("server = %q\n\n[host.%q]\n  capabilities = [\"pull\", \"resolve\", \"push\"]\n", g.URL(), g.URL())
	if g.options.TLS {
		hosts += fmt.Sprintf("  ca = %q\n", g.CAFile())
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(hosts), 0o644); err != nil {
		return fmt.Errorf("write the registry's hosts.toml: %w", err)
	}
	return nil
}

// SetFaults has the registry misbehave from the next request on; the zero Faults end that.
func (g *Registry) SetFaults(f Faults) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.front != nil {
		g.front.setFaults(f)
	}
}

// Stats counts what was served since the start or the last ResetStats.
func (g *Registry) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.front == nil {
		return g.stats
	}
	return g.front.snapshot()
}

// ResetStats sets all counters to zero.
func (g *Registry) ResetStats() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stats = Stats{}
	if g.front != nil {
		g.front.resetStats()
	}
}

// nextName is kind with a number, unique in the rig.
func (r *Rig) nextName(kind string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.names == nil {
		r.names = map[string]int{}
	}
	r.names[kind]++
	return fmt.Sprintf("%s%d", kind, r.names[kind])
}
