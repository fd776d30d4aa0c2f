package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// stackOf is how many layers an image has whose layers are mounted: as many as overlayfs was seen with in life.
	stackOf = 60
	// stackLayer is what a layer's files have in bytes: of each layer one of its eight files is read.
	stackLayer = 1 << 20
	// stackPull bounds the pull of one of these images, of which hardly anything is fetched.
	stackPull = 2 * time.Minute
	// servedWithin bounds a read that waits for the daemon.
	servedWithin = time.Minute
)

// stacks are images whose layers a machine has mounted before they are there, with a container's view of each.
type stacks struct {
	machine *candidate.Machine
	daemon  *daemon.Daemon
	roots   []string // one of each image
	layers  int      // of each image
}

// measureLayers mounts layers lazily, reads of each, leaves the daemon alone and restarts it: in order, by kill -9, and in order again.
func measureLayers(ctx context.Context, r *rig.Rig, images, layers int, l load) (res row, err error) {
	res = row{Layers: images * layers, OK: true}
	w, err := candidate.NewWorld(ctx, candidate.Options{Rig: r, Name: "stack", Nodes: 1})
	if err != nil {
		return res, err
	}
	m, err := w.Start(ctx, candidate.Quay{
		Lazy: true,
		// Never quiet enough for the rest of a layer.
		Config: fmt.Sprintf("[lazy]\nquiet = \"24h\"\n[metrics]\nlisten = %q\n", metricsAddress),
	}, 1)
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	s := &stacks{machine: m, daemon: m.Daemon(), layers: layers}
	for i := range images {
		closing, err := s.add(ctx, w, i)
		if err != nil {
			return res, err
		}
		defer func() { err = errors.Join(err, closing()) }()
	}
	// What the first containers read is asked of the decoders; the same is read again below without them.
	if err := s.readEach(0); err != nil {
		return res, err
	}
	c := &cluster{daemons: []*daemon.Daemon{s.daemon}}
	if err := c.rest(ctx, &res, l); err != nil {
		return res, err
	}
	helpers, err := s.helpers()
	if err != nil {
		return res, err
	}
	for _, pid := range helpers {
		n, err := bench.PSS(pid)
		if err != nil {
			return res, err
		}
		res.Helpers += float64(n) / 1e6
	}
	if err := s.allLazy(ctx, res.Layers); err != nil {
		fmt.Fprintf(os.Stderr, "%d layers: %v\n", res.Layers, err)
		res.OK = false
	}
	fmt.Fprintf(os.Stderr, "%d layers: %.0f MB, %d helpers with %.0f MB, %.2f %% of a CPU (machine %.0f %% busy)\n",
		res.Layers, res.RSS, len(helpers), res.Helpers, res.CPU, res.Before)
	for i, end := range []func() error{s.stop, s.kill, s.stop} {
		if err := s.restart(ctx, &res, end, 1+i); err != nil {
			return res, err
		}
	}
	if err := errors.Join(s.allLazy(ctx, res.Layers), s.readEach(image.FilesOfStack-1)); err != nil {
		fmt.Fprintf(os.Stderr, "%d layers after their daemon's restarts: %v\n", res.Layers, err)
		res.OK = false
	}
	return res, nil
}

// add publishes, pulls and mounts an image.
func (s *stacks) add(ctx context.Context, w *candidate.World, i int) (closing func() error, err error) {
	img, err := image.Stack(ctx, rig.ImageDir(), image.Gzip, s.layers, stackLayer, i)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("stack%d", i)
	ref, err := w.Push(ctx, img, name, "1")
	if err != nil {
		return nil, err
	}
	if err := w.Publish(ctx, name, "1"); err != nil {
		return nil, err
	}
	limited, cancel := context.WithTimeout(ctx, stackPull)
	defer cancel()
	if err := s.machine.Pull(limited, ref); err != nil {
		return nil, err
	}
	at, err := s.machine.Mount(limited, ref, name)
	if err != nil {
		return nil, err
	}
	s.roots = append(s.roots, at.Dir)
	return at.Close, nil
}

// readEach reads one file of every layer.
func (s *stacks) readEach(file int) error {
	for _, root := range s.roots {
		for i := range s.layers {
			if err := readStack(root, i, file); err != nil {
				return err
			}
		}
	}
	return nil
}

func readStack(root string, layer, file int) error {
	path := filepath.Join(root, image.StackFile(layer, file))
	b, err := os.ReadFile(path)
	if err == nil && len(b) != stackLayer/image.FilesOfStack {
		err = fmt.Errorf("%s has %d bytes", path, len(b))
	}
	return err
}

// allLazy checks that so many layers are mounted, none of which is complete. A daemon that was just started may still be taking
// them over.
func (s *stacks) allLazy(ctx context.Context, layers int) error {
	c, st, err := api.Dial(ctx, s.daemon.Socket)
	if err != nil {
		return err
	}
	defer c.Close()
	for end := time.Now().Add(servedWithin); st.Layers == nil || st.Layers.Mounts < layers; {
		if time.Now().After(end) {
			return fmt.Errorf("not %d layers are mounted: %+v", layers, st.Layers)
		}
		if err := bench.Wait(ctx, 50*time.Millisecond); err != nil {
			return err
		}
		if st, err = c.Status(ctx); err != nil {
			return err
		}
	}
	if l := st.Layers; l.Mounts != layers || l.Direct != 0 || l.Complete != 0 || l.ReadErrors != 0 {
		return fmt.Errorf("not %d layers mounted before they are there: %+v", layers, l)
	}
	return nil
}

// helpers are the daemon's other processes: what mounts for it is its child, the keeper has a socket in its folder.
func (s *stacks) helpers() (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	socket := filepath.Join(filepath.Dir(s.daemon.Root), "keeper.sock")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline") // of a process that has just ended: nothing
		status, _ := os.ReadFile("/proc/" + e.Name() + "/status")
		if strings.Contains(string(line), "\x00"+socket+"\x00") ||
			strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", s.daemon.Process.Pid())) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func (s *stacks) stop() error { return s.daemon.Process.Stop() }

func (s *stacks) kill() error { return s.daemon.Process.Kill9() }

// restart ends the daemon and starts it again while containers read what is not there: it serves when the last of them has it.
func (s *stacks) restart(ctx context.Context, res *row, end func() error, file int) error {
	begun := time.Now()
	if err := end(); err != nil {
		return err
	}
	read := make(chan error, len(s.roots))
	for i, root := range s.roots {
		go func() { read <- readStack(root, (i*7+file)%s.layers, file) }()
	}
	started := time.Now()
	if err := s.daemon.Start(ctx); err != nil {
		return err
	}
	res.Start = max(res.Start, time.Since(started).Seconds())
	limit := time.After(servedWithin)
	for range s.roots {
		select {
		case err := <-read:
			if err != nil {
				fmt.Fprintf(os.Stderr, "%d layers: a read during a restart: %v\n", res.Layers, err)
				res.OK = false
			}
		case <-limit:
			return fmt.Errorf("reads wait %s after the daemon's start", servedWithin)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	serving := time.Since(begun).Seconds()
	res.Serving = max(res.Serving, serving)
	if err := worst(&res.RSSStart, s.daemon, bench.RSS); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%d layers: served again after %.2f s, of which %.2f s were the end of the former daemon\n",
		res.Layers, serving, started.Sub(begun).Seconds())
	return nil
}
