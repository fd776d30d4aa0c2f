package main

import (
	"context"
	"fmt"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

// scenario is what happens to the nodes while they pull.
type scenario struct {
	name   string
	nodes  int
	size   int64 // bytes of an image's one layer
	images int   // pulled at once by every node
	runs   int
	plain  bool // beside it, the same from the registry alone
	// disturb, when set, is told when the pulls begin and does what the scenario is about. It returns when there is nothing
	// left to do; its context ends with the run.
	disturb func(ctx context.Context, r *round) error
	// delay, when set, is how long after the start a node (counted from 1) is started and pulls: it was not there before.
	delay func(s *scenario, node int, ideal time.Duration) time.Duration
	// slow, when set, is a node with a tenth of the others' link.
	slow int
}

const (
	// slowShare is the part of the others' link that the slow node has.
	slowShare = 10
	// killShare: one of so many nodes is killed.
	killShare = 4
	// lateAt is when the late node comes, as a part of the ideal time.
	lateAt = 0.8
	// maxNodes is how many nodes one machine is asked to be.
	maxNodes = 16
)

// all are the scenarios in the order of the report.
func all() []scenario {
	const full = 256 * mib
	return []scenario{
		{name: "cold", nodes: 2, size: full, plain: true},
		{name: "cold", nodes: 4, size: full, plain: true},
		{name: "cold", nodes: 8, size: full, plain: true},
		{name: "cold", nodes: 16, size: full, plain: true},
		{name: "rolling", nodes: 8, size: full, delay: rolling},
		{name: "churn", nodes: 8, size: full, disturb: kill},
		// A quarter of the bytes: the slow node needs ten times as long as the others.
		{name: "slow-node", nodes: 8, size: full / 4, slow: 8},
		{name: "late", nodes: 8, size: full, delay: late},
		{name: "origin-gone", nodes: 8, size: full, disturb: stopOrigin},
		{name: "many-images", nodes: 8, size: 25 * mib, images: 10},
	}
}

// quick are the same in less than two minutes.
func quick() []scenario {
	const part = 48 * mib
	scenarios := []scenario{{name: "cold", nodes: 2, size: part, plain: true}}
	for _, s := range all() {
		if s.nodes == 8 {
			s.nodes, s.size = 4, part
			s.slow = min(s.slow, s.nodes)
			switch {
			case s.images > 1:
				s.size = 5 * mib
			case s.slow > 0:
				s.size = 16 * mib
			}
			scenarios = append(scenarios, s)
		}
	}
	return scenarios
}

// scenarios are those that the options ask for.
func (o options) scenarios() ([]scenario, error) {
	from, runs := all(), 3
	if bench.Quick() {
		from, runs = quick(), 1
	}
	if o.runs > 0 {
		runs = o.runs
	}
	if o.nodes != 0 && (o.nodes < 2 || o.nodes > maxNodes) {
		return nil, fmt.Errorf("-nodes %d is not between 2 and %d", o.nodes, maxNodes)
	}
	var chosen []scenario
	for _, s := range from {
		if o.only != "" && s.name != o.only {
			continue
		}
		if o.nodes != 0 {
			if len(chosen) > 0 && chosen[len(chosen)-1].name == s.name {
				continue
			}
			s.nodes = o.nodes
			s.slow = min(s.slow, s.nodes)
		}
		if o.mib > 0 {
			s.size = o.mib * mib
		}
		s.images = max(s.images, 1)
		s.runs = runs
		chosen = append(chosen, s)
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("there is no scenario %q", o.only)
	}
	return chosen, nil
}

func mostNodes(scenarios []scenario) (n int) {
	for _, s := range scenarios {
		n = max(n, s.nodes)
	}
	return n
}

// bytes is what every node gets.
func (s *scenario) bytes() int64 { return s.size * int64(s.images) }

// ideal is the least time in which n nodes can get size bytes from one origin, when each has an uplink and a downlink of
// rate and so does the origin, and one of them, when slow, a tenth of it.
func ideal(n int, size int64, rate rig.Rate, slow bool) time.Duration {
	f, u := float64(size), float64(rate.Bytes())
	down, up := u, u*float64(n)
	if slow {
		down, up = u/slowShare, u*(float64(n-1)+1./slowShare)
	}
	return seconds(max(f/u, f/down, float64(n)*f/(u+up)))
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// ideal is that of the scenario.
func (s *scenario) ideal(rate rig.Rate) time.Duration {
	return ideal(s.nodes, s.bytes(), rate, s.slow > 0)
}

// late has the last node come when the others are nearly done.
func late(s *scenario, node int, ideal time.Duration) time.Duration {
	if node < s.nodes {
		return 0
	}
	return time.Duration(lateAt * float64(ideal))
}

// rolling has one node after the other come, all within the ideal time of one: an update that goes through a cluster.
func rolling(s *scenario, node int, ideal time.Duration) time.Duration {
	return time.Duration(node-1) * ideal / time.Duration(s.nodes)
}

// kill ends a quarter of the nodes, the last ones, as a power cut would, at half of the ideal time.
func kill(ctx context.Context, r *round) error {
	if err := bench.Wait(ctx, r.ideal/2); err != nil {
		return err
	}
	for _, p := range r.pulls[len(r.pulls)-max(len(r.pulls)/killShare, 1):] {
		p.kill()
	}
	return nil
}

// stopOrigin stops the registry as soon as the nodes together have got one copy from it.
func stopOrigin(ctx context.Context, r *round) error {
	for {
		var got int64
		for _, p := range r.pulls {
			got += p.fromOrigin()
		}
		if got >= r.bytes() {
			return r.world.registry.Stop()
		}
		if err := bench.Wait(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}
