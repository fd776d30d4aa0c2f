package origin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// host is a registry or a mirror of one, with the connections to it. It is immutable.
type host struct {
	docker.RegistryHost // Client and Authorizer are not used: see transport, and auth.go

	name      string // the registry as references name it: docker.io, quay.io, 127.0.0.1:5000
	namespace string // what a mirror must be told in ?ns=; "" for the registry itself
	lax       bool   // plain HTTP is fine: loopback, or the user said so
	transport *http.Transport
	// own carries requests to the host itself: transport, perhaps with a fallback to plain HTTP. What redirects lead to goes
	// through transport alone, so that no failure of TLS there ends in plain HTTP.
	own http.RoundTripper
	// static is the Access of what hosts.toml itself brings along (a client certificate, an Authorization header), or Public.
	static string
}

// url is where path of the repository lies on this host.
func (h *host) url(repository, path string) *url.URL {
	u := &url.URL{Scheme: h.Scheme, Host: h.Host, Path: h.Path + "/" + repository + "/" + path}
	if h.namespace != "" {
		u.RawQuery = url.Values{"ns": {h.namespace}}.Encode()
	}
	return u
}

// repeats reports whether a host further down the list is this one again, and can do nothing more that is asked for here.
func (h *host) repeats(rh docker.RegistryHost) bool {
	used := rh.Capabilities & (docker.HostCapabilityPull | docker.HostCapabilityResolve)
	return rh.Scheme == h.Scheme && rh.Host == h.Host && rh.Path == h.Path && h.Capabilities.Has(used)
}

// owns reports whether u is on this very host: only there its credentials may go.
func (h *host) owns(u *url.URL) bool { return strings.EqualFold(u.Host, h.Host) }

// hostsOf returns the hosts to ask for a registry, the registry itself last. They are read again once a minute.
func (c *Client) hostsOf(registry string) ([]*host, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	old, known := c.hosts[registry]
	if known && time.Since(old.read) < c.limits.hostsFresh {
		return old.hosts, nil
	}
	hosts, err := c.readHosts(registry)
	if err != nil {
		return nil, fmt.Errorf("the configuration of the registry %s cannot be used: %w", registry, err)
	}
	old.close()
	c.hosts[registry] = hostSet{hosts: hosts, read: time.Now()}
	return hosts, nil
}

func (c *Client) readHosts(registry string) ([]*host, error) {
	dir, specific, err := c.hostDir(registry)
	if err != nil {
		return nil, err
	}
	// ConfigureHosts hides the transports behind round trippers; this is where they can be had.
	transports := map[*http.Client]*http.Transport{}
	configured, err := config.ConfigureHosts(c.containerdLog(), config.HostOptions{
		HostDir: func(string) (string, error) {
			if dir == "" {
				return "", errdefs.ErrNotFound
			}
			return dir, nil
		},
		UpdateClient: func(client *http.Client) error {
			if t, ok := client.Transport.(*http.Transport); ok {
				transports[client] = t
			}
			return nil
		},
	})(registry)
	if err != nil {
		return nil, err
	}
	var hosts []*host
	for _, rh := range configured {
		if i := slices.IndexFunc(hosts, func(h *host) bool { return h.repeats(rh) }); i >= 0 {
			// The usual hosts.toml has `server = URL` and, with its CA, `[host.URL]`. Asked a second time, without the CA, the
			// registry would seem to have wrong TLS to somebody whom it has just told to log in.
			hosts[i].Capabilities |= rh.Capabilities & docker.HostCapabilityPush
			continue
		}
		t := transports[rh.Client]
		if t == nil {
			return nil, fmt.Errorf("containerd made no transport for %s", rh.Host)
		}
		fallback := rh.Client.Transport != http.RoundTripper(t)
		h := &host{RegistryHost: rh, name: registry, transport: t.Clone(), static: Public}
		if rh.Host != registry && !(registry == "docker.io" && rh.Host == "registry-1.docker.io") {
			h.namespace = registry
		}
		loopback, _ := docker.MatchLocalhost(rh.Host)
		insecure := (c.options.Insecure || c.options.OnBehalf && slices.Contains(c.options.Own, registry)) && h.namespace == ""
		h.lax = loopback || insecure
		c.tune(h.transport)

		tls := h.transport.TLSClientConfig
		if loopback && specific && tls.RootCAs != nil {
			// containerd skips verification on loopback. Who put a CA there for this host wants it obeyed.
			tls.InsecureSkipVerify = false
		}
		if insecure {
			tls.InsecureSkipVerify = true
			fallback = fallback || rh.Scheme == "https"
		}
		h.own = h.transport
		if fallback {
			h.own = docker.NewHTTPFallback(h.transport)
		}
		if a := rh.Header.Get("Authorization"); a != "" {
			h.static = accessName(registry, "header", a)
		} else if len(tls.Certificates) > 0 {
			h.static = accessName(registry, "certificate", string(tls.Certificates[0].Certificate[0]))
		}
		if c.options.OnBehalf {
			c.restrain(h, registry, specific)
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

// tune gives a transport of containerd's our bounds.
func (c *Client) tune(t *http.Transport) {
	dial, limit := t.DialContext, c.limits.dial
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, limit) // hosts.toml's dial_timeout, when shorter, still holds
		defer cancel()
		return dial(ctx, network, addr)
	}
	t.TLSHandshakeTimeout = c.limits.handshake
	t.ResponseHeaderTimeout = c.limits.header
	t.MaxIdleConns = 0 // no sum over hosts: maxIdle bounds each
	t.MaxIdleConnsPerHost = maxIdle
	t.IdleConnTimeout = idleTimeout
	t.DisableCompression = true
	// Ranges run side by side, each at the speed of a connection of its own: HTTP/1.1, as containerd's transport is made for.
	t.ForceAttemptHTTP2 = false
}

// hostDir finds the folder for a registry: the first root that names it, else the first that has a "_default".
func (c *Client) hostDir(registry string) (dir string, specific bool, err error) {
	var fallback string
	for _, root := range c.options.HostDirs {
		found, err := config.HostDirFromRoot(root)(registry)
		switch {
		case errdefs.IsNotFound(err), errors.Is(err, fs.ErrPermission):
			// A folder that only root may read is not for us: daemons without root have their own.
		case err != nil:
			return "", false, err
		case filepath.Base(found) != "_default":
			return found, true, nil
		case fallback == "":
			fallback = found
		}
	}
	return fallback, false, nil
}

// accessName is an opaque, stable name for a credential.
func accessName(host, user, secret string) string {
	h := sha256.New()
	for _, part := range []string{host, user, secret} {
		fmt.Fprintf(h, "%d:%s", len(part), part) // with lengths, so that no two triples read the same
	}
	return hex.EncodeToString(h.Sum(nil))
}

// containerdLog is a context in which containerd's reading of hosts logs to our log instead of to standard error: warnings
// and errors (a hosts.toml that does not parse) as they are, its chatter as debug.
func (c *Client) containerdLog() context.Context {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.AddHook(hook{c.log})
	return log.WithLogger(context.Background(), logrus.NewEntry(l))
}

type hook struct{ log *slog.Logger }

func (hook) Levels() []logrus.Level { return logrus.AllLevels }

func (h hook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	if e.Level <= logrus.WarnLevel {
		level = slog.LevelWarn
	}
	var attrs []slog.Attr
	for k, v := range e.Data {
		attrs = append(attrs, slog.Any(k, v))
	}
	h.log.LogAttrs(context.Background(), level, e.Message, attrs...)
	return nil
}
