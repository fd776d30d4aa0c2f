package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// pullWithin bounds the pull of one image, which takes a few seconds: a layer that hangs must not hang the benchmark.
const pullWithin = time.Minute

// metricsAddress is where each daemon tells its metrics, in its own namespace.
const metricsAddress = "127.0.0.1:6882"

// cluster is the daemons of one load.
type cluster struct {
	daemons []*daemon.Daemon
	refs    []string
}

// load is what the nodes have, and for how long they are left alone with it.
type load struct {
	blobs, number int
	// settle is before the daemons are watched, rest how long they are.
	settle, rest time.Duration
}

// measure plays one load: start, pull, rest, restart.
func measure(ctx context.Context, r *rig.Rig, network *rig.Network, registry *rig.Registry, l load) (res row, err error) {
	res = row{Blobs: l.blobs, OK: true}
	c := &cluster{}
	if c.refs, err = push(ctx, registry, l.blobs/layersOf); err != nil {
		return res, err
	}
	dir, err := r.Dir(fmt.Sprint(l.number))
	if err != nil {
		return res, err
	}
	secret := filepath.Join(dir, "secret")
	if err := trust.NewSecret().Save(secret); err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, c.stop(), os.RemoveAll(dir)) }()
	// One after the other: each start is measured alone.
	for _, n := range network.Nodes() {
		begun := time.Now()
		d, err := daemon.Start(ctx, daemon.Options{
			Rig: r, Name: fmt.Sprintf("quay-%d-%s", l.number, n.Name), Dir: filepath.Join(dir, n.Name), Node: n, Secret: secret,
			Peers: network.Nodes()[:1], Registry: registry, Config: fmt.Sprintf("[metrics]\nlisten = %q\n", metricsAddress),
		})
		if err != nil {
			return res, err
		}
		res.Start = max(res.Start, time.Since(begun).Seconds())
		c.daemons = append(c.daemons, d)
		if err := worst(&res.RSSStart, d, bench.RSS); err != nil {
			return res, err
		}
	}
	if err := daemon.Joined(ctx, c.daemons...); err != nil {
		return res, err
	}
	if err := c.pullAll(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "%d blobs: %v\n", l.blobs, err)
		res.OK = false
	}
	if err := c.rest(ctx, &res, l); err != nil {
		return res, err
	}
	fmt.Fprintf(os.Stderr, "%d blobs: %.0f MB, %.2f %% of a CPU, %d goroutines, %d files (machine %.0f %% busy)\n",
		l.blobs, res.RSS, res.CPU, res.Goroutines, res.FDs, res.Before)
	return res, c.restart(ctx, &res)
}

// push puts images of layersOf layers each into the registry and returns their references.
func push(ctx context.Context, registry *rig.Registry, images int) ([]string, error) {
	var refs []string
	for i := range images {
		// Another size for each image: random ones of the same size are the same.
		img, err := image.Random(ctx, rig.ImageDir(), layerSize+int64(i)*512, layersOf)
		if err != nil {
			return nil, err
		}
		name := fmt.Sprintf("many%d", i)
		if err := img.Push(ctx, image.Target{URL: registry.URL(), Client: registry.Client()}, name, "1"); err != nil {
			return nil, err
		}
		refs = append(refs, registry.Ref(name+":1"))
	}
	return refs, nil
}

// pullAll has all nodes pull all images, one image after the other.
func (c *cluster) pullAll(ctx context.Context) error {
	var g errgroup.Group
	for _, d := range c.daemons {
		g.Go(func() error {
			for _, ref := range c.refs {
				if err := pull(ctx, d, ref); err != nil {
					return fmt.Errorf("%s: %w", d.Name, err)
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// pull has a node get an image and checks that it says so of every layer.
func pull(ctx context.Context, d *daemon.Daemon, ref string) error {
	limited, cancel := context.WithTimeout(ctx, pullWithin)
	defer cancel()
	client, _, err := api.Dial(limited, d.Socket)
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := client.Image(limited, api.ImageRequest{Ref: ref})
	if err != nil {
		return err
	}
	err = s.Fetch(limited)
	for _, p := range s.Progress() {
		if p.State != fetcher.Complete {
			err = errors.Join(err, fmt.Errorf("%s of %s is %s, %d of %d bytes, %d peers: %s", p.Digest, ref, p.State, p.Have, p.Size, p.Peers, p.Note))
		}
	}
	return errors.Join(err, s.Close())
}

// rest leaves the daemons alone and looks at what they cost meanwhile.
func (c *cluster) rest(ctx context.Context, res *row, l load) error {
	if err := bench.Wait(ctx, l.settle); err != nil {
		return err
	}
	before := make([]time.Duration, len(c.daemons))
	for i, d := range c.daemons {
		var err error
		if before[i], err = bench.CPUTime(d.Process.Pid()); err != nil {
			return err
		}
	}
	idle, err := bench.MachineNow()
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := bench.Wait(ctx, l.rest); err != nil {
		return err
	}
	for i, d := range c.daemons {
		after, err := bench.CPUTime(d.Process.Pid())
		if err != nil {
			return err
		}
		res.CPU = max(res.CPU, 100*(after-before[i]).Seconds()/time.Since(begun).Seconds())
	}
	now, err := bench.MachineNow()
	if err != nil {
		return err
	}
	res.Before = now.Busy(idle)
	for _, d := range c.daemons {
		goroutines, err := metric(ctx, d.Node, "go_goroutines")
		if err != nil {
			return err
		}
		res.Goroutines = max(res.Goroutines, goroutines)
		fds, err := bench.FDs(d.Process.Pid())
		if err != nil {
			return err
		}
		res.FDs = max(res.FDs, fds)
		if err := errors.Join(worst(&res.RSS, d, bench.RSS), worst(&res.RSSPeak, d, bench.PeakRSS)); err != nil {
			return err
		}
	}
	return nil
}

// worst raises a figure in 10^6 bytes to what a daemon's is.
func worst(figure *float64, d *daemon.Daemon, of func(pid int) (int64, error)) error {
	n, err := of(d.Process.Pid())
	*figure = max(*figure, float64(n)/1e6)
	return err
}

// restart ends the daemons, one after the other, starts them again and has them serve what they have.
func (c *cluster) restart(ctx context.Context, res *row) error {
	if len(c.refs) > 0 {
		res.Start, res.RSSStart = 0, 0
	}
	for _, d := range c.daemons {
		begun := time.Now()
		if err := d.Process.Stop(); err != nil {
			return err
		}
		started := time.Now()
		if err := d.Start(ctx); err != nil {
			return err
		}
		if len(c.refs) > 0 {
			res.Start = max(res.Start, time.Since(started).Seconds())
			if err := worst(&res.RSSStart, d, bench.RSS); err != nil {
				return err
			}
			if err := pull(ctx, d, c.refs[0]); err != nil {
				fmt.Fprintf(os.Stderr, "%s after its restart: %v\n", d.Name, err)
				res.OK = false
			}
		}
		res.Serving = max(res.Serving, time.Since(begun).Seconds())
	}
	return nil
}

func (c *cluster) stop() error {
	var g errgroup.Group
	for _, d := range c.daemons {
		g.Go(func() error { return d.Process.Stop() })
	}
	return g.Wait()
}

// metric is the value of one of a daemon's metrics.
func metric(ctx context.Context, n *rig.Node, name string) (int, error) {
	transport := &http.Transport{DialContext: n.DialContext}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+metricsAddress+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if value, ok := strings.CutPrefix(lines.Text(), name+" "); ok {
			return strconv.Atoi(value)
		}
	}
	return 0, errors.Join(fmt.Errorf("%s tells no metric %s: %s", n.Name, name, resp.Status), lines.Err())
}
