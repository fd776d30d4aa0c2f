// Command read measures how fast the files of an image are read where there is more below overlayfs than ext4.
//
// Candidates (see package candidate):
//
//	ext4           containerd alone: layers unpacked on the disk of the machine
//	stargz         the stargz snapshotter's FUSE tree, on eStargz layers
//	quay-lazy      docker quay's lazy layers, as they were mounted when nothing of them was there
//	quay-complete  the same when all of the image is there and it was mounted anew
//
// States:
//
//	hot   everything was read before: one large file in a row (seq) and 4 KiB at a time in random order (rand4k), thousands of small
//	      files each opened and read (small), every file and folder visited as find and stat do (stat), an interpreter started in
//	      the image (exec). daemon_cpu_s is what the candidate's daemon used meanwhile. All candidates take turns, for every figure;
//	      speed_* are those of ext4 in the same turn, as a share: 1 is as fast as ext4.
//	cold  pull_s is a pull over a shaped link with distance before the registry, read_s reading every file of it right after, which
//	      for a lazy image is when its bytes are fetched. to_eager is both as a multiple of an eager pull: the faster one of ext4's
//	      and of quay-eager's, docker quay with lazy layers turned off.
//
// on says what the layers lie on. The table and build/bench/read.json have the medians. QUICK=1 takes less of everything.
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

// limit bounds the whole benchmark, which takes some ten minutes, and some more when the images have to be made.
const limit = time.Hour

func main() {
	candidate.Init()
	var o options
	o.program = "python"
	flag.Func("image", "the `program` that is started, and read cold: python, node, jvm, postgres, nginx (default: python; only python's start is measured)", func(s string) error {
		_, err := image.FindApp(s)
		o.program = s
		return err
	})
	flag.BoolVar(&o.noHot, "no-hot", false, "leave the state hot out")
	flag.BoolVar(&o.noCold, "no-cold", false, "leave the state cold out")
	flag.IntVar(&o.runs, "runs", 0, "turns of each candidate (default: 5 hot and 3 cold, with QUICK=1 one)")
	flag.IntVar(&o.mbit, "mbit", 200, "cold: speed of every link in Mbit/s, in each direction")
	flag.DurationVar(&o.roundTrip, "distance", 10*time.Millisecond, "cold: round trip to the registry")
	flag.StringVar(&o.config, "config", "", "`text` to add to the node daemons' configuration")
	flag.Parse()
	bench.Main("bench-read", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	program       string
	noHot, noCold bool
	runs, mbit    int
	roundTrip     time.Duration
	config        string
}

// row is one candidate in one state: medians. What a state does not have is 0.
type row struct {
	Candidate string  `json:"candidate"`
	State     string  `json:"state"`
	On        string  `json:"on"`
	Runs      int     `json:"runs"`
	Seq       float64 `json:"seq_mb_s"` // 10^6 bytes a second
	Rand      float64 `json:"rand4k_kiops"`
	Stat      float64 `json:"stat_s"`
	Small     float64 `json:"small_s"`
	Exec      float64 `json:"exec_ms"`
	DaemonCPU float64 `json:"daemon_cpu_s"` // of all turns together, which took
	Elapsed   float64 `json:"elapsed_s"`

	SpeedSeq   float64 `json:"speed_seq"`
	SpeedRand  float64 `json:"speed_rand4k"`
	SpeedStat  float64 `json:"speed_stat"`
	SpeedSmall float64 `json:"speed_small"`
	SpeedExec  float64 `json:"speed_exec"`

	Pull    float64 `json:"pull_s"`
	Read    float64 `json:"read_s"`
	ToEager float64 `json:"to_eager"`
	Before  float64 `json:"before_percent"` // what the machine had to do just before, of all CPUs
	OK      bool    `json:"ok"`
}

var errNotOK = errors.New("an image could not be read; see the rows that are not ok, and the messages above")

func run(ctx context.Context, o options) (err error) {
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	app, err := image.FindApp(o.program)
	if err != nil {
		return err
	}
	p := picture{
		files: func(ctx context.Context, f image.Format) (*image.Image, error) {
			big, small := 256<<20, 15000
			if bench.Quick() {
				big, small = 64<<20, 3000
			}
			return image.Files(ctx, rig.ImageDir(), f, big, small)
		},
		program: func(ctx context.Context, f image.Format) (*image.Image, error) {
			return app.Make(ctx, rig.ImageDir(), f)
		},
		turn: time.Second,
	}
	if o.program == "python" {
		p.start = []string{"/usr/bin/python3", "-c", "import ssl, json, numpy"}
	}
	report := bench.New[row]("read")
	for _, part := range []struct {
		skip    bool
		measure func(context.Context, *rig.Rig, picture, options) ([]row, error)
	}{{o.noHot, hot}, {o.noCold, cold}} {
		if part.skip {
			continue
		}
		rows, err := part.measure(ctx, r, p, o)
		if err != nil {
			return err
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

// picture is what is read.
type picture struct {
	files, program func(context.Context, image.Format) (*image.Image, error)
	// start is a command in the program's image; none: not measured.
	start []string
	// turn is how long random reads go on.
	turn time.Duration
}

// What is asked of docker quay.
const (
	acceptLazy     = 0.9  // of ext4's speed, hot
	acceptComplete = 0.95 // the same when complete, with no CPU of the daemon but what it uses idle:
	acceptIdle     = 0.01 // of one CPU
	acceptCold     = 1.1  // of an eager pull's time
)

// verdict says whether docker quay does what is asked of it, and reports whether every row is ok.
func verdict(w io.Writer, rows []row) bool {
	ok := true
	for _, r := range rows {
		ok = ok && r.OK
		asked := map[string]float64{"quay-lazy": acceptLazy, "quay-complete": acceptComplete}[r.Candidate]
		switch {
		case r.State == "hot" && asked > 0:
			least := min(r.SpeedSeq, r.SpeedRand, r.SpeedStat, r.SpeedSmall)
			met := least >= asked && (r.Candidate != "quay-complete" || r.DaemonCPU <= acceptIdle*r.Elapsed)
			fmt.Fprintf(w, "%s, hot: seq %.2f, rand4k %.2f, stat %.2f, small %.2f × ext4's speed (asked: %.2f), %.2f s of the daemon's CPU in %.1f s: %s\n",
				r.Candidate, r.SpeedSeq, r.SpeedRand, r.SpeedStat, r.SpeedSmall, asked, r.DaemonCPU, r.Elapsed, bench.Pass(r.OK && met))
		case r.State == "cold" && r.Candidate == "quay-lazy":
			fmt.Fprintf(w, "%s, cold: pulled and read in %.2f × the time of an eager pull (asked: %.1f): %s\n",
				r.Candidate, r.ToEager, acceptCold, bench.Pass(r.OK && r.ToEager > 0 && r.ToEager <= acceptCold))
		}
	}
	return ok
}
