package candidate

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// parcelSize and parcels bound what is under way in each direction of a connection: 256 KiB, which is what a link of 200 Mbit/s
	// carries in 10 ms. With more, a bulk transfer would queue here and not where the link is shaped.
	parcelSize = 32 << 10
	parcels    = 8
)

// delay is the distance to a registry: a TCP proxy on the registry's node that passes on what it gets half a round trip later, in
// each direction. It stands for a network scheduler, which not every kernel has.
type delay struct {
	listener  net.Listener
	node      *rig.Node
	target    string
	roundTrip time.Duration
	ctx       context.Context
	stop      context.CancelFunc
	running   sync.WaitGroup
}

func newDelay(node *rig.Node, target string, roundTrip time.Duration) (*delay, error) {
	l, err := node.Listen(net.JoinHostPort(node.Addr.String(), "0"))
	if err != nil {
		return nil, err
	}
	d := &delay{listener: l, node: node, target: target, roundTrip: roundTrip}
	d.ctx, d.stop = context.WithCancel(context.Background())
	d.running.Go(d.accept)
	return d, nil
}

func (d *delay) addr() string { return d.listener.Addr().String() }

func (d *delay) close() error {
	d.stop()
	err := d.listener.Close()
	d.running.Wait()
	return err
}

func (d *delay) accept() {
	for {
		c, err := d.listener.Accept()
		if err != nil {
			return // closed
		}
		d.running.Go(func() { d.serve(c) })
	}
}

func (d *delay) serve(client net.Conn) {
	defer client.Close()
	server, err := d.node.DialContext(d.ctx, "tcp", d.target)
	if err != nil {
		return // the client sees its connection end
	}
	defer server.Close()
	defer context.AfterFunc(d.ctx, func() { _ = errors.Join(client.Close(), server.Close()) })()
	var both sync.WaitGroup
	// The client's kernel made the connection with ours, at once: the handshake's round trip is paid by the first bytes.
	both.Go(func() { d.carry(server, client, d.roundTrip) })
	both.Go(func() { d.carry(client, server, 0) })
	both.Wait()
}

// parcel is what one read got, and when it may go on.
type parcel struct {
	at   time.Time
	data []byte
}

// carry passes on what from sends, the first of it later still.
func (d *delay) carry(to, from net.Conn, first time.Duration) {
	queue := make(chan parcel, parcels)
	free := make(chan []byte, parcels+1)
	go func() {
		defer close(queue)
		for {
			var buf []byte
			select {
			case buf = <-free:
			default:
				buf = make([]byte, parcelSize)
			}
			n, err := from.Read(buf[:parcelSize])
			if n > 0 {
				queue <- parcel{time.Now().Add(d.roundTrip/2 + first), buf[:n]}
				first = 0
			}
			if err != nil {
				return
			}
		}
	}()
	var err error
	for p := range queue {
		if err == nil {
			time.Sleep(time.Until(p.at))
			_, err = to.Write(p.data)
		}
		if err != nil {
			// The rest is read and dropped until the reader sees the end, too.
			_ = from.Close()
			continue
		}
		select {
		case free <- p.data:
		default:
		}
	}
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		_ = half.CloseWrite()
	}
}
