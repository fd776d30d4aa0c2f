package cluster

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// Calls counts the bytes of messages.
type Calls struct{ sent, received atomic.Int64 }

func (c *Calls) add(_ string, sent, received int) {
	c.sent.Add(int64(sent))
	c.received.Add(int64(received))
}

type counter struct {
	r io.Reader
	n int
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += n
	return n, err
}

// ReadOptions says how a range is read from a member.
type ReadOptions struct {
	// Through has a member that takes part in the blob get what it does not hold
	// from the registry first.
	Through bool
	// Vouch asks what the member says of the pieces, too.
	Vouch bool
	// Silent is how long the member may send nothing before the read fails with
	// ErrSilent; 0: as long as the context allows. The time that the reader takes, or
	// the limits of this node, does not count.
	Silent time.Duration
}

// ErrSilent ends a read from a member that sends nothing.
var ErrSilent = errors.New("the member sends nothing")

// ReadAt reads len(p) bytes of a blob from a member, and what it says of the
// pieces if asked to; ErrNotHeld when it does not hold them. ctx should bound it:
// the registry is the alternative.
func (c *Cluster) ReadAt(ctx context.Context, m Member, d digest.Digest, p []byte, off int64, o ReadOptions) ([]Statement, error) {
	body, said, err := c.Open(ctx, m, d, off, int64(len(p)), o)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	if _, err := io.ReadFull(body, p); err != nil {
		return nil, err
	}
	return said, nil
}

// Open begins a read of n bytes of a blob from a member, at most 16 MiB, for the caller
// to take as they come. What the member says of the pieces, if asked to, is there at
// once; ErrNotHeld when it does not hold all of them. The caller closes the body.
func (c *Cluster) Open(ctx context.Context, m Member, d digest.Digest, off, n int64, o ReadOptions) (io.ReadCloser, []Statement, error) {
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	watch := &watched{cancel: cancel, limit: o.Silent, from: m, digest: d}
	body, said, err := c.open(ctx, watch, m, d, off, n, o)
	if err != nil {
		err = watch.why(err)
		cancel(nil)
		return nil, nil, err
	}
	if c.o.Body != nil {
		return &limitedBody{c.o.Body(outer, d, body), body}, said, nil
	}
	return body, said, nil
}

func (c *Cluster) open(ctx context.Context, watch *watched, m Member, d digest.Digest, off, n int64, o ReadOptions) (io.ReadCloser, []Statement, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+m.Addr.String()+"/quay/v1/blobs/"+string(d), nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	if o.Through {
		req.Header.Set(throughHeader, "1")
	}
	if o.Vouch {
		req.Header.Set(statementsHeader, "1")
	}
	watch.begin()
	resp, err := c.client.Do(req)
	watch.pause()
	if err != nil {
		return nil, nil, err
	}
	said, err := c.answered(m, resp)
	if err != nil {
		_ = resp.Body.Close()
		return nil, nil, err
	}
	watch.body = resp.Body
	return watch, said, nil
}

// answered checks how a member answered a ranged read.
func (c *Cluster) answered(m Member, resp *http.Response) ([]Statement, error) {
	if err := c.is(m, resp); err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
	case http.StatusNotFound, http.StatusRequestedRangeNotSatisfiable:
		return nil, ErrNotHeld
	default:
		return nil, fmt.Errorf("%s answered %s", m.Addr, resp.Status)
	}
	return statementsIn(resp.Header.Get(statementsHeader))
}

// watched is the body of a read, which fails when nothing comes for too long.
type watched struct {
	body   io.ReadCloser
	cancel context.CancelCauseFunc // of the read
	limit  time.Duration           // 0: none
	timer  *time.Timer
	silent atomic.Bool
	from   Member
	digest digest.Digest
}

func (w *watched) begin() {
	switch {
	case w.limit <= 0:
	case w.timer == nil:
		w.timer = time.AfterFunc(w.limit, func() {
			w.silent.Store(true)
			w.cancel(ErrSilent)
		})
	default:
		w.timer.Reset(w.limit)
	}
}

func (w *watched) pause() {
	if w.timer != nil {
		w.timer.Stop()
	}
}

func (w *watched) why(err error) error {
	if w.silent.Load() {
		return fmt.Errorf("%s: %w", w.from.Addr, ErrSilent)
	}
	return err
}

func (w *watched) Read(p []byte) (int, error) {
	w.begin()
	n, err := w.body.Read(p)
	w.pause()
	if err != nil && err != io.EOF {
		err = fmt.Errorf("peer %s cut a read of %s: %w", w.from.Addr, w.digest, w.why(err))
	}
	return n, err
}

func (w *watched) Close() error {
	w.pause()
	err := w.body.Close()
	w.cancel(nil)
	return err
}

// limitedBody is a body read through the limits of this node.
type limitedBody struct {
	io.Reader
	io.Closer
}

// statementsIn decodes the header that comes with a ranged read.
func statementsIn(header string) ([]Statement, error) {
	if header == "" {
		return nil, nil
	}
	raw, err := base64.StdEncoding.DecodeString(header)
	if err != nil {
		return nil, fmt.Errorf("%w: statements: %v", ErrMessage, err)
	}
	var said []Statement
	if err := json.Unmarshal(raw, &said); err != nil {
		return nil, fmt.Errorf("%w: statements: %v", ErrMessage, err)
	}
	return said, validStatements(said)
}

func statementsFor(said []Statement) string {
	raw, err := json.Marshal(said)
	if err != nil {
		return ""
	}
	return base64.StdEncoding.EncodeToString(raw)
}

// Statements asks a member what it knows of the content of some pieces.
func (c *Cluster) Statements(ctx context.Context, m Member, d digest.Digest, size int64, pieces []int) ([]Statement, error) {
	var said []Statement
	if _, err := c.call(ctx, m, "/quay/v1/statements", statementsQuery{Digest: d, Size: size, Pieces: pieces}, &said); err != nil {
		return nil, err
	}
	return said, validStatements(said)
}
