package candidate

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestMain(m *testing.M) {
	Init()
	m.Run()
}

const hello = "hello from busybox"

// TestCandidates has every candidate pull and run the same small program, over a link and without one.
func TestCandidates(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	for _, o := range []Options{{Nodes: 2, Rate: 400 * rig.Mbit, RoundTrip: 10 * time.Millisecond}, {}} {
		o.Rig = rig.ForTest(t)
		w, err := NewWorld(t.Context(), o)
		if errors.Is(err, rig.ErrNoNamespaces) || errors.Is(err, rig.ErrNoTool) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]Candidate{"overlayfs": Overlayfs(), "stargz": Stargz(), "quay": Quay{Lazy: true}, "eager": Quay{}} {
			t.Run(name, func(t *testing.T) { play(t, w, c, o.Nodes) })
		}
	}
}

func play(t *testing.T, w *World, c Candidate, nodes int) {
	ctx := t.Context()
	img, err := image.Busybox(ctx, rig.ImageDir(), c.Format())
	if err != nil {
		t.Fatal(err)
	}
	ref, err := w.Push(ctx, img, "busybox", c.Format().String())
	if err != nil {
		t.Fatal(err)
	}
	m, err := w.Start(ctx, c, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
		if left := processesUnder(m.dir); len(left) > 0 {
			t.Errorf("the machine left processes %v", left)
		}
	}()
	before, err := m.Received()
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.Pull(ctx, ref); err != nil {
			t.Fatal(err)
		}
		run, err := m.Run(ctx, ref, "hello", image.First{Line: hello})
		if err != nil {
			t.Fatal(err)
		}
		if err := run.Close(); err != nil {
			t.Error(err)
		}
		if err := m.Forget(ctx, ref); err != nil {
			t.Error(err)
		}
	}
	after, err := m.Received()
	if err != nil {
		t.Fatal(err)
	}
	if got := after - before; nodes > 0 && got < img.Size()/2 {
		t.Errorf("the link brought %d bytes of an image of %d", got, img.Size())
	}
}

// TestDelay: an answer takes a round trip, the first one two, and a stream is as quick as without distance.
func TestDelay(t *testing.T) {
	rig.RequireRoot(t)
	r := rig.ForTest(t)
	network, err := r.NewNetwork(rig.NetworkOptions{Nodes: 1})
	if errors.Is(err, rig.ErrNoNamespaces) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	node := network.Node(1)
	l, err := node.Listen("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	const roundTrip = 20 * time.Millisecond
	d, err := newDelay(node, l.Addr().String(), roundTrip)
	if err != nil {
		t.Fatal(err)
	}
	c, err := node.DialContext(t.Context(), "tcp", d.addr())
	if err != nil {
		t.Fatal(err)
	}
	echo := func(n int) time.Duration {
		begun := time.Now()
		go func() { _, _ = c.Write(make([]byte, n)) }()
		if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
			t.Fatal(err)
		}
		return time.Since(begun)
	}
	for i, want := range []time.Duration{2 * roundTrip, roundTrip, roundTrip} {
		if got := echo(1); got < want || got > want+50*time.Millisecond {
			t.Errorf("echo %d took %v, want %v", i, got, want)
		}
	}
	// 8 MiB both ways at 256 KiB in 10 ms are 0.33 s.
	if got := echo(8 << 20); got > 3*time.Second {
		t.Errorf("8 MiB took %v", got)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
	if err := d.close(); err != nil {
		t.Error(err)
	}
}
