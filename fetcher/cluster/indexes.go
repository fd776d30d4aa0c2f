package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
)

const (
	// MaxIndex bounds what a member says of what is in a blob, in bytes.
	MaxIndex = 32 << 20
	// indexesAtOnce bounds how many of them are given at a time; who comes on top is
	// told to ask elsewhere. Each is in memory while it is sent.
	indexesAtOnce = 4
	// indexWithin bounds the time that giving one takes: a slow reader must not keep a
	// place from others.
	indexWithin = time.Minute
)

// Indexer is a Holder that also knows what is in blobs.
type Indexer interface {
	// Index returns what the node knows of the content of a blob, in a form that
	// this package does not look into; ErrNotHeld when that is nothing.
	Index(ctx context.Context, d digest.Digest) ([]byte, error)
	// Pay waits until n bytes are within the node's upload limit.
	Pay(ctx context.Context, n int) error
}

// Index asks a member what is in a blob; ErrNotHeld when it does not know, or has no
// time. The member may lie.
func (c *Cluster) Index(ctx context.Context, m Member, d digest.Digest) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, indexWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+m.Addr.String()+"/quay/v1/indexes/"+string(d), nil)
	if err != nil {
		return nil, err
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
	case http.StatusOK:
	case http.StatusNotFound, http.StatusServiceUnavailable:
		return nil, ErrNotHeld
	default:
		return nil, fmt.Errorf("%s answered %s", m.Addr, resp.Status)
	}
	var body io.Reader = resp.Body
	if c.o.Body != nil {
		body = c.o.Body(ctx, d, body)
	}
	b, err := io.ReadAll(io.LimitReader(body, MaxIndex+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("peer %s cut the index of %s: %w", m.Addr, d, err)
	case len(b) > MaxIndex:
		return nil, fmt.Errorf("%w: the index of %s from %s has more than %d bytes", ErrMessage, d, m.Addr, MaxIndex)
	}
	return b, nil
}

func (c *Cluster) serveIndex(w http.ResponseWriter, r *http.Request) {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		http.Error(w, "malformed digest", http.StatusBadRequest)
		return
	}
	x, ok := c.o.Holder.(Indexer)
	if !ok {
		http.Error(w, ErrNotHeld.Error(), http.StatusNotFound)
		return
	}
	select {
	case c.indexes <- struct{}{}:
		defer func() { <-c.indexes }()
	default:
		http.Error(w, "busy", http.StatusServiceUnavailable)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), indexWithin)
	defer cancel()
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(indexWithin))
	defer func() { _ = control.SetWriteDeadline(time.Time{}) }() // the connection may serve slow reads of blobs next
	b, err := x.Index(ctx, d)
	if err == nil && len(b) > MaxIndex {
		err = fmt.Errorf("it has %d bytes", len(b))
	}
	if err != nil {
		if !errors.Is(err, ErrNotHeld) {
			c.o.Log.Debug("no index for a member", "digest", d, "err", err)
		}
		http.Error(w, ErrNotHeld.Error(), http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	const part = 256 << 10
	for len(b) > 0 {
		n := min(part, len(b))
		if x.Pay(ctx, n) != nil {
			panic(http.ErrAbortHandler) // the status is gone already
		}
		if _, err := w.Write(b[:n]); err != nil {
			return
		}
		b = b[n:]
	}
}
