package cluster

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"

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
}

// ReadAt reads len(p) bytes of a blob from a member, and what it says of the
// pieces if asked to; ErrNotHeld when it does not hold them. ctx should bound it:
// the registry is the alternative.
func (c *Cluster) ReadAt(ctx context.Context, m Member, d digest.Digest, p []byte, off int64, o ReadOptions) ([]Statement, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+m.Addr.String()+"/quay/v1/blobs/"+string(d), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
	if o.Through {
		req.Header.Set(throughHeader, "1")
	}
	if o.Vouch {
		req.Header.Set(statementsHeader, "1")
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
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
	said, err := statementsIn(resp.Header.Get(statementsHeader))
	if err != nil {
		return nil, err
	}
	var body io.Reader = resp.Body
	if c.o.Body != nil {
		body = c.o.Body(ctx, d, body)
	}
	if _, err := io.ReadFull(body, p); err != nil {
		return nil, fmt.Errorf("peer %s cut a read of %s: %w", m.Addr, d, err)
	}
	return said, nil
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
