package origin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// errInward is the refusal to connect, on behalf of another machine, to what only this machine is meant to reach.
var errInward = errors.New("this node does not connect there on behalf of others")

// metadata are the addresses at which clouds give their machines secrets and which are not link-local: AWS by IPv6, Azure,
// Alibaba. Those of the others are 169.254.169.254, which is.
var metadata = []netip.Addr{
	netip.MustParseAddr("fd00:ec2::254"), netip.MustParseAddr("168.63.129.16"), netip.MustParseAddr("100.100.100.200"),
}

// inward reports whether an address is for this machine alone: loopback, link-local, no address at all, many machines at
// once, or a cloud's metadata service.
func inward(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	return !a.IsValid() || a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast() || slices.Contains(metadata, a)
}

// named reports whether this node's own configuration knows a registry by its name; specific tells that a folder does.
func (c *Client) named(registry string, specific bool) bool {
	return specific || slices.Contains(c.options.Own, registry)
}

// restrain makes a host fit to be asked on behalf of somebody on another machine. What lets this node in is
// taken away: headers and client certificates of hosts.toml. What is on this machine or its link is not connected to, but for a
// registry itself that the configuration names: else whoever may ask could reach the services of this machine through it.
func (c *Client) restrain(h *host, registry string, specific bool) {
	h.Header = http.Header{}
	h.transport.TLSClientConfig.Certificates = nil
	h.transport.TLSClientConfig.GetClientCertificate = nil
	h.static = Public
	free := ""
	if h.namespace == "" && c.named(registry, specific) {
		free = hostPort(h.Scheme, h.Host)
	}
	dial, limit := h.transport.DialContext, c.limits.dial
	guarded := &net.Dialer{
		Timeout:   limit,
		KeepAlive: 30 * time.Second, // containerd's
		// Called with the address that the name was resolved to, before the connection is made: a name that
		// resolves differently the second time is no way around it.
		Control: func(_, address string, _ syscall.RawConn) error {
			if to, err := netip.ParseAddrPort(address); err != nil || inward(to.Addr()) {
				return fmt.Errorf("%s: %w", address, errInward)
			}
			return nil
		},
	}
	h.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if free != "" && addr == free {
			return dial(ctx, network, addr)
		}
		return guarded.DialContext(ctx, network, addr)
	}
}

// hostPort is a URL's host with the port that its scheme implies, as transports dial it.
func hostPort(scheme, host string) string {
	if _, _, err := net.SplitHostPort(host); err == nil {
		return host
	}
	if scheme == "http" {
		return net.JoinHostPort(host, "80")
	}
	return net.JoinHostPort(host, "443")
}

// LoginFor is an Options.Credentials that has one credential, for the registry of ref, and none for any other host.
func LoginFor(ref reference.Named, username, secret string) func(host string) (string, string, error) {
	key := loginKey(reference.Domain(ref))
	return func(host string) (string, string, error) {
		if loginKey(host) != key {
			return "", "", nil
		}
		return username, secret, nil
	}
}

// Login returns the credential that this client holds for ref's registry itself, as Options.Credentials gives it, and the
// name that Repository.Access has for it; empty strings without one. It asks no registry.
func (c *Client) Login(ref reference.Named) (username, secret, access string) {
	hosts, err := c.hostsOf(reference.Domain(ref))
	if err != nil || len(hosts) == 0 {
		return "", "", ""
	}
	h := hosts[len(hosts)-1] // mirrors come first
	username, secret, err = c.options.Credentials(h.Host)
	if err != nil {
		c.log.Warn("no credential for the registry, asking without", "host", h.Host, "error", err)
	}
	if err != nil || secret == "" {
		return "", "", ""
	}
	return username, secret, accessName(h.name, username, secret)
}

// Insecure tells whether the client may ask registries by plain HTTP and without checking their certificates.
func (c *Client) Insecure() bool { return c.options.Insecure }

// Check tells whether a manifest that did not come from a registry is one that Manifest would have returned: size, digest
// and media type agree with the bytes. ErrMismatch, ErrTooLarge or ErrUnsupported otherwise.
func Check(desc ocispec.Descriptor, body []byte) error {
	if len(body) > maxManifest {
		return ErrTooLarge
	}
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("%w: digest %q: %v", ErrMismatch, oneLine(string(desc.Digest), maxCode), err)
	}
	if desc.Size != int64(len(body)) {
		return fmt.Errorf("%w: %d bytes instead of %d", ErrMismatch, len(body), desc.Size)
	}
	if _, err := manifestDigest(body, desc.Digest, ""); err != nil {
		return fmt.Errorf("%w: %w", ErrMismatch, err)
	}
	mediaType, err := manifestType(desc.MediaType, body)
	switch {
	case errors.Is(err, ErrUnsupported):
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrMismatch, err)
	case mediaType != desc.MediaType:
		return fmt.Errorf("%w: it is called %q and calls itself %s", ErrMismatch, oneLine(desc.MediaType, maxMessage), mediaType)
	}
	return nil
}

// Describe makes the descriptor of a manifest from its bytes alone; ErrMismatch or ErrUnsupported when they are none.
func Describe(body []byte) (ocispec.Descriptor, error) {
	mediaType, err := manifestType("", body)
	if err != nil && !errors.Is(err, ErrUnsupported) {
		err = fmt.Errorf("%w: %w", ErrMismatch, err)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := manifestDigest(body, "", "")
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(body))}, err
}
