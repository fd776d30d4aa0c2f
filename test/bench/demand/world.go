package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// link is how holder, reader and registry are connected; nil nodes are this process's namespace.
type link struct {
	name                     string
	holder, reader, registry *rig.Node
}

// world is a registry with an image of two layers, and a node that has it.
type world struct {
	rig      *rig.Rig
	link     link
	registry *rig.Registry
	holder   *daemon.Daemon
	image    *image.Image
	config   readerConfig // of every reader, but for the store and the load
	dir      string
	readers  int // so far
}

const (
	// settle is the time in which the machine is left alone before a reader starts.
	settle = time.Second
	// readerWithin bounds a reader. On a link of 200 Mbit/s it needs half a minute.
	readerWithin = 5 * time.Minute
)

func newWorld(ctx context.Context, r *rig.Rig, l link, size int64) (*world, error) {
	w := &world{rig: r, link: l}
	name := "l"
	if l.holder != nil {
		name = "s"
	}
	var err error
	if w.dir, err = r.Dir(name); err != nil {
		return nil, err
	}
	if w.registry, err = r.StartRegistry(ctx, rig.RegistryOptions{Node: l.registry}); err != nil {
		return nil, err
	}
	if w.image, err = image.Random(ctx, rig.ImageDir(), size, 2); err != nil {
		return nil, err
	}
	to := image.Target{URL: w.registry.URL(), Client: w.registry.Client()}
	if err := w.image.Push(ctx, to, "random", "1"); err != nil {
		return nil, err
	}
	secret := filepath.Join(w.dir, "secret")
	if err := trust.NewSecret().Save(secret); err != nil {
		return nil, err
	}
	w.holder, err = daemon.Start(ctx, daemon.Options{
		Rig: r, Name: "holder-" + name, Dir: filepath.Join(w.dir, "h"), Node: l.holder, Secret: secret, Registry: w.registry,
	})
	if err != nil {
		return nil, err
	}
	address, err := w.fill(ctx)
	if err != nil {
		return nil, err
	}
	w.config = readerConfig{
		Secret: secret, Peer: address, CertsDir: w.holder.CertsDir, Ref: w.registry.Ref("random:1"), Listen: "127.0.0.1",
		Layer: w.image.Layers[0], File: w.image.Path(w.image.Layers[0].Digest),
	}
	if l.reader != nil {
		w.config.Listen = l.reader.Addr.String()
	}
	return w, nil
}

// fill has the holder get the image, and returns where it listens for others.
func (w *world) fill(ctx context.Context) (address string, err error) {
	client, st, err := api.Dial(ctx, w.holder.Socket)
	if err != nil {
		return "", err
	}
	defer client.Close()
	s, err := client.Image(ctx, api.ImageRequest{Ref: w.registry.Ref("random:1")})
	if err != nil {
		return "", err
	}
	return st.Addr, errors.Join(s.Fetch(ctx), s.Close())
}

// measure runs a reader with a load as often as told.
func (w *world) measure(ctx context.Context, l load, runs int) (row, error) {
	var all, first, bulk, fromPeer, before bench.Series
	ok := true
	for i := range runs {
		idle, err := bench.MachineNow()
		if err != nil {
			return row{}, err
		}
		if err := bench.Wait(ctx, settle); err != nil {
			return row{}, err
		}
		now, err := bench.MachineNow()
		if err != nil {
			return row{}, err
		}
		before = append(before, now.Busy(idle))
		res, err := w.read(ctx, l)
		if err != nil {
			return row{}, err
		}
		fmt.Fprintf(os.Stderr, "%s, %s %s, run %d of %d: %d reads, p50 %.2f ms, p99 %.2f ms, first %.1f ms (machine %.0f %% busy before)\n",
			w.link.name, l.name, l.bulkOf, i+1, runs, len(res.Reads), res.Reads.Median(), res.Reads.Quantile(0.99), res.First, before[i])
		if res.Failure != "" {
			fmt.Fprintln(os.Stderr, res.Failure)
			ok = false
		}
		all = append(all, res.Reads...)
		first = append(first, res.First)
		bulk = append(bulk, res.BulkRate)
		fromPeer = append(fromPeer, res.FromPeer)
	}
	return row{
		Link: w.link.name, Load: l.name, BulkOf: l.bulkOf, Runs: runs, Reads: len(all),
		P50: all.Median(), P99: all.Quantile(0.99), Max: all.Max(), First: first.Median(),
		Bulk: bulk.Median(), FromPeer: fromPeer.Median(), Before: before.Max(), OK: ok && len(all) > 0,
	}, nil
}

// read runs one reader, with an empty store, to its end.
func (w *world) read(ctx context.Context, l load) (res result, err error) {
	ctx, cancel := context.WithTimeout(ctx, readerWithin)
	defer cancel()
	w.readers++
	c := w.config
	c.Store = filepath.Join(w.dir, fmt.Sprintf("r%d", w.readers))
	defer func() { err = errors.Join(err, os.RemoveAll(c.Store)) }()
	switch l.bulkOf {
	case "other":
		c.Bulk = &w.image.Layers[1]
	case "same":
		c.Bulk = &c.Layer
	}
	raw, err := json.Marshal(c)
	if err != nil {
		return res, err
	}
	self, err := os.Executable()
	if err != nil {
		return res, err
	}
	// What the reader keeps of the layer, and of the other one.
	if err := bench.TouchMemory(2 * c.Layer.Size); err != nil {
		return res, err
	}
	var out bytes.Buffer
	p, err := w.rig.Start(ctx, rig.Command{
		Name: fmt.Sprintf("reader-%s-%d", filepath.Base(w.dir), w.readers), Path: self,
		Args: []string{readerArgument, string(raw)}, Node: w.link.reader, Stdout: &out,
	})
	if err != nil {
		return res, err
	}
	if err := p.Wait(ctx); err != nil {
		return res, errors.Join(fmt.Errorf("the reader: %w\n%s", err, p.Tail(5)), p.Stop())
	}
	if err := json.Unmarshal(out.Bytes(), &res); err != nil {
		return res, fmt.Errorf("the reader's answer: %w", err)
	}
	return res, nil
}

func (w *world) close() error { return errors.Join(w.holder.Process.Stop(), w.registry.Stop()) }
