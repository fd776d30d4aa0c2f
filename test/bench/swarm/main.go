// Command swarm measures how fast cold nodes get the same image, all at once, from one registry and from each other. A node is
// a network namespace with a shaped link and a node daemon; the registry has a namespace and a link of the same speed.
// The candidates, in turns in the same run:
//
//	quay   every node's daemon is asked for the image, over its API
//	plain  every node gets the blob from the registry by one HTTP GET, as any other client would
//
// The ideal time is what no distribution can beat, max(F/u_origin, F/d, N·F/(u_origin+Σu)): the registry has to send the F bytes
// once, every node has to receive them, and all that is received has to be sent by somebody. Links carry headers as well,
// 4.5 % of a full Ethernet frame, so that 1.05 times the ideal is the best that TCP can do.
//
// Stores are on tmpfs: a test machine has one disk for all the nodes that in life have one each. All nodes share its CPUs as
// well; busy_percent says when those, and not the network, were what limited a run.
//
// The table and build/bench/swarm.json have the medians. QUICK=1 takes smaller blobs and fewer nodes.
package main

import (
	"context"
	"errors"
	"flag"
	"os"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	mib = 1 << 20
	gib = 1 << 30
	// limit bounds the whole benchmark; all scenarios take some twenty minutes.
	limit = time.Hour
)

func main() {
	var o options
	flag.StringVar(&o.only, "only", "", "this `scenario` alone: cold, rolling, churn, slow-node, late, origin-gone, many-images")
	flag.IntVar(&o.nodes, "nodes", 0, "only with so many nodes, 2 to 16")
	flag.IntVar(&o.runs, "runs", 0, "runs of each scenario (default: 3, with QUICK=1 one)")
	flag.Int64Var(&o.mib, "mib", 0, "`MiB` of every image instead of the scenario's own")
	flag.IntVar(&o.mbit, "mbit", 200, "speed of every link in Mbit/s, in each direction")
	flag.BoolVar(&o.noPlain, "no-plain", false, "leave the candidate plain out")
	flag.BoolVar(&o.logs, "logs", false, "have the daemons log everything; "+rig.KeepVariable+"=1 in the environment keeps the logs")
	flag.Parse()
	bench.Main("bench-swarm", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	only        string
	nodes, runs int
	mib         int64
	mbit        int
	noPlain     bool
	logs        bool
}

// errIncomplete says that a node did not get what it should have; the report says in which row.
var errIncomplete = errors.New("a node did not get the image; see the rows that are not ok, and the messages above")

func run(ctx context.Context, o options) (err error) {
	chosen, err := o.scenarios()
	if err != nil {
		return err
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	w, err := newWorld(ctx, r, mostNodes(chosen), rig.Rate(o.mbit)*rig.Mbit)
	if err != nil {
		return err
	}
	w.logs = o.logs
	report := bench.New[row]("swarm")
	for _, s := range chosen {
		rows, err := w.measure(ctx, s, !o.noPlain)
		if err != nil {
			return err
		}
		report.Rows = append(report.Rows, rows...)
	}
	if err := report.Table(os.Stdout); err != nil {
		return err
	}
	if !verdict(os.Stdout, report.Rows) {
		err = errIncomplete
	}
	return errors.Join(report.Save(), err)
}
