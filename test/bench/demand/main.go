// Command demand measures the reads that somebody waits for: 64 KiB at random places of a layer of which this node has nothing
// and another node has all. Every read hits a piece that is not here.
//
// The holder is a node daemon, the reader a fetcher in a process of its own with the registry at hand, as when a container
// starts from a lazily mounted image. Links: loopback, and network namespaces with shaped links, the registry's of the same speed. Loads:
//
//	idle  one read after the other and nothing else
//	bulk  during a full download by the reader, with pauses between the reads: of another layer of the image (bulk_of other), or
//	      of the layer that is read (same)
//
// The table and build/bench/demand.json have the figures. QUICK=1 takes smaller layers.
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
	mib = 1 << 20
	// limit bounds the whole benchmark, which takes a few minutes.
	limit = 30 * time.Minute
	// readSize is what one read asks for: the most that FUSE asks for at once, unless told otherwise, is 128 KiB, the usual is less.
	readSize = 64 << 10
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == readerArgument {
		if err := reader(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.IntVar(&o.runs, "runs", 0, "runs of each load on each link, of which all reads count (default: 3, with QUICK=1 one)")
	flag.Int64Var(&o.mib, "mib", 0, "`MiB` of each layer (default: 256, with QUICK=1 64)")
	flag.IntVar(&o.mbit, "mbit", 200, "speed of every shaped link in Mbit/s, in each direction")
	flag.Parse()
	bench.Main("bench-demand", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	runs int
	mib  int64
	mbit int
}

// row is one load on one link: all reads of all runs.
type row struct {
	Link   string  `json:"link"`
	Load   string  `json:"load"`
	BulkOf string  `json:"bulk_of"` // "" when idle
	Runs   int     `json:"runs"`
	Reads  int     `json:"reads"`
	P50    float64 `json:"p50_ms"`
	P99    float64 `json:"p99_ms"`
	Max    float64 `json:"max_ms"`
	// First is the median of the runs' first reads, which find the holder and are none of the Reads.
	First float64 `json:"first_ms"`
	// Bulk is how fast the download was meanwhile, in 10^6 bytes a second.
	Bulk float64 `json:"bulk_mb_s"`
	// FromPeer is the share of the reader's bytes that came from the holder, not the registry, in percent; the download's included.
	FromPeer float64 `json:"from_peer_percent"`
	Before   float64 `json:"before_percent"` // what the machine had to do just before, of all CPUs
	OK       bool    `json:"ok"`             // every read had the right bytes
}

// load is what the reader does besides.
type load struct{ name, bulkOf string }

var loads = []load{{"idle", ""}, {"bulk", "other"}, {"bulk", "same"}}

var errWrong = errors.New("a read failed or had the wrong bytes; see the rows that are not ok, and the messages above")

func run(ctx context.Context, o options) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("needs root, for network namespaces and the node daemon")
	}
	size, runs := int64(256*mib), 3
	if bench.Quick() {
		size, runs = 64*mib, 1
	}
	if o.runs > 0 {
		runs = o.runs
	}
	if o.mib > 0 {
		size = o.mib * mib
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	network, err := r.NewNetwork(rig.NetworkOptions{Nodes: 2, Rate: rig.Rate(o.mbit) * rig.Mbit})
	if err != nil {
		return err
	}
	report := bench.New[row]("demand")
	for _, l := range []link{
		{name: "loopback"},
		{name: fmt.Sprintf("%d Mbit/s", o.mbit), holder: network.Node(1), reader: network.Node(2), registry: network.Registry()},
	} {
		w, err := newWorld(ctx, r, l, size)
		if err != nil {
			return err
		}
		for _, load := range loads {
			row, err := w.measure(ctx, load, runs)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", l.name, load.name, err)
			}
			report.Rows = append(report.Rows, row)
		}
		if err := w.close(); err != nil {
			return err
		}
	}
	if err := report.Table(os.Stdout); err != nil {
		return err
	}
	if !verdict(report.Rows) {
		err = errWrong
	}
	return errors.Join(report.Save(), err)
}

// What is asked of docker quay, in milliseconds.
const (
	acceptP50 = 1  // on loopback, idle
	acceptP99 = 80 // on the shaped link, during a full download
)

// verdict says whether docker quay does what is asked of it, and reports whether every row is ok.
func verdict(rows []row) bool {
	ok := true
	for _, r := range rows {
		ok = ok && r.OK
		switch {
		case r.Link == "loopback" && r.Load == "idle":
			fmt.Printf("loopback, idle: p50 %.2f ms (asked: %d): %s\n", r.P50, acceptP50, bench.Pass(r.OK && r.P50 <= acceptP50))
		case r.Link != "loopback" && r.Load == "bulk":
			fmt.Printf("%s, during a download of the %s layer: p99 %.1f ms (asked: %d): %s\n", r.Link, r.BulkOf, r.P99, acceptP99, bench.Pass(r.OK && r.P99 <= acceptP99))
		}
	}
	return ok
}
