package tracker

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"
)

const (
	// maxConns bounds connections: an announce takes milliseconds, and each of them a few KB.
	maxConns = 512
	// requestTime bounds reading a request, and writing its answer: one packet each, over a bad line.
	requestTime = 10 * time.Second
	// maxHeader bounds a request line with its headers: the longest query, and what clients and proxies add.
	maxHeader = maxQuery + 8<<10
	// closing is how long requests that are being answered may take when the tracker ends.
	closing = 2 * time.Second
)

// Serve answers on l until ctx ends, and closes l. The end of ctx is no error.
func (t *Tracker) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler: t, ReadTimeout: requestTime, WriteTimeout: requestTime, MaxHeaderBytes: maxHeader,
		ErrorLog: log.New(io.Discard, "", 0), // what strangers send is no news
	}
	server.SetKeepAlivesEnabled(false) // the next announce is minutes away
	ended := make(chan error, 1)
	go func() {
		ended <- server.Serve(&bounded{Listener: l, room: make(chan struct{}, maxConns), done: make(chan struct{})})
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), closing)
	defer cancel()
	err := server.Shutdown(stop)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close()
	}
	<-ended
	return err
}

// bounded accepts no more connections than there is room for: the next one waits until another ends.
type bounded struct {
	net.Listener
	room  chan struct{}
	done  chan struct{}
	close sync.Once
}

func (b *bounded) Accept() (net.Conn, error) {
	select {
	case b.room <- struct{}{}:
	case <-b.done:
		return nil, net.ErrClosed
	}
	c, err := b.Listener.Accept()
	if err != nil {
		<-b.room
		return nil, err
	}
	return &boundedConn{Conn: c, leave: func() { <-b.room }}, nil
}

func (b *bounded) Close() error {
	b.close.Do(func() { close(b.done) })
	return b.Listener.Close()
}

type boundedConn struct {
	net.Conn
	leave func()
	close sync.Once
}

func (c *boundedConn) Close() error {
	c.close.Do(c.leave)
	return c.Conn.Close()
}
