// Command simulate lets up to ten thousand nodes fetch one blob at the same time, in one process and by a virtual clock. What
// decides who asks the registry for what, who is told of whom and when is the real thing: a cluster.Book for each keeper,
// cluster.Keepers, cluster.Pace and cluster.InTurn, and messages of their real size. What is simulated is the rest:
//
//   - time goes in steps of 50 ms, as often as a fetch looks around; a piece that came in one can be passed on in the next;
//   - links are shared evenly by the transfers on them, in each direction; there is nothing but the links of the nodes and
//     of the registry;
//   - a swarm is a window of the rarest pieces among the neighbours', one piece at a time from each, and at most 50 connections;
//   - a keeper answers one announcement after the other, at the speed of its link and of four cores; nodes give it up after 2 s;
//   - membership knows of a death after 5 s. Its own traffic is not counted: it is the same with and without a blob.
//
// Control bytes are announcements and answers with their framing, TLS handshakes, and what BitTorrent says besides the pieces.
//
// The table and build/bench/simulate.json have a row for each simulation, build/bench/simulate.svg shows them. QUICK=1 leaves
// ten thousand nodes out.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
)

const (
	mbit      = 1e6 / 8 // bytes a second
	blobSize  = 256 << 20
	pieceSize = 256 << 10 // of a blob of that size, see store.PieceSize
	linkSpeed = 200 * mbit
)

// What is asked of docker quay.
const (
	acceptCopies = 1.1 // cold
	// acceptCopiesHard is the same for nodes that die or lie.
	acceptCopiesHard = 1.3
	// acceptConns are those of the swarm; a keeper has its callers besides, see row.KeeperConns.
	acceptConns = maxConns
	// acceptControl bounds the control traffic of a node in bytes a second, at any number of nodes: 1 % of its link.
	acceptControl = linkSpeed / 100
)

// row is one simulation.
type row struct {
	Scenario   string  `json:"scenario"`
	Nodes      int     `json:"nodes"`
	OriginMbit int     `json:"origin_mbit"`
	Copies     float64 `json:"origin_copies"`
	Rounds     int     `json:"rounds"` // steps of 50 ms
	Ideal      float64 `json:"ideal_s"`
	Slowest    float64 `json:"slowest_s"` // of the nodes, each from its own start
	Ratio      float64 `json:"slowest_ratio"`
	Control    float64 `json:"control_bytes_per_node_s"` // sent and received, mean of the nodes
	Conns      int     `json:"max_connections"`          // of one node in the swarm
	// KeeperBytes is what the keeper sends and receives in its busiest second, KeeperConns how many nodes are connected to it
	// then, those that wait for it included.
	KeeperBytes float64 `json:"keeper_bytes_s"`
	KeeperConns int     `json:"keeper_connections"`
	OK          bool    `json:"ok"` // every node that lives and does not lie got the blob
}

func (r *row) accepted() bool {
	copies := acceptCopies
	if r.Scenario == "churn" || r.Scenario == "liars" {
		copies = acceptCopiesHard
	}
	return r.OK && r.Copies <= copies && r.Conns <= acceptConns && r.Control <= acceptControl
}

// crowd is the scenario that the others change something of: everybody starts within a tenth of a second.
func crowd(nodes, originMbit int) scenario {
	return scenario{
		name: "crowd", nodes: nodes, bytes: blobSize, piece: pieceSize, link: linkSpeed, origin: float64(originMbit) * mbit,
		over: 100 * time.Millisecond, seed: 1,
	}
}

func rolling(nodes int) scenario {
	s := crowd(nodes, 200)
	s.name, s.over = "rolling", 30*time.Second
	return s
}

func churn(nodes int) scenario {
	s := crowd(nodes, 200)
	s.name, s.dies = "churn", 0.1
	return s
}

func liars(nodes int) scenario {
	s := crowd(nodes, 200)
	s.name, s.liars = "liars", 0.01
	return s
}

func main() {
	only := flag.Int("nodes", 0, "only simulations of so many nodes")
	flag.Parse()
	if err := run(os.Stdout, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench-simulate:", err)
		os.Exit(1)
	}
}

// errNotMet says that something that is asked for was not reached; the report says in which row.
var errNotMet = errors.New("a simulation does not reach what is asked for")

func run(out io.Writer, only int) error {
	all := []scenario{crowd(10, 200), crowd(100, 200), crowd(1000, 200), crowd(1000, 2000), rolling(1000), churn(1000), liars(1000)}
	if !bench.Quick() {
		all = append(all, crowd(10000, 200), crowd(10000, 2000), rolling(10000), churn(10000), liars(10000))
	}
	report := bench.New[row]("simulate")
	var curves []curve
	var err error
	for _, s := range all {
		if only > 0 && s.nodes != only {
			continue
		}
		r, c, took := simulate(s)
		fmt.Fprintf(os.Stderr, "%s, %d nodes: %.3f copies, slowest %.1f s, simulated in %.1f s\n", r.Scenario, r.Nodes, r.Copies, r.Slowest, took.Seconds())
		report.Rows = append(report.Rows, r)
		curves = append(curves, c)
		if !r.accepted() {
			err = errors.Join(err, fmt.Errorf("%w: %s with %d nodes", errNotMet, r.Scenario, r.Nodes))
		}
	}
	if err := report.Table(out); err != nil {
		return err
	}
	if err := report.Save(); err != nil {
		return err
	}
	plot := filepath.Join(filepath.Dir(report.Path()), "simulate.svg")
	if err := os.WriteFile(plot, drawing(report.Rows, curves), 0o644); err != nil {
		return fmt.Errorf("write the plot: %w", err)
	}
	return err
}

// simulate runs one scenario.
func simulate(s scenario) (row, curve, time.Duration) {
	begun := time.Now()
	w := newWorld(s)
	err := w.run()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	r := w.result()
	out := row{
		Scenario: s.name, Nodes: s.nodes, OriginMbit: int(s.origin / mbit), Copies: r.copies, Rounds: r.rounds, Ideal: s.ideal(),
		Slowest: r.slowest, Ratio: r.ratio, Control: r.control, Conns: r.conns, KeeperBytes: r.keeperPeak, KeeperConns: r.calls, OK: err == nil,
	}
	return out, curve{s.name, s.nodes, out.OriginMbit, r.curve}, time.Since(begun)
}
