package origin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// call is a request below a repository: what a person would say it is for, and how long to insist.
type call struct {
	op        string // "read the manifest of"
	reference string
	path      string   // "blobs/sha256:…"
	url       *url.URL // instead of path: where the registry itself said to go on
	method    string   // "" is GET
	payload   []byte   // what is sent
	push      bool     // asks with the right to push
	// as authorizes a request to the host itself in place of tokens and of hosts.toml's headers; nil for those.
	as      func(*http.Request)
	header  http.Header
	blob    digest.Digest // whose redirect may be reused; "" for none
	patient bool          // nobody else is left to ask
	waited  time.Duration // in all pauses so far
}

// reads reports whether an answer tells what who asks may read: Access.
func (k *call) reads() bool { return !k.push && k.as == nil }

// answer is a response with 200 or 206; to a push also with 201, 202, or 204.
type answer struct {
	*http.Response
	host string // that sent it
}

// each tries f on the hosts that may be asked, mirrors first, until one succeeds. The error is the last host's: the registry
// itself has the last word.
func (r *Repository) each(ctx context.Context, need docker.HostCapabilities, k call, f func(*endpoint, call) error) error {
	var able []*endpoint
	for _, ep := range r.endpoints {
		if ep.Capabilities.Has(need) {
			able = append(able, ep)
		}
	}
	if len(able) == 0 {
		return &Error{Op: k.op, Reference: k.reference, Hint: "its hosts.toml lists no host with the capability (pull, resolve) for it",
			Err: fmt.Errorf("%w: no host may be asked", ErrUnavailable)}
	}
	var err error
	for i, ep := range able {
		last := i == len(able)-1
		if !last && r.client.pauses.failed(ep.Host) {
			continue
		}
		k.patient = last
		if err = f(ep, k); err == nil || ended(ctx) != nil {
			return err
		}
		if !last {
			r.client.log.Info("mirror failed, asking the next host", "mirror", ep.Host, "error", err)
			if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrTLS) {
				r.client.pauses.fail(ep.Host, r.client.limits.mirrorDown)
			}
		}
	}
	return err
}

// send makes the call to one host, again and again as long as that may help.
func (r *Repository) send(ctx context.Context, ep *endpoint, k call) (*answer, error) {
	c := r.client
	for try := 0; ; try++ {
		a, host, t, f := r.round(ctx, ep, &k)
		if f == nil {
			return a, nil
		}
		if err := ended(ctx); err != nil {
			return nil, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, err)
		}
		first, allowed := c.limits.backoff, 0
		switch f.again {
		case once:
			allowed = min(c.limits.retriesTimeout, c.limits.retries)
		case briefly:
			first, allowed = c.limits.backoffRefused, min(c.limits.retriesRefused, c.limits.retries)
		case patiently:
			allowed = c.limits.retries
		}
		pause := c.limits.wait(first, try)
		if f.pause > 0 {
			pause = 0 // the host's own pause is kept where the next request begins
		}
		if !k.patient || try >= allowed || k.waited+max(pause, f.pause) > c.limits.pauses {
			return nil, r.failed(ep, k, host, t, *f)
		}
		c.counts.retries.Add(1)
		c.log.Debug("asking the registry again", "reference", k.reference, "host", host, "status", f.status,
			"error", f.cause, "pause", max(pause, f.pause), "try", try+1)
		k.waited += pause
		if sleep(ctx, pause) != nil {
			return nil, fmt.Errorf("cannot %s %s: %w", k.op, k.reference, ended(ctx))
		}
	}
}

// round makes the call once: through challenges and redirects to an answer, or a failure with the host that is to blame
// and the ticket that was last used.
func (r *Repository) round(ctx context.Context, ep *endpoint, k *call) (_ *answer, host string, t ticket, _ *failure) {
	c := r.client
	if u := ep.redirects.get(k.blob); u != nil {
		resp, t, f := r.get(ctx, ep, u, k)
		switch {
		case f != nil && f.status == 0:
			ep.redirects.drop(k.blob, u) // perhaps that server is gone: the next round gets another
			return nil, u.Host, t, f
		case f != nil:
			return nil, u.Host, t, f
		case resp.StatusCode < 300:
			return &answer{resp, u.Host}, u.Host, t, nil
		case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable, resp.StatusCode == http.StatusTooManyRequests, resp.StatusCode >= 500:
			return nil, u.Host, t, c.refusal(resp)
		}
		// 401, 403, 404, 410, S3's 400 for a token that ran out: the signature has expired. Whatever else it may be shows next.
		discard(resp)
		ep.redirects.drop(k.blob, u)
	}

	u := k.url
	if u == nil {
		u = ep.url(reference.Path(r.name), k.path)
	}
	life := redirectMax
	challenges := 0
	for hop := 0; ; {
		resp, used, f := r.get(ctx, ep, u, k)
		if ep.owns(u) {
			t = used
		}
		if f != nil {
			return nil, u.Host, t, f
		}
		switch status := resp.StatusCode; {
		case status == http.StatusOK || status == http.StatusPartialContent,
			k.push && (status == http.StatusCreated || status == http.StatusAccepted || status == http.StatusNoContent),
			k.method == http.MethodHead && isRedirect(status): // what it would lead to is there, and may be signed for GET alone
			if ep.owns(u) && k.reads() {
				r.granted(used.access)
			}
			if hop > 0 && k.blob != "" {
				ep.redirects.put(k.blob, u, life)
				c.counts.redirects.Add(1)
			}
			return &answer{resp, u.Host}, u.Host, t, nil

		case ep.owns(u) && k.as == nil && challenges < c.limits.challenges && (challenges == 0 || !basic(resp.Request)) &&
			(status == http.StatusUnauthorized || status == http.StatusForbidden && resp.Header.Get("WWW-Authenticate") != ""):
			challenges++
			if err := ep.authFor(k).challenged(ctx, used, resp); err != nil {
				f := used.tokenFailure(err)
				if f.kind == ErrDenied && f.cause == nil {
					f = *c.refusal(resp) // its own words are better than ours
				}
				discard(resp)
				return nil, u.Host, t, &f
			}
			discard(resp)

		case isRedirect(status) && resp.Header.Get("Location") != "" && (k.method == "" || status >= http.StatusTemporaryRedirect):
			next, f := c.follow(ep, resp, hop)
			discard(resp)
			if f != nil {
				return nil, u.Host, t, f
			}
			if ep.owns(u) && k.reads() {
				r.granted(used.access)
			}
			life = min(life, lifetime(next, clock(resp.Header)))
			u, hop = next, hop+1

		default:
			f := c.refusal(resp)
			if !ep.owns(u) && f.kind == ErrDenied {
				f.hint = "the storage behind the registry refused the registry's own signed URL: are its clock and its keys right?"
			}
			return nil, u.Host, t, f
		}
	}
}

// get sends one request and comes back with its headers. It waits first when the host asked for a pause. Credentials and the
// headers of hosts.toml go along only to the host that they belong to.
func (r *Repository) get(ctx context.Context, ep *endpoint, u *url.URL, k *call) (*http.Response, ticket, *failure) {
	c := r.client
	if left, why := c.pauses.left(u.Host); left > 0 {
		if !k.patient || k.waited+left > c.limits.pauses {
			return nil, ticket{}, &failure{kind: why, cause: fmt.Errorf("%s asked to be left alone for another %v", u.Host, left.Round(time.Second))}
		}
		left += c.limits.wait(c.limits.backoff, 0) // not all that waited at the same instant
		k.waited += left
		if sleep(ctx, left) != nil {
			return nil, ticket{}, &failure{kind: ErrUnavailable, cause: ctx.Err()}
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	req, err := http.NewRequestWithContext(ctx, k.method, u.String(), bytes.NewReader(k.payload)) // "" is GET
	if err != nil {
		cancel()
		return nil, ticket{}, &failure{kind: ErrUnexpected, cause: bare(err)}
	}
	req.Header = c.header()
	for key, v := range k.header {
		req.Header[key] = v
	}
	t := ticket{access: Public}
	rt := http.RoundTripper(ep.transport)
	if ep.owns(u) {
		rt = ep.own
	}
	if ep.owns(u) && k.as != nil {
		k.as(req)
	} else if ep.owns(u) {
		for key, v := range ep.Header {
			req.Header[http.CanonicalHeaderKey(key)] = v
		}
		if t, err = ep.authFor(k).authorize(ctx, req); err != nil {
			cancel()
			f := t.tokenFailure(err)
			return nil, t, &f
		}
	}
	c.counts.requests.Add(1)
	client := http.Client{Transport: rt, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Do(req)
	if err != nil {
		cancel()
		f := wireFailure(err)
		return nil, t, &f
	}
	resp.Body = newBody(resp.Body, cancel, c.limits.stall, &c.counts.bytes)
	return resp, t, nil
}

// authFor is what authorizes a call.
func (ep *endpoint) authFor(k *call) *auth {
	if k.push {
		return ep.pushAuth
	}
	return ep.auth
}

// basic reports whether a request carried a password: the same password is not worth a second try, an account may get locked. (A
// token may have been for less than this request needs.)
func basic(req *http.Request) bool {
	return strings.HasPrefix(req.Header.Get("Authorization"), "Basic ")
}

func isRedirect(status int) bool {
	switch status {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// follow says where a redirect leads, or why not to go there.
func (c *Client) follow(ep *endpoint, resp *http.Response, hop int) (*url.URL, *failure) {
	if hop >= c.limits.hops {
		return nil, &failure{kind: ErrUnexpected, cause: fmt.Errorf("it redirects more than %d times", c.limits.hops)}
	}
	next, err := resp.Location() // against the URL that was really asked, after a fallback to plain HTTP say
	if err != nil {
		return nil, &failure{kind: ErrUnexpected, cause: errors.New("it redirects to what is not a URL")}
	}
	switch {
	case next.Scheme != "https" && next.Scheme != "http" || next.Host == "":
		return nil, &failure{kind: ErrUnexpected, cause: errors.New("it redirects to what is not HTTP")}
	case next.Scheme == "http" && resp.Request.URL.Scheme == "https" && !ep.lax:
		return nil, &failure{kind: ErrTLS, cause: fmt.Errorf("it redirects from HTTPS to plain HTTP on %s", oneLine(next.Host, maxMessage)),
			hint: "use --insecure if you trust the network in between"}
	}
	next.User = nil // would become an Authorization header that nobody here holds
	next.Fragment = ""
	return next, nil
}

// refusal reads what a host said with a status that is no success, notes the pause it asks for, and closes the response.
func (c *Client) refusal(resp *http.Response) *failure {
	defer resp.Body.Close()
	f := statusFailure(resp.StatusCode)
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	f.code, f.text = parseErrorBody(text)
	switch resp.StatusCode {
	case http.StatusRequestedRangeNotSatisfiable:
		f.kind = ErrMismatch
		f.hint = "the blob is shorter there than the manifest says"
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if d, ok := parseRetryAfter(resp.Header.Get("Retry-After"), clock(resp.Header)); ok {
			f.pause = min(d, c.limits.pause)
			c.pauses.ask(resp.Request.URL.Host, f.pause, f.kind)
			c.log.Info("a registry asks for a pause", "host", resp.Request.URL.Host, "status", f.status, "pause", f.pause)
		}
	}
	return &f
}

// discard reads the little that is left of a response, so that its connection can be used again.
func discard(resp *http.Response) {
	io.CopyN(io.Discard, resp.Body, 4<<10) //nolint:errcheck // only thrift
	resp.Body.Close()
}

// failed makes the sentence.
func (r *Repository) failed(ep *endpoint, k call, host string, t ticket, f failure) error {
	e := &Error{Op: k.op, Reference: k.reference, Host: host, Status: f.status, Code: f.code, Message: f.text, Hint: f.hint, Err: f.kind}
	if f.cause != nil {
		e.Err = fmt.Errorf("%w: %w", f.kind, f.cause)
	}
	if e.Hint == "" {
		e.Hint = r.hint(ep, k, t, f.kind)
	}
	return e
}

// certs is the folder to name to a person: docker's when it is looked at, all know it.
func (c *Client) certs() string {
	const dockers = "/etc/docker/certs.d"
	if len(c.options.HostDirs) == 0 || slices.Contains(c.options.HostDirs, dockers) {
		return dockers
	}
	return c.options.HostDirs[0]
}

// hint is what to try after a failure of a kind.
func (r *Repository) hint(ep *endpoint, k call, t ticket, kind error) string {
	login := loginCommand(ep.Host)
	switch kind {
	case ErrDenied:
		may := "pull"
		if k.push {
			may = "push to"
		}
		hint := fmt.Sprintf("%s does not exist or needs a login: run `%s`", r.name, login)
		switch {
		case t.user != "":
			hint = fmt.Sprintf("%s does not exist, or the login of %s for %s may not %s it: run `%s`", r.name, oneLine(t.user, maxCode), ep.Host, may, login)
		case t.access != "" && t.access != Public:
			hint = fmt.Sprintf("%s does not exist, or your login for %s may not %s it: run `%s`", r.name, ep.Host, may, login)
		}
		if t.trouble != nil {
			hint += fmt.Sprintf(" (asked without a login, because %s)", oneLine(t.trouble.Error(), maxMessage))
		}
		return hint
	case ErrNotFound:
		if k.blob != "" {
			return "the registry has lost this part of the image: it must be pushed again"
		}
		return "check the name and the tag"
	case ErrTLS:
		return fmt.Sprintf("if its certificate is by a CA of your own, save that as %s/%s/ca.crt; --insecure does without verification", r.client.certs(), ep.Host)
	case ErrUnavailable:
		return fmt.Sprintf("check the name %s, the network, and that the registry runs", ep.Host)
	case ErrRateLimited:
		return fmt.Sprintf("wait, or log in for a higher limit: run `%s`", login)
	case ErrMismatch:
		return "a proxy in between or the registry's storage may be at fault; try again, or push the image again"
	}
	return ""
}
