// Command lazy measures how soon a program runs whose image is not there yet: from the start of the pull to the first useful output
// of its container, on a machine without anything, over a shaped link with distance before the registry.
//
// Programs are those of image.Apps. The candidates, in turns in the same run (see package candidate):
//
//	overlayfs    containerd alone, on the image as it is
//	stargz       the stargz snapshotter, on the image converted to eStargz, with no list of files to fetch first
//	quay-first   docker quay on the image as it is, with the indexes of its layers published beside it; the first node
//	quay-ordered the same, when the indexes were published from a node that had run the program: they say what it reads first
//	quay-second  the same as quay-first on another node, when a first one has run the program and has all of the image
//	quay-eager   docker quay with lazy layers turned off
//
// bytes_until_first_output is what the machine's link brought, headers included; bytes_read_until_first_output is what the program
// read of its image until then, in whole pages, decompressed (packed: as much of it as of the image's bytes, compressed).
// complete_s is when the link had brought the whole image and was quiet, in the last run; 0: not within the time it was watched.
//
// The table and build/bench/lazy.json have the medians. QUICK=1 takes one program, once.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// limit bounds the whole benchmark, which takes some twenty minutes, and some more when the images have to be made.
const limit = 90 * time.Minute

func main() {
	candidate.Init()
	var o options
	flag.Func("image", "this `program` alone: python, node, jvm, postgres, nginx (repeatable; default: all, with QUICK=1 nginx)", func(s string) error {
		app, err := image.FindApp(s)
		o.apps = append(o.apps, app)
		return err
	})
	flag.Func("candidate", "this `candidate` alone (repeatable)", func(s string) error {
		if !slices.ContainsFunc(contestants, func(c contestant) bool { return c.name == s }) {
			return fmt.Errorf("there is no candidate %q", s)
		}
		o.only = append(o.only, s)
		return nil
	})
	flag.IntVar(&o.runs, "runs", 0, "runs of each candidate on each image (default: 3, with QUICK=1 one)")
	flag.IntVar(&o.mbit, "mbit", 200, "speed of every link in Mbit/s, in each direction")
	flag.DurationVar(&o.roundTrip, "distance", 10*time.Millisecond, "round trip to the registry")
	flag.Func("layers", "`format` of docker quay's layers: gzip, estargz, zstdchunked, zstd, tar (default: gzip)", func(s string) (err error) {
		o.layers, err = image.ParseFormat(s)
		return err
	})
	flag.StringVar(&o.config, "config", "", "`text` to add to the node daemons' configuration")
	flag.Parse()
	bench.Main("bench-lazy", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	apps      []image.App
	only      []string
	runs      int
	mbit      int
	roundTrip time.Duration
	config    string
	layers    image.Format
}

// row is one candidate on one image: medians.
type row struct {
	Image      string  `json:"image"`
	Layers     string  `json:"layers"`
	Candidate  string  `json:"candidate"`
	Link       string  `json:"link"`
	ImageBytes int64   `json:"image_bytes"`
	Runs       int     `json:"runs"`
	Pull       float64 `json:"pull_s"`
	First      float64 `json:"first_output_s"`
	FirstMin   float64 `json:"first_output_s_min"`
	FirstMax   float64 `json:"first_output_s_max"`
	// ToOverlayfs and ToStargz compare First with theirs, on the same image; 0 when they were left out.
	ToOverlayfs float64 `json:"ratio_to_overlayfs"`
	ToStargz    float64 `json:"ratio_to_stargz"`
	Fetched     int64   `json:"bytes_until_first_output"`
	Read        int64   `json:"bytes_read_until_first_output"`
	ReadPacked  int64   `json:"bytes_read_packed_until_first_output"`
	Complete    float64 `json:"complete_s"`
	Index       bool    `json:"index"`          // one was published, for the candidate to find
	Before      float64 `json:"before_percent"` // what the machine had to do just before, of all CPUs
	OK          bool    `json:"ok"`
}

var errNotOK = errors.New("a container did not get to its first useful output; see the rows that are not ok, and the messages above")

func run(ctx context.Context, o options) (err error) {
	if o.apps == nil {
		o.apps = image.Apps()
		if bench.Quick() {
			nginx, err := image.FindApp("nginx")
			if err != nil {
				return err
			}
			o.apps = []image.App{nginx}
		}
	}
	if o.runs == 0 {
		o.runs = 3
		if bench.Quick() {
			o.runs = 1
		}
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	w, err := candidate.NewWorld(ctx, candidate.Options{Rig: r, Nodes: nodes, Rate: rig.Rate(o.mbit) * rig.Mbit, RoundTrip: o.roundTrip})
	if err != nil {
		return err
	}
	report := bench.New[row]("lazy")
	for _, app := range o.apps {
		rows, err := measure(ctx, w, program{
			name: app.Name, first: app.First,
			make: func(ctx context.Context, f image.Format) (*image.Image, error) {
				return app.Make(ctx, rig.ImageDir(), f)
			},
		}, o)
		if err != nil {
			return fmt.Errorf("%s: %w", app.Name, err)
		}
		report.Rows = append(report.Rows, rows...)
	}
	if err := report.Table(os.Stdout); err != nil {
		return err
	}
	if !verdict(os.Stdout, report.Rows, rig.Rate(o.mbit)*rig.Mbit) {
		err = errNotOK
	}
	return errors.Join(report.Save(), err)
}
