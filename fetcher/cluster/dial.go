package cluster

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"
)

// idleLook is how often it is looked for connections that idle while somebody
// waits for a place.
const idleLook = 20 * time.Millisecond

// dialer makes the connections to members, and bounds how many there are: when all
// places are taken it closes those that are idle, and then waits for one.
type dialer struct {
	net    net.Dialer
	places chan struct{} // nil: no bound
	idle   func()        // closes idle connections

	mu   sync.Mutex // guards following
	open int
}

func newDialer(most int) *dialer {
	d := &dialer{net: net.Dialer{Timeout: dialTimeout}}
	if most > 0 {
		d.places = make(chan struct{}, most)
	}
	return d
}

// dial is for http.Transport.
func (d *dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if err := d.enter(ctx); err != nil {
		return nil, fmt.Errorf("dialling %s: %w", addr, err)
	}
	c, err := d.net.DialContext(ctx, network, addr)
	if err != nil {
		d.leave()
		return nil, err
	}
	return &placed{Conn: c, leave: sync.OnceFunc(d.leave)}, nil
}

func (d *dialer) enter(ctx context.Context) error {
	if d.places != nil {
		select {
		case d.places <- struct{}{}:
		default:
			if err := d.wait(ctx); err != nil {
				return err
			}
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open++
	return nil
}

// wait takes a place that becomes free, of a connection that ends or idles.
func (d *dialer) wait(ctx context.Context) error {
	// The transport dials on behalf of whoever asks first, and goes on when that
	// one has gone: so a deadline of its own.
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	look := time.NewTicker(idleLook)
	defer look.Stop()
	for {
		d.idle()
		select {
		case d.places <- struct{}{}:
			return nil
		case <-look.C:
		case <-ctx.Done():
			return fmt.Errorf("%d connections to members are open and busy, more are not allowed: %w", cap(d.places), ctx.Err())
		}
	}
}

func (d *dialer) leave() {
	d.mu.Lock()
	d.open--
	d.mu.Unlock()
	if d.places != nil {
		<-d.places
	}
}

// placed is a connection that has a place.
type placed struct {
	net.Conn
	leave func()
}

func (c *placed) Close() error {
	defer c.leave()
	return c.Conn.Close()
}

// Connections returns how many connections to members are open.
func (c *Cluster) Connections() int {
	c.dialer.mu.Lock()
	defer c.dialer.mu.Unlock()
	return c.dialer.open
}
