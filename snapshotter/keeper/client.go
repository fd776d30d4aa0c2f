package keeper

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// callTimeout is how long a keeper may take for one call when the caller's context
// says nothing: it answers from memory, so this is the time a busy machine may take.
const callTimeout = 5 * time.Second

// Client is the Store in a keeper's process.
type Client struct{ path string }

var _ Store = (*Client)(nil)

// Dial finds the keeper of socketPath. It fails when there is none.
func Dial(ctx context.Context, socketPath string) (*Client, error) {
	c := &Client{path: socketPath}
	if _, err := c.List(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// Put implements Store.
func (c *Client) Put(ctx context.Context, name string, f *os.File) error {
	return withFD(f, func(fd int) error {
		_, err := c.call(ctx, message{code: opPut, text: name, fd: fd})
		return err
	})
}

// Get implements Store.
func (c *Client) Get(ctx context.Context, name string) (*os.File, error) {
	m, err := c.call(ctx, message{code: opGet, text: name, fd: none})
	if err != nil {
		return nil, err
	}
	if m.fd == none {
		return nil, fmt.Errorf("the keeper answered without the file %q; has this process too many open files?", name)
	}
	return os.NewFile(uintptr(m.fd), name), nil
}

// Drop implements Store.
func (c *Client) Drop(ctx context.Context, name string) error {
	_, err := c.call(ctx, message{code: opDrop, text: name, fd: none})
	return err
}

// List implements Store.
func (c *Client) List(ctx context.Context) ([]string, error) {
	m, err := c.call(ctx, message{code: opList, fd: none})
	return names(m.text), err
}

// Close implements Store. Each call has its own connection, so that a keeper that was
// made anew is found.
func (c *Client) Close() error { return nil }

// call sends m on a new connection and gives the answer, whose file the caller owns.
func (c *Client) call(ctx context.Context, m message) (message, error) {
	if m.code != opList {
		if err := checkName(m.text); err != nil {
			return message{fd: none}, err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unixpacket", c.path)
	if err != nil {
		return message{fd: none}, fmt.Errorf("the keeper of %s cannot be reached: %w", c.path, err)
	}
	u := conn.(*net.UnixConn)
	defer u.Close()
	defer context.AfterFunc(ctx, func() { u.SetDeadline(time.Unix(1, 0)) })()
	if err := allowed(u); err != nil {
		return message{fd: none}, err
	}
	if err := send(u, m); err != nil {
		return message{fd: none}, fmt.Errorf("the keeper of %s does not take a call: %w", c.path, err)
	}
	a, err := receive(u)
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return message{fd: none}, fmt.Errorf("the keeper of %s does not answer: %w", c.path, err)
	}
	if err := a.check(m.text); err != nil {
		if a.fd != none {
			unix.Close(a.fd)
		}
		return message{fd: none}, err
	}
	return a, nil
}
