// Command node measures what a node daemon costs that has much and nothing to do. With blobs: three nodes in network namespaces, each
// with the same images of small layers, pulled by all of them from a registry and from each other. With layers: one node with a
// containerd that pulled images of 60 plain gzip layers with published indexes, all mounted before they are there and an
// image's mounted as for a container; one file of each layer was read.
//
// rss_mb, idle_cpu_percent, goroutines and fds are those of a daemon that has pulled the images and seeds them. Then it is
// restarted: start_s is from the start of the process until its API answers, restart_to_serving_s from the signal that ends the
// old one until the new one has served a known image; with layers until it has answered reads of missing bytes of every image, that
// began while there was no daemon, and the worst of two orderly restarts and a kill -9. helpers_pss_mb is the memory of its other
// processes, the mounter and the keeper, which are the same program. Each figure is the worst of the nodes.
//
// The table and build/bench/node.json have the figures. QUICK=1 takes fewer blobs and a shorter rest.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// limit bounds the whole benchmark, which takes a few minutes.
	limit = 30 * time.Minute
	// nodes is enough for each to have peers, and for peers of a peer.
	nodes = 3
	// layerSize is that of each blob: what they cost while nothing happens does not depend on it.
	layerSize = 64 << 10
	// layersOf is how many layers an image has, about the most that one has in life.
	layersOf = 100
	// afterPull is how long the daemons are left alone before the rest is measured: connections of the pull end and memory
	// that it needed goes back to the system (Go's scavenger takes some seconds).
	afterPull = 15 * time.Second
	// afterReads is the same for layers that were read: what is read first is recorded for 30 s, and then written down.
	afterReads = 40 * time.Second
)

func main() {
	var o options
	flag.Func("blobs", "so many blobs on each node (repeatable; default: 0 and 1000, with QUICK=1 0 and 300)", func(s string) error {
		var n int
		if _, err := fmt.Sscan(s, &n); err != nil || n < 0 || n%layersOf != 0 {
			return fmt.Errorf("not a multiple of %d", layersOf)
		}
		o.blobs = append(o.blobs, n)
		return nil
	})
	flag.Func("layers", "so many layers mounted (repeatable; default: 300, with QUICK=1 60)", func(s string) error {
		var n int
		if _, err := fmt.Sscan(s, &n); err != nil || n < stackOf || n%stackOf != 0 {
			return fmt.Errorf("not a multiple of %d", stackOf)
		}
		o.layers = append(o.layers, n)
		return nil
	})
	flag.DurationVar(&o.rest, "rest", 20*time.Second, "how long the idle daemons are watched")
	flag.Parse()
	bench.Main("bench-node", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	blobs  []int
	layers []int
	rest   time.Duration
}

// row is one load: the worst of the nodes.
type row struct {
	Blobs  int     `json:"blobs"`
	Layers int     `json:"layers"` // mounted
	RSS    float64 `json:"rss_mb"` // 10^6 bytes, as all memory here
	CPU    float64 `json:"idle_cpu_percent"`
	// Start is the first one's, or with blobs that of the restart.
	Start      float64 `json:"start_s"`
	Serving    float64 `json:"restart_to_serving_s"`
	Goroutines int     `json:"goroutines"`
	FDs        int     `json:"fds"`
	// RSSStart is right after the start, RSSPeak the most there ever was, before the restart.
	RSSStart float64 `json:"rss_start_mb"`
	RSSPeak  float64 `json:"rss_peak_mb"`
	Helpers  float64 `json:"helpers_pss_mb"`
	Before   float64 `json:"before_percent"` // how busy all CPUs were, with what else the machine had to do, while the daemons rested
	OK       bool    `json:"ok"`             // every node got every blob and served it again
}

var errNotOK = errors.New("a node did not get or serve what it should have; see the rows that are not ok, and the messages above")

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, for network namespaces and node daemons")
	}
	if o.blobs == nil && o.layers == nil {
		o.blobs, o.layers = []int{0, 1000}, []int{300}
		if bench.Quick() {
			o.blobs, o.layers, o.rest = []int{0, 300}, []int{stackOf}, min(o.rest, 10*time.Second)
		}
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	network, err := r.NewNetwork(rig.NetworkOptions{Nodes: nodes})
	if err != nil {
		return err
	}
	registry, err := r.StartRegistry(ctx, rig.RegistryOptions{Node: network.Registry()})
	if err != nil {
		return err
	}
	report := bench.New[row]("node")
	for i, blobs := range o.blobs {
		row, err := measure(ctx, r, network, registry, load{blobs, i, afterPull, o.rest})
		if err != nil {
			return fmt.Errorf("%d blobs: %w", blobs, err)
		}
		report.Rows = append(report.Rows, row)
	}
	settle := afterReads
	if bench.Quick() {
		settle = afterPull
	}
	for _, layers := range o.layers {
		row, err := measureLayers(ctx, r, layers/stackOf, stackOf, load{settle: settle, rest: o.rest})
		if err != nil {
			return fmt.Errorf("%d layers: %w", layers, err)
		}
		report.Rows = append(report.Rows, row)
	}
	if err := report.Table(os.Stdout); err != nil {
		return err
	}
	if !verdict(report.Rows) {
		err = errNotOK
	}
	return errors.Join(report.Save(), err)
}

// What is asked of docker quay.
const (
	acceptRSS   = 120 // MB
	acceptCPU   = 1   // percent of one CPU
	acceptStart = 2   // seconds
	// With layers mounted: the memory of all processes of the daemon, and the time without one.
	acceptLayersRSS = 200 // MB
	acceptServing   = 1   // seconds
)

// verdict says whether docker quay does what is asked of it, and reports whether every row is ok.
func verdict(rows []row) bool {
	ok := true
	for _, r := range rows {
		ok = ok && r.OK
		if r.Layers > 0 {
			met := r.OK && r.RSS+r.Helpers <= acceptLayersRSS && r.Serving <= acceptServing
			fmt.Printf("%d layers: %.0f MB (asked: %d), %.2f %% of a CPU, served again after %.2f s (asked: %d): %s\n",
				r.Layers, r.RSS+r.Helpers, acceptLayersRSS, r.CPU, r.Serving, acceptServing, bench.Pass(met))
			continue
		}
		met := r.OK && r.RSS <= acceptRSS && r.CPU < acceptCPU && r.Start <= acceptStart
		fmt.Printf("%d blobs: %.0f MB (asked: %d), %.2f %% of a CPU (asked: less than %d), start in %.2f s (asked: %d): %s\n",
			r.Blobs, r.RSS, acceptRSS, r.CPU, acceptCPU, r.Start, acceptStart, bench.Pass(met))
	}
	return ok
}
