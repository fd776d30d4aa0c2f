package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
)

// program is an image with something to wait for.
type program struct {
	name  string
	first image.First
	make  func(context.Context, image.Format) (*image.Image, error)
}

// The nodes of the world: candidates run on the first one, and a peer that has everything on the second.
const nodes, here, there = 2, 1, 2

// settle is what a peer is given, when it has all of an image, to compare it with its index and to note what is read of it first.
const settle = 20 * time.Second

// contestant is a candidate under the name that the report has for it.
type contestant struct {
	name string
	kind func(options) candidate.Candidate
	// second has a peer that ran the program before; ordered has none, but the index that such a node published.
	second, ordered bool
	// eager has all of the image when the pull ends.
	eager bool
	index bool // uses an index when there is one
}

var contestants = []contestant{
	{name: "overlayfs", kind: func(options) candidate.Candidate { return candidate.Overlayfs() }, eager: true},
	{name: "stargz", kind: func(options) candidate.Candidate { return candidate.Stargz() }},
	{name: "quay-first", kind: lazyQuay, index: true},
	{name: "quay-ordered", kind: lazyQuay, ordered: true, index: true},
	{name: "quay-second", kind: lazyQuay, second: true, index: true},
	{name: "quay-eager", kind: func(o options) candidate.Candidate { return candidate.Quay{Layers: o.layers, Config: o.config} }, eager: true},
}

func lazyQuay(o options) candidate.Candidate {
	return candidate.Quay{Lazy: true, Layers: o.layers, Config: o.config}
}

// contest is one program with all candidates.
type contest struct {
	world   *candidate.World
	program program
	options options
	images  map[image.Format]*image.Image
	refs    map[image.Format]string
	indexed bool
	peer    *candidate.Machine
	ordered string // the image in a repository of its own, with the index that the peer published; "" before that
}

// outcome is what one run of one candidate came to.
type outcome struct {
	pull, first, complete float64
	fetched               int64
	before                float64
}

// measure plays all rounds on one image.
func measure(ctx context.Context, w *candidate.World, p program, o options) (rows []row, err error) {
	c := &contest{world: w, program: p, options: o, images: map[image.Format]*image.Image{}, refs: map[image.Format]string{}}
	chosen := slices.DeleteFunc(slices.Clone(contestants), func(c contestant) bool {
		return len(o.only) > 0 && !slices.Contains(o.only, c.name)
	})
	for _, f := range []image.Format{image.Gzip, image.EStargz, o.layers} {
		if c.images[f] != nil {
			continue
		}
		if c.images[f], err = p.make(ctx, f); err != nil {
			return nil, err
		}
		if c.refs[f], err = w.Push(ctx, c.images[f], p.name, f.String()); err != nil {
			return nil, err
		}
	}
	touched, err := w.Touched(ctx, here, c.refs[image.Gzip], p.first)
	if err != nil {
		return nil, fmt.Errorf("find out what the program reads: %w", err)
	}
	if c.indexed, err = publish(ctx, w, p.name, o.layers); err != nil {
		return nil, err
	}
	defer func() {
		if c.peer != nil {
			err = errors.Join(err, c.peer.Close())
		}
	}()
	outcomes := make([][]outcome, len(chosen))
	failed := make([]bool, len(chosen))
	for i := range o.runs {
		for j, contestant := range chosen {
			out, err := c.play(ctx, contestant, i == o.runs-1)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				fmt.Fprintf(os.Stderr, "%s, %s: %v\n", p.name, contestant.name, err)
				failed[j] = true
				continue
			}
			fmt.Fprintf(os.Stderr, "%s, %s: pulled in %.2f s, first output after %.2f s and %.1f MB (machine %.0f %% busy before)\n",
				p.name, contestant.name, out.pull, out.first, float64(out.fetched)/1e6, out.before)
			outcomes[j] = append(outcomes[j], out)
		}
	}
	for j, contestant := range chosen {
		rows = append(rows, c.row(contestant, outcomes[j], touched, !failed[j]))
	}
	compare(rows)
	return rows, nil
}

// publish has the indexes of an image's layers published, and reports whether there are any: layers with a table of contents of their
// own need none.
func publish(ctx context.Context, w *candidate.World, name string, f image.Format) (bool, error) {
	if f == image.EStargz || f == image.ZstdChunked {
		return false, nil
	}
	err := w.Publish(ctx, name, f.String())
	if errors.Is(err, candidate.ErrNoIndexer) {
		fmt.Fprintf(os.Stderr, "%s: no index is published: %v\n", name, err)
		return false, nil
	}
	return err == nil, err
}

// play runs one candidate once, on a machine without anything.
func (c *contest) play(ctx context.Context, k contestant, watch bool) (out outcome, err error) {
	kind := k.kind(c.options)
	ref := c.refs[kind.Format()]
	var peers []*candidate.Machine
	if k.second {
		if err := c.holder(ctx, kind); err != nil {
			return out, err
		}
		peers = append(peers, c.peer)
	}
	if k.ordered {
		if ref, err = c.order(ctx, kind); err != nil {
			return out, err
		}
	}
	m, err := c.world.Start(ctx, kind, here, peers...)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if out.before, err = candidate.Calm(ctx); err != nil {
		return out, err
	}
	start, err := m.Received()
	if err != nil {
		return out, err
	}
	begun := time.Now()
	if err := m.Pull(ctx, ref); err != nil {
		return out, err
	}
	out.pull = time.Since(begun).Seconds()
	container, err := m.Run(ctx, ref, c.program.name, c.program.first)
	if err != nil {
		return out, err
	}
	out.first = time.Since(begun).Seconds()
	end, err := m.Received()
	out.fetched = end - start
	switch {
	case err != nil:
	case k.eager:
		out.complete = out.pull
	case watch:
		var at time.Time
		var got int64
		if at, got, err = m.Still(ctx); err == nil && got-start >= c.images[kind.Format()].Size() {
			out.complete = at.Sub(begun).Seconds()
		}
	}
	return out, errors.Join(err, container.Close())
}

// order sees to an image whose published index says what the program reads first.
func (c *contest) order(ctx context.Context, kind candidate.Candidate) (string, error) {
	if c.ordered != "" {
		return c.ordered, nil
	}
	if err := c.holder(ctx, kind); err != nil {
		return "", err
	}
	ref, err := c.world.Push(ctx, c.images[kind.Format()], c.program.name+"-ordered", kind.Format().String())
	if err != nil {
		return "", err
	}
	if err := c.peer.Publish(ctx, ref); err != nil {
		return "", err
	}
	c.ordered = ref
	return ref, nil
}

// holder sees to a peer that has run the program and has all of its image.
func (c *contest) holder(ctx context.Context, kind candidate.Candidate) (err error) {
	if c.peer != nil {
		return nil
	}
	m, err := c.world.Start(ctx, kind, there)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	ref := c.refs[kind.Format()]
	if err := m.Pull(ctx, ref); err != nil {
		return err
	}
	container, err := m.Run(ctx, ref, c.program.name, c.program.first)
	if err != nil {
		return err
	}
	_, _, err = m.Still(ctx)
	select {
	case <-time.After(settle):
	case <-ctx.Done():
	}
	if err := errors.Join(err, ctx.Err(), container.Close()); err != nil {
		return err
	}
	c.peer = m
	return nil
}

// row is the report's about one candidate.
func (c *contest) row(k contestant, outcomes []outcome, touched candidate.Touched, ok bool) row {
	format := k.kind(c.options).Format()
	img := c.images[format]
	r := row{
		Image: c.program.name, Layers: format.String(), Candidate: k.name, ImageBytes: img.Size(), Runs: len(outcomes),
		Link: fmt.Sprintf("%d Mbit/s + %d ms", c.options.mbit, c.options.roundTrip.Milliseconds()),
		Read: touched.Read, ReadPacked: int64(float64(touched.Read) / float64(touched.All) * float64(img.Size())),
		Index: k.index && c.indexed, OK: ok && len(outcomes) > 0,
	}
	var pull, first, fetched, before bench.Series
	for _, o := range outcomes {
		pull = append(pull, o.pull)
		first = append(first, o.first)
		fetched = append(fetched, float64(o.fetched))
		before = append(before, o.before)
		r.Complete = max(r.Complete, o.complete)
	}
	r.Pull, r.First, r.FirstMin, r.FirstMax = pull.Median(), first.Median(), first.Min(), first.Max()
	r.Fetched, r.Before = int64(fetched.Median()), before.Max()
	if k.eager {
		r.Complete = r.Pull
	}
	return r
}

// compare fills in the ratios of the rows of one image.
func compare(rows []row) {
	var overlayfs, stargz float64
	for _, r := range rows {
		switch {
		case !r.OK:
		case r.Candidate == "overlayfs":
			overlayfs = r.First
		case r.Candidate == "stargz":
			stargz = r.First
		}
	}
	for i := range rows {
		rows[i].ToOverlayfs, rows[i].ToStargz = 0, 0
		if overlayfs > 0 {
			rows[i].ToOverlayfs = rows[i].First / overlayfs
		}
		if stargz > 0 {
			rows[i].ToStargz = rows[i].First / stargz
		}
	}
}
