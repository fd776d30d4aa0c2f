package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// settle is how long the daemons are left alone after they have found each other; what the machine does meanwhile is in
	// the report.
	settle = time.Second
	// patience is how long a node may take, in ideal times and more.
	patience, more = 4, 30 * time.Second
)

// round is one run of a scenario with docker quay.
type round struct {
	world    *world
	scenario *scenario
	ideal    time.Duration
	blobs    []blob
	dir      string
	peers    []*rig.Node
	pulls    []*pull
}

// outcome is what one run of one candidate came to.
type outcome struct {
	took    []time.Duration // of the nodes that got everything, by node
	rest    []time.Duration // of those of them that nothing was done to
	copies  float64         // of the images that the registry sent
	waste   float64
	cpu     float64 // seconds of the daemons for each GiB received; 0 for plain
	busy    float64 // percent of the machine while they pulled
	before  float64 // percent of the machine in the second before
	failure error
}

// play runs a scenario once. An outcome's failure is the program's, an error the world's.
func (w *world) play(ctx context.Context, s *scenario, blobs []blob) (_ outcome, err error) {
	w.rounds++
	r := &round{world: w, scenario: s, ideal: s.ideal(w.rate), blobs: blobs, dir: filepath.Join(w.stores, fmt.Sprint(w.rounds))}
	r.peers = w.network.Nodes()[:1]
	defer func() { err = errors.Join(err, r.end(ctx)) }()
	if s.slow > 0 {
		if err := w.network.Node(s.slow).SetRate(w.rate / slowShare); err != nil {
			return outcome{}, err
		}
	}
	for i := 1; i <= s.nodes; i++ {
		p := &pull{round: r, number: i, node: w.network.Node(i)}
		if s.delay != nil {
			p.delay = s.delay(s, i, r.ideal)
		}
		r.pulls = append(r.pulls, p)
	}
	if err := r.startDaemons(ctx); err != nil {
		return outcome{}, err
	}
	if err := bench.TouchMemory(r.bytes() * int64(len(r.pulls))); err != nil {
		return outcome{}, err
	}
	out := outcome{}
	idle, err := bench.MachineNow()
	if err != nil {
		return out, err
	}
	if err := bench.Wait(ctx, settle); err != nil {
		return out, err
	}
	start, err := r.meter()
	if err != nil {
		return out, err
	}
	out.before = start.machine.Busy(idle)
	w.registry.ResetStats()
	r.pull(ctx)
	end, err := r.meter()
	if err != nil {
		return out, err
	}
	out.busy = end.machine.Busy(start.machine)
	out.copies = float64(w.registry.Stats().Blobs) / float64(r.bytes())
	r.judge(&out, start, end)
	return out, nil
}

// startDaemons starts those that are there from the start, and waits until they know each other.
func (r *round) startDaemons(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	var there []*pull
	for _, p := range r.pulls {
		if p.delay == 0 {
			there = append(there, p)
			g.Go(func() error { return p.start(gctx) })
		}
	}
	if err := g.Wait(); err != nil {
		return err
	}
	var daemons []*daemon.Daemon
	for _, p := range there {
		daemons = append(daemons, p.daemon)
	}
	return daemon.Joined(ctx, daemons...)
}

// pull has all nodes pull and returns when the last one has ended.
func (r *round) pull(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience*r.ideal+more)
	defer cancel()
	var disturbed errgroup.Group
	dctx, stop := context.WithCancel(ctx)
	if r.scenario.disturb != nil {
		disturbed.Go(func() error { return r.scenario.disturb(dctx, r) })
	}
	var g errgroup.Group
	for _, p := range r.pulls {
		g.Go(func() error {
			p.run(ctx)
			return nil
		})
	}
	_ = g.Wait()
	stop()
	if err := disturbed.Wait(); err != nil {
		err = fmt.Errorf("the nodes were done before the scenario %s was: %w", r.scenario.name, err)
		r.pulls[0].err = errors.Join(r.pulls[0].err, err)
	}
}

func (r *round) bytes() (n int64) {
	for _, b := range r.blobs {
		n += b.size
	}
	return n
}

// meters are what is read before and after.
type meters struct {
	machine bench.Machine
	cpu     []time.Duration // by node; of a killed one what it had used then
	traffic []rig.Traffic   // by node
}

func (r *round) meter() (m meters, err error) {
	for _, p := range r.pulls {
		t, err := p.node.Traffic()
		if err != nil {
			return m, err
		}
		cpu := p.cpu
		if p.daemon != nil && !p.killed.Load() {
			if cpu, err = bench.CPUTime(p.daemon.Process.Pid()); err != nil {
				// It ended by itself, which its pull says better.
				cpu = p.cpu
			}
		}
		m.traffic = append(m.traffic, t)
		m.cpu = append(m.cpu, cpu)
	}
	m.machine, err = bench.MachineNow()
	return m, err
}

// judge fills in what came of it.
func (r *round) judge(out *outcome, start, end meters) {
	var received, wanted, extra int64
	var cpu time.Duration
	var errs []error
	for i, p := range r.pulls {
		got := end.traffic[i].Received - start.traffic[i].Received
		received += got
		cpu += end.cpu[i] - start.cpu[i]
		if p.killed.Load() {
			continue
		}
		wanted += r.bytes()
		extra += got - r.bytes()
		err := p.err
		if err == nil {
			err = p.verify()
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("node %d: %w\n%s", p.number, err, p.state()))
			continue
		}
		out.took = append(out.took, p.took)
		if p.delay == 0 && p.number != r.scenario.slow {
			out.rest = append(out.rest, p.took)
		}
	}
	out.waste = float64(extra) / float64(wanted)
	out.cpu = cpu.Seconds() * gib / float64(received)
	out.failure = errors.Join(errs...)
}

// end takes the round down.
func (r *round) end(ctx context.Context) error {
	var g errgroup.Group
	for _, p := range r.pulls {
		g.Go(p.stop)
	}
	errs := []error{g.Wait(), rig.Sweep(r.dir)}
	if s := r.scenario; s.slow > 0 {
		errs = append(errs, r.world.network.Node(s.slow).SetRate(r.world.rate))
	}
	if r.scenario.disturb != nil {
		errs = append(errs, r.world.restore(ctx))
	}
	return errors.Join(errs...)
}
