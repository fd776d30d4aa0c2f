package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// errStalled is a body that was silent for too long.
var errStalled = errors.New("no byte came for too long")

// body is a response's body that gives up after a silence, counts, and takes its request with it when it is closed. The clock
// runs only while somebody reads: a slow reader is not the registry's fault.
type body struct {
	io.ReadCloser
	cancel context.CancelFunc
	timer  *time.Timer // fires into stalled and cancel; runs only within Read
	stall  time.Duration
	// stalled is set before cancel, so that the error that follows can be told from the caller's own.
	stalled atomic.Bool
	bytes   *atomic.Int64
}

func newBody(rc io.ReadCloser, cancel context.CancelFunc, stall time.Duration, bytes *atomic.Int64) *body {
	b := &body{ReadCloser: rc, cancel: cancel, stall: stall, bytes: bytes}
	b.timer = time.AfterFunc(stall, func() {
		b.stalled.Store(true)
		cancel()
	})
	b.timer.Stop()
	return b
}

func (b *body) Read(p []byte) (int, error) {
	b.timer.Reset(b.stall)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	b.bytes.Add(int64(n))
	if err != nil && err != io.EOF && b.stalled.Load() {
		err = fmt.Errorf("%w (%v)", errStalled, b.stall)
	}
	return n, err
}

// Close may come while another goroutine reads: it ends the request first.
func (b *body) Close() error {
	b.timer.Stop()
	b.cancel()
	return b.ReadCloser.Close()
}
