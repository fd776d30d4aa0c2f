package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// auth holds the tokens of one repository on one host.
//
// containerd's authorizer does the protocol, but has two habits to live with: it keeps a failure to get a token (a cancelled
// caller's too) as if it were one, and it goes on with a token that the registry has refused. So it is used by one caller at a time,
// and replaced by a fresh one when it failed or its token was refused.
type auth struct {
	client   *Client
	host     *host
	scope    string       // that is asked for: "repository:NAME:pull"
	exchange *http.Client // to the token service

	slot chan struct{} // holds one: who has taken it may use what follows
	docker.Authorizer
	generation int    // counts authorizers
	access     string // of the credential this generation used, or Public
	user       string // its user, for error messages
	trouble    error  // of the credential helper, for error messages
}

// newAuth makes one for actions ("pull", "pull,push") in a repository.
func newAuth(c *Client, h *host, repository, actions string) *auth {
	a := &auth{client: c, host: h, scope: "repository:" + repository + ":" + actions, slot: make(chan struct{}, 1)}
	a.exchange = &http.Client{
		Transport: tokenTransport{a},
		Timeout:   c.limits.token,
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			// A 307 repeats the body, and the password in it.
			if len(via) > c.limits.hops || req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
				return errTokenRedirect
			}
			return nil
		},
	}
	a.renewLocked()
	return a
}

var (
	errTokenRedirect = errors.New("the registry's token service redirects elsewhere, where a credential must not go")
	errTokenPlain    = errors.New("the registry's token service is plain HTTP, where a credential must not go")
)

// renewLocked starts again without tokens.
func (a *auth) renewLocked() {
	header := a.client.header()
	for k, v := range a.host.Header {
		if k = http.CanonicalHeaderKey(k); k != "Authorization" { // that one is the registry's alone
			header[k] = v
		}
	}
	a.generation++
	a.access, a.user, a.trouble = a.host.static, "", nil
	a.Authorizer = docker.NewDockerAuthorizer(
		docker.WithAuthClient(a.exchange),
		docker.WithAuthHeader(header),
		docker.WithAuthCreds(func(host string) (string, string, error) {
			user, secret, err := a.client.options.Credentials(host)
			if err != nil {
				// Public images must not need a helper that works; what is not public will be refused, with this beside it.
				a.client.log.Warn("no credential for the registry, asking without", "host", host, "error", err)
				a.trouble = err
				return "", "", nil
			}
			if secret != "" {
				a.access, a.user = accessName(a.host.name, user, secret), user
			}
			return user, secret, nil
		}),
	)
}

// ticket says what a request was authorized with.
type ticket struct {
	generation int
	access     string
	user       string
	trouble    error
}

func (a *auth) ticketLocked() ticket {
	return ticket{a.generation, a.access, a.user, a.trouble}
}

func (a *auth) take(ctx context.Context) error {
	select {
	case a.slot <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// authorize adds what is known to be needed to a request to the host; it may fetch a token.
func (a *auth) authorize(ctx context.Context, req *http.Request) (ticket, error) {
	if err := a.take(ctx); err != nil {
		return ticket{}, err
	}
	defer func() { <-a.slot }()
	t := a.ticketLocked()
	err := a.Authorize(docker.WithScope(ctx, a.scope), req)
	if err != nil {
		a.renewLocked()
	}
	return t, err
}

// challenged takes a 401 or 403 that a request with ticket t got. An error means that there is no answer to it.
func (a *auth) challenged(ctx context.Context, t ticket, resp *http.Response) error {
	if err := a.take(ctx); err != nil {
		return err
	}
	defer func() { <-a.slot }()
	if a.generation != t.generation {
		return nil // another request's answer came first: try with what it got
	}
	a.renewLocked()
	return a.AddResponses(ctx, []*http.Response{resp})
}

// tokenTransport carries requests to the token service that the registry named.
type tokenTransport struct{ *auth }

func (t tokenTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	rt := http.RoundTripper(t.host.transport)
	if t.host.owns(req.URL) {
		rt = t.host.own
	}
	if req.URL.Scheme != "https" && t.host.Scheme == "https" && !t.host.lax {
		return nil, errTokenPlain
	}
	t.client.counts.requests.Add(1)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(resp.Body, maxTokenBody), resp.Body}
	return resp, nil
}

// tokenFailure says what a failure to authorize means.
func (t ticket) tokenFailure(err error) failure {
	var status remoteerrors.ErrUnexpectedStatus
	var wire *url.Error
	switch {
	case errors.As(err, &status):
		f := statusFailure(status.StatusCode)
		if status.StatusCode >= 400 && status.StatusCode < 500 && status.StatusCode != http.StatusTooManyRequests {
			f = failure{kind: ErrDenied}
		}
		code, message := parseErrorBody(status.Body)
		if code != "" || message != "" {
			message = ": " + join(code, message)
		}
		f.cause = fmt.Errorf("its token service answered %d%s", status.StatusCode, message)
		return f
	case errors.Is(err, errTokenPlain), errors.Is(err, errTokenRedirect):
		return failure{kind: ErrDenied, cause: bare(err)}
	case errors.As(err, &wire) && wire.Op != "parse": // an address that is none is the registry's fault
		f := wireFailure(wire.Err)
		f.cause = fmt.Errorf("its token service: %w", f.cause)
		return f
	case errors.Is(err, docker.ErrInvalidAuthorization), errdefs.IsNotImplemented(err):
		return failure{kind: ErrDenied} // no credential for the challenge, or no challenge that we know
	}
	return failure{kind: ErrUnexpected, cause: fmt.Errorf("its token service: %w", bare(err))}
}
