package rig_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// TestNetwork: links carry what they were made for in both directions, the registry is reached from nodes and from here,
// and a cut link is silent.
func TestNetwork(t *testing.T) {
	rig.RequireRoot(t)
	ctx := testContext(t)
	r := rig.ForTest(t)
	const rate = 100 * rig.Mbit
	w, err := r.NewNetwork(rig.NetworkOptions{Nodes: 2, Rate: rate})
	if errors.Is(err, rig.ErrNoNamespaces) {
		t.Skip(err)
	}
	need(t, err)

	t.Run("registry", func(t *testing.T) {
		g, err := r.StartRegistry(ctx, rig.RegistryOptions{Node: w.Registry()})
		need(t, err)
		i, err := image.Random(ctx, t.TempDir(), 1<<20, 1)
		if err != nil {
			t.Fatal(err)
		}
		push(ctx, t, g, i, "random", "1")
		g.ResetStats()
		client := &http.Client{Transport: &http.Transport{DialContext: w.Node(1).DialContext}, Timeout: 2 * time.Second}
		defer client.CloseIdleConnections()
		blob := g.URL() + "/v2/random/blobs/" + i.Layers[0].Digest.String()
		if a := get(ctx, t, client, blob, nil); a.err != nil || len(a.body) != 1<<20 {
			t.Errorf("node 1 got %d bytes, %v", len(a.body), a.err)
		}
		if got := g.Stats().BlobsTo[w.Node(1).Addr.String()]; got != 1<<20 {
			t.Errorf("%d bytes are counted for node 1", got)
		}
		client.CloseIdleConnections()
		if err := w.Block(w.Node(1), w.Registry()); err != nil {
			t.Fatal(err)
		}
		client.Timeout = 300 * time.Millisecond
		if a := get(ctx, t, client, blob, nil); !isTimeout(a.err) {
			t.Errorf("a blocked node sees %d, %v, not silence", a.status, a.err)
		}
		if err := w.Unblock(w.Node(1), w.Registry()); err != nil {
			t.Fatal(err)
		}
		client.Timeout = 5 * time.Second
		if a := get(ctx, t, client, blob, nil); a.err != nil || len(a.body) != 1<<20 {
			t.Errorf("unblocked, node 1 got %d bytes, %v", len(a.body), a.err)
		}
	})

	for _, c := range []struct{ from, to *rig.Node }{{w.Node(1), w.Node(2)}, {w.Node(2), w.Node(1)}, {w.Registry(), w.Node(1)}} {
		t.Run(c.from.Name+" to "+c.to.Name, func(t *testing.T) {
			before, err := c.to.Traffic()
			if err != nil {
				t.Fatal(err)
			}
			const size = 8 << 20
			took := send(ctx, t, c.from, c.to, size)
			after, err := c.to.Traffic()
			if err != nil {
				t.Fatal(err)
			}
			if received := after.Received - before.Received; received < size || received > size*11/10 {
				t.Errorf("the link counted %d bytes for %d", received, size)
			}
			// Bounds are loose: the first burst is free, and a busy machine is late.
			ideal := time.Duration(float64(size) / float64(rate.Bytes()) * float64(time.Second))
			if took < ideal*8/10 || took > 3*ideal {
				t.Errorf("%d bytes took %s at %d bit/s, ideally %s", size, took, rate, ideal)
			}
		})
	}

	t.Run("another rate", func(t *testing.T) {
		const slower, size = rate / 10, 2 << 20
		if err := w.Node(2).SetRate(slower); err != nil {
			t.Fatal(err)
		}
		ideal := time.Duration(float64(size) / float64(slower.Bytes()) * float64(time.Second))
		for _, c := range []struct{ from, to *rig.Node }{{w.Node(1), w.Node(2)}, {w.Node(2), w.Node(1)}} {
			if took := send(ctx, t, c.from, c.to, size); took < ideal*7/10 {
				t.Errorf("%s to %s: %d bytes took %s at %d bit/s, ideally %s", c.from.Name, c.to.Name, size, took, slower, ideal)
			}
		}
	})
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

// send times a stream of size bytes from one node to another.
func send(ctx context.Context, t *testing.T, from, to *rig.Node, size int64) time.Duration {
	t.Helper()
	l, err := from.Listen(net.JoinHostPort(from.Addr.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sent := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			sent <- err
			return
		}
		defer c.Close()
		buffer := make([]byte, 64<<10)
		for left := size; left > 0; left -= int64(len(buffer)) {
			if _, err := c.Write(buffer); err != nil {
				sent <- fmt.Errorf("with %d bytes left: %w", left, err)
				return
			}
		}
		sent <- nil
	}()
	begin := time.Now()
	c, err := to.DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(begin.Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, c)
	if err != nil || n != size {
		t.Fatalf("received %d of %d bytes: %v", n, size, err)
	}
	took := time.Since(begin)
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	return took
}
