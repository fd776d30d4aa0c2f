package candidate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/docker-quay/docker-quay/test/image"
)

const (
	// firstWithin bounds the time until a container's first useful output: the slowest candidate takes seconds.
	firstWithin = 2 * time.Minute
	// askEvery is how often a server in a container is asked whether it answers.
	askEvery = 5 * time.Millisecond
	// mostOutput is what is kept of a container's output, for messages.
	mostOutput = 64 << 10
)

// Container is a running container.
type Container struct {
	container containerd.Container
	task      containerd.Task
	output    *output
}

// Run starts a container of a pulled image, in the machine's network namespace, and returns at its first useful output.
func (m *Machine) Run(ctx context.Context, ref, name string, first image.First) (_ *Container, err error) {
	ctx, cancel := context.WithTimeout(ctx, firstWithin)
	defer cancel()
	img, err := m.client.GetImage(ctx, ref)
	if err != nil {
		return nil, err
	}
	id := m.containerd.ContainerID(name)
	c := &Container{output: &output{first: first.Line, found: make(chan struct{})}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("run %s on %s: %w\n%s", ref, m.name, err, c.output), c.Close())
		}
	}()
	c.container, err = m.client.NewContainer(ctx, id, containerd.WithImage(img), containerd.WithSnapshotter(m.snapshotter),
		containerd.WithNewSnapshot(id, img), containerd.WithNewSpec(oci.WithImageConfig(img), oci.WithHostNamespace(specs.NetworkNamespace)))
	if err != nil {
		return nil, err
	}
	streams := cio.NewCreator(cio.WithStreams(nil, c.output, c.output), cio.WithFIFODir(m.dir))
	if c.task, err = c.container.NewTask(ctx, streams); err != nil {
		return nil, err
	}
	ended, err := c.task.Wait(ctx)
	if err != nil {
		return nil, err
	}
	if err := c.task.Start(ctx); err != nil {
		return nil, err
	}
	found := c.output.found
	if first.Port != 0 {
		found = make(chan struct{})
		go m.ask(ctx, first, found)
	}
	select {
	case <-found:
		return c, nil
	case status := <-ended:
		// A program that says one thing and ends: the end may be known first.
		select {
		case <-found:
			return c, nil
		case <-time.After(time.Second):
			return nil, fmt.Errorf("it ended with code %d before its first useful output", status.ExitCode())
		}
	}
}

// ask asks a server in the machine's namespace until it gives the answer that counts.
func (m *Machine) ask(ctx context.Context, first image.First, found chan<- struct{}) {
	transport := &http.Transport{DialContext: m.node.DialContext, DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		if said, err := get(ctx, transport, fmt.Sprintf("http://127.0.0.1:%d/", first.Port)); err == nil && strings.Contains(said, first.Body) {
			close(found)
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func get(ctx context.Context, transport http.RoundTripper, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, mostOutput))
	return string(said), err
}

// Close ends the container and removes it.
func (c *Container) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeWithin)
	defer cancel()
	var errs []error
	if c.task != nil {
		if err := c.task.Kill(ctx, syscall.SIGKILL, containerd.WithKillAll); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
		if _, err := c.task.Delete(ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("end a container: %w", err))
		}
	}
	if c.container != nil {
		if err := c.container.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("remove a container: %w", err))
		}
	}
	return errors.Join(errs...)
}

// output is what a container writes. It looks for a line that begins with first.
type output struct {
	first string
	found chan struct{}

	mu   sync.Mutex // guards following
	text []byte
	seen bool
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p[:min(len(p), mostOutput-len(o.text))]...)
	if o.first != "" && !o.seen && bytes.Contains(append([]byte("\n"), o.text...), []byte("\n"+o.first)) {
		o.seen = true
		close(o.found)
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}
