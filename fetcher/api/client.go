package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
)

// progressWithin bounds one question for progress; the answer comes from memory.
const progressWithin = 2 * time.Second

// maxAnswer bounds an answer in bytes: the progress of an image of 512 layers is
// below 1 MiB.
const maxAnswer = 16 << 20

// Client talks to a node daemon. It is safe for concurrent use.
type Client struct {
	path string
	http *http.Client
}

// Dial returns a client of the daemon at a socket, after asking its status. The
// error is the dialer's when nobody listens there.
func Dial(ctx context.Context, path string) (*Client, Status, error) {
	c := &Client{path: path, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "unix", path)
		},
		MaxIdleConnsPerHost: 16,
		IdleConnTimeout:     time.Minute,
	}}}
	var st Status
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := c.call(ctx, http.MethodGet, "/quay/v1/status", nil, &st); err != nil {
		_ = c.Close()
		return nil, st, err
	}
	return c, st, nil
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Status asks the node about itself.
func (c *Client) Status(ctx context.Context) (st Status, err error) {
	return st, c.call(ctx, http.MethodGet, "/quay/v1/status", nil, &st)
}

// StatusOfLayers is Status with a list of the layers.
func (c *Client) StatusOfLayers(ctx context.Context) (st Status, err error) {
	return st, c.call(ctx, http.MethodGet, "/quay/v1/status?layers=true", nil, &st)
}

// Peers asks what the node knows of its neighbours and of the blobs it shares; with
// blobs named, of those only, at most fetcher.MaxReportDigests.
func (c *Client) Peers(ctx context.Context, blobs ...digest.Digest) (r fetcher.Report, err error) {
	path := "/quay/v1/peers"
	if len(blobs) > 0 {
		q := url.Values{}
		for _, d := range blobs {
			q.Add("digest", d.String())
		}
		path += "?" + q.Encode()
	}
	return r, c.call(ctx, http.MethodGet, path, nil, &r)
}

// Image opens a session for an image.
func (c *Client) Image(ctx context.Context, req ImageRequest) (*Session, error) {
	s := &Session{c: c}
	if err := c.call(ctx, http.MethodPost, "/quay/v1/images", req, &s.Image); err != nil {
		return nil, err
	}
	var err error
	if s.ref, err = reference.ParseNormalizedNamed(s.Image.Ref); err != nil {
		return nil, fmt.Errorf("the node answered with image %q: %w", s.Image.Ref, err)
	}
	return s, nil
}

func (c *Client) do(ctx context.Context, method, path string, msg any) (*http.Response, error) {
	var body io.Reader
	switch msg := msg.(type) {
	case nil:
	case encoded:
		body = bytes.NewReader(msg)
	default:
		b, err := json.Marshal(msg)
		if err != nil {
			return nil, err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://quay"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("node daemon at %s: %w", c.path, errors.Unwrap(err))
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		var f fault
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
		if json.Unmarshal(b, &f) != nil || f.Message == "" {
			f = fault{Message: fmt.Sprintf("node daemon at %s answered %s", c.path, resp.Status)}
		}
		return nil, f.err()
	}
	return resp, nil
}

func (c *Client) call(ctx context.Context, method, path string, msg, answer any) error {
	resp, err := c.do(ctx, method, path, msg)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body := io.LimitReader(resp.Body, maxAnswer)
	if err := json.NewDecoder(body).Decode(answer); err != nil {
		return fmt.Errorf("node daemon at %s: %w", c.path, err)
	}
	_, _ = io.Copy(io.Discard, body) // else the connection is not used again
	return nil
}

// Session is an image on a node. It has the methods of fetcher.Image that a
// target needs.
type Session struct {
	c   *Client
	ref reference.Named
	// Image is what the node resolved.
	Image Image
}

func (s *Session) path(rest string) string { return "/quay/v1/images/" + s.Image.Session + rest }

// Ref is the reference with its tag or digest.
func (s *Session) Ref() reference.Named { return s.ref }

// Open streams a part of the image. The end of a layer's stream means that its
// digest was checked.
func (s *Session) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	resp, err := s.c.do(ctx, http.MethodGet, s.path("/content/"+desc.Digest.String()), nil)
	if err != nil {
		return nil, err
	}
	return &stream{ReadCloser: resp.Body, s: s, desc: desc}, nil
}

// stream is a body whose breaking off is explained by the node.
type stream struct {
	io.ReadCloser
	s    *Session
	desc ocispec.Descriptor
}

func (r *stream) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && err != io.EOF && !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		if why := r.s.faultOf(r.desc); why != nil {
			err = why
		}
	}
	return n, err
}

// faultOf asks why the stream of a part broke off; nil when the node does not
// say.
func (s *Session) faultOf(desc ocispec.Descriptor) error {
	ctx, cancel := context.WithTimeout(context.Background(), progressWithin)
	defer cancel()
	var f fault
	err := s.c.call(ctx, http.MethodGet, s.path("/content/"+desc.Digest.String()+"/fault"), nil, &f)
	if err != nil || f.Message == "" {
		return nil
	}
	return f.err()
}

// Progress asks how far each blob is; nil when the node does not answer.
func (s *Session) Progress() []fetcher.Progress {
	ctx, cancel := context.WithTimeout(context.Background(), progressWithin)
	defer cancel()
	var ps []fetcher.Progress
	if s.c.call(ctx, http.MethodGet, s.path("/progress"), nil, &ps) != nil {
		return nil
	}
	return ps
}

// Fetch returns when the node has all of the image, digests checked.
func (s *Session) Fetch(ctx context.Context) error {
	return s.c.call(ctx, http.MethodPost, s.path("/fetch"), nil, &struct{}{})
}

// Close ends the session on the node.
func (s *Session) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), progressWithin)
	defer cancel()
	return s.c.call(ctx, http.MethodDelete, s.path(""), nil, &struct{}{})
}
