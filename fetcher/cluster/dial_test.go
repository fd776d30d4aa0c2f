package cluster

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestDialerIsBounded: beyond the bound a dial closes what idles, else waits for a place, and gives up in the end.
func TestDialerIsBounded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
		}
	})
	defer wg.Wait()
	defer l.Close()
	d := newDialer(2)
	var idle net.Conn
	var mu sync.Mutex
	d.idle = func() {
		mu.Lock()
		defer mu.Unlock()
		if idle != nil {
			idle.Close()
		}
	}
	dial := func(ctx context.Context) (net.Conn, error) { return d.dial(ctx, "tcp", l.Addr().String()) }
	a, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	b, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := dial(ctx); err == nil || !strings.Contains(err.Error(), "2 connections to members are open and busy") {
		t.Errorf("a third: %v", err)
	}
	mu.Lock()
	idle = a
	mu.Unlock()
	c, err := dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a.Close() // again: its place is not given back twice
	if d.open != 2 || len(d.places) != 2 {
		t.Errorf("%d open, %d places taken", d.open, len(d.places))
	}
	c.Close()
	if d.open != 1 || len(d.places) != 1 {
		t.Errorf("at last %d open, %d places taken", d.open, len(d.places))
	}
	if _, err := d.dial(t.Context(), "tcp", "127.0.0.1:1"); err == nil {
		t.Error("nobody is there")
	}
	if d.open != 1 {
		t.Error("a failed dial keeps its place")
	}
}
