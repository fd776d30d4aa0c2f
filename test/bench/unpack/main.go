// Command unpack measures how long an eager pull takes that no link slows down: from the registry, over loopback, to an image of
// which every byte is on the machine and ready to run.
//
// Candidates, in turns, each on a machine without anything (see package candidate):
//
//	overlayfs  containerd alone, `ctr image pull`
//	quay       the same with docker quay as the snapshotter, as it is set up by default, without an index to be found
//	quay-off   the same with lazy layers turned off
//
// cpu_s and peak_rss_mb are those of containerd and the candidate's daemon together, the registry's not. A pull counts as ended when
// all of the image has come over loopback; complete is false when that was after containerd said that it is pulled. read_s, which
// is none of seconds, is what it took to read every file right after; a row is ok only if that were as many bytes for all candidates.
//
// containerd unpacks gzip with unpigz or igzip when it finds one on its PATH; -no-helpers hides them.
//
// The table and build/bench/unpack.json have the medians. QUICK=1 takes one image, once.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// limit bounds the whole benchmark, which takes some minutes, and some more when the images have to be made.
const limit = time.Hour

func main() {
	candidate.Init()
	var o options
	flag.Func("image", "this `program`'s image alone: python, node, jvm, postgres, nginx (repeatable; default: all, with QUICK=1 nginx)", func(s string) error {
		app, err := image.FindApp(s)
		o.apps = append(o.apps, app)
		return err
	})
	flag.IntVar(&o.runs, "runs", 0, "runs of each candidate on each image (default: 3, with QUICK=1 one)")
	flag.BoolVar(&o.noHelpers, "no-helpers", false, "hide unpigz and igzip from containerd")
	flag.StringVar(&o.config, "config", "", "`text` to add to the node daemons' configuration")
	flag.Parse()
	bench.Main("bench-unpack", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	apps      []image.App
	runs      int
	noHelpers bool
	config    string
}

// row is one candidate on one image: medians, the peak of memory excepted.
type row struct {
	Image       string  `json:"image"`
	Candidate   string  `json:"candidate"`
	ImageBytes  int64   `json:"image_bytes"`
	Runs        int     `json:"runs"`
	Seconds     float64 `json:"seconds"`
	SecondsMin  float64 `json:"seconds_min"`
	SecondsMax  float64 `json:"seconds_max"`
	ToOverlayfs float64 `json:"ratio_to_overlayfs"`
	CPU         float64 `json:"cpu_s"`
	PeakRSS     float64 `json:"peak_rss_mb"`   // 10^6 bytes, of all runs
	HelperRSS   float64 `json:"daemon_rss_mb"` // the part of the candidate's daemon
	Complete    bool    `json:"complete"`
	Read        float64 `json:"read_s"`         // reading every file right after the pull
	Before      float64 `json:"before_percent"` // what the machine had to do just before, of all CPUs
	OK          bool    `json:"ok"`
}

var errNotOK = errors.New("an image was not pulled; see the rows that are not ok, and the messages above")

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
	if o.noHelpers {
		// containerd's own switches.
		for _, name := range []string{"CONTAINERD_DISABLE_PIGZ", "CONTAINERD_DISABLE_IGZIP"} {
			if err := os.Setenv(name, "1"); err != nil {
				return err
			}
		}
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	w, err := candidate.NewWorld(ctx, candidate.Options{Rig: r})
	if err != nil {
		return err
	}
	report := bench.New[row]("unpack")
	for _, app := range o.apps {
		img, err := app.Make(ctx, rig.ImageDir(), image.Gzip)
		if err != nil {
			return err
		}
		rows, err := measure(ctx, w, app.Name, img, o)
		if err != nil {
			return fmt.Errorf("%s: %w", app.Name, err)
		}
		report.Rows = append(report.Rows, rows...)
	}
	if err := report.Table(os.Stdout); err != nil {
		return err
	}
	if !verdict(os.Stdout, report.Rows) {
		err = errNotOK
	}
	return errors.Join(report.Save(), err)
}

// What is asked of docker quay.
const (
	acceptTime = 0.6 // of overlayfs's
	acceptRSS  = 300 // MB of the daemon
)

// verdict says whether docker quay does what is asked of it, and reports whether every row is ok.
func verdict(w io.Writer, rows []row) bool {
	ok := true
	for _, r := range rows {
		ok = ok && r.OK
		if r.Candidate == "overlayfs" {
			continue
		}
		met := r.OK && r.ToOverlayfs > 0 && r.ToOverlayfs <= acceptTime && r.HelperRSS <= acceptRSS
		fmt.Fprintf(w, "%s, %s: %.2f × overlayfs (asked: %.1f), %.0f MB (asked: %d): %s\n",
			r.Image, r.Candidate, r.ToOverlayfs, acceptTime, r.HelperRSS, acceptRSS, bench.Pass(met))
	}
	return ok
}
