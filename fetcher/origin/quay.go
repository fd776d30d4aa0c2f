package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// itself is the registry that references name, never a mirror of it.
func (r *Repository) itself(k call) (*endpoint, error) {
	if ep := r.endpoints[len(r.endpoints)-1]; ep.namespace == "" {
		return ep, nil
	}
	return nil, &Error{Op: k.op, Reference: k.reference, Hint: "its hosts.toml names another host for it",
		Err: fmt.Errorf("%w: the registry itself may not be asked", ErrUnavailable)}
}

// QuayTorrent reads the .torrent file that a Quay up to version 3.3 makes of a blob, of at most limit bytes. It lives beside the
// distribution protocol, at /c1/torrent, and takes the login itself instead of a token. A registry that is no such Quay gives
// ErrNotFound.
func (r *Repository) QuayTorrent(ctx context.Context, d digest.Digest, limit int64) ([]byte, error) {
	k := call{op: "read the torrent of", reference: r.name.String() + "@" + string(d), patient: true}
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	ep, err := r.itself(k)
	if err != nil {
		return nil, err
	}
	k.url = &url.URL{Scheme: ep.Scheme, Host: ep.Host, Path: "/c1/torrent/" + reference.Path(r.name) + "/blobs/" + string(d)}
	user, secret, err := r.client.options.Credentials(ep.Host)
	if err != nil {
		r.client.log.Warn("no credential for the registry, asking without", "host", ep.Host, "error", err)
	}
	k.as = func(req *http.Request) {
		if user != "" && secret != "" {
			req.SetBasicAuth(user, secret) // the answer to a stranger is a 403 without a challenge
		}
	}
	a, err := r.send(ctx, ep, k)
	if err != nil {
		var e *Error
		if errors.As(err, &e) && (e.Status == http.StatusNotAcceptable || e.Status == http.StatusMethodNotAllowed) {
			e.Err = ErrNotFound // a later Quay, or a path that its front does not let pass
		}
		return nil, err
	}
	defer a.Body.Close()
	fail := func(kind, cause error) error {
		if err := ended(ctx); err != nil {
			return fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
		}
		return r.failed(ep, k, a.host, ticket{}, failure{kind: kind, cause: cause})
	}
	if mediaType, _, _ := mime.ParseMediaType(a.Header.Get("Content-Type")); mediaType == "text/html" {
		return nil, fail(ErrNotFound, errors.New("it sent a page for people")) // Quay's own front page, for paths that it does not know
	}
	text, err := io.ReadAll(io.LimitReader(a.Body, limit+1))
	switch {
	case err != nil:
		return nil, fail(ErrUnavailable, bare(err))
	case int64(len(text)) > limit:
		return nil, fail(ErrMismatch, fmt.Errorf("it has more than %d bytes", limit))
	}
	return text, nil
}

// WebSeed is the URL at which the registry gives a blob to anybody, without a login and without a token; "" when it does not. Only
// such a URL is of use to a client that knows nothing of registries. Most public registries want a token even for public images.
func (r *Repository) WebSeed(ctx context.Context, d digest.Digest) (string, error) {
	k := call{op: "find a web seed for", reference: r.name.String() + "@" + string(d), header: http.Header{"Range": {"bytes=0-0"}}}
	if err := d.Validate(); err != nil {
		return "", fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
	}
	ep, err := r.itself(k)
	if err != nil {
		return "", err
	}
	k.as = func(*http.Request) {}
	resp, t, f := r.get(ctx, ep, ep.url(reference.Path(r.name), "blobs/"+string(d)), &k)
	if f != nil {
		if err := ended(ctx); err != nil {
			return "", err
		}
		return "", r.failed(ep, k, ep.Host, t, *f)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusPartialContent && !isRedirect(resp.StatusCode) {
		return "", nil
	}
	u := ep.url(reference.Path(r.name), "blobs/"+string(d))
	u.Scheme = resp.Request.URL.Scheme // plain HTTP, when that is what it speaks
	return u.String(), nil
}
