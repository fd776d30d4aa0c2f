// Command fetch measures a pull from a registry on loopback, with no peers: what docker quay's bookkeeping costs over the
// least that any pull must do. A candidate is a process of its own; both get the same blob from the same real registry, in turns
// (A B A B), with everything written back to the disk before each:
//
//	http  one GET of the whole range, written to a file and hashed with SHA-256 on the way
//	quay  docker-quay pull --to store --no-daemon into an empty store
//
// The table and build/bench/fetch.json have the medians. QUICK=1 takes smaller blobs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// What is asked of docker quay, at the size of accepted or the largest that was measured.
const (
	accepted     = gib
	acceptRatio  = 0.9
	acceptRSS    = 150 // MB, at any size
	limit        = 30 * time.Minute
	httpArgument = "http-candidate" // makes this program the candidate http
)

// row is one candidate on one blob: medians over the runs.
type row struct {
	Candidate   string  `json:"candidate"`
	Bytes       int64   `json:"bytes"`
	Runs        int     `json:"runs"`
	Seconds     float64 `json:"seconds"`
	SecondsMin  float64 `json:"seconds_min"`
	SecondsMax  float64 `json:"seconds_max"`
	MiBS        float64 `json:"mib_s"`
	RatioToHTTP float64 `json:"ratio_to_http"` // of rates, pair by pair; 1 is as fast
	RatioMin    float64 `json:"ratio_to_http_min"`
	RatioMax    float64 `json:"ratio_to_http_max"`
	CPUPerGiB   float64 `json:"cpu_s_per_gib"`
	PeakRSS     float64 `json:"peak_rss_mb"` // the largest of all runs, in 10^6 bytes
}

func main() {
	bench.Init()
	if len(os.Args) > 1 && os.Args[1] == httpArgument {
		if err := plainHTTP(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.StringVar(&o.quay, "quay", "", "the docker-quay to measure (default: the one in the folder of the tools)")
	flag.IntVar(&o.runs, "runs", 0, "runs of each candidate on each blob (default: 7 of the 1 GiB that counts, 3 of the others)")
	flag.Func("mib", "a blob of so many `MiB` instead of the usual ones (repeatable)", func(s string) error {
		var n int64
		if _, err := fmt.Sscan(s, &n); err != nil || n < 1 {
			return errors.New("not a number of MiB")
		}
		o.loads = append(o.loads, load{n * mib, 5})
		return nil
	})
	flag.Parse()
	bench.Main("bench-fetch", limit, func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	quay  string
	runs  int
	loads []load
}

// load is one blob and how often each candidate fetches it.
type load struct {
	size int64
	runs int
}

func run(ctx context.Context, o options) (err error) {
	loads := []load{{64 * mib, 3}, {gib, 7}, {4 * gib, 3}}
	if bench.Quick() {
		loads = []load{{64 * mib, 3}, {gib, 3}}
	}
	if o.loads != nil {
		loads = o.loads
	}
	if o.quay == "" {
		if o.quay, err = rig.Bin("docker-quay"); err != nil {
			return err
		}
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() {
		if cerr := r.Close(); err == nil {
			err = cerr
		}
	}()
	g, err := r.StartRegistry(ctx, rig.RegistryOptions{})
	if err != nil {
		return err
	}
	report := bench.New[row]("fetch")
	for _, l := range loads {
		if o.runs > 0 {
			l.runs = o.runs
		}
		rows, err := compare(ctx, r, g, o.quay, l)
		if err != nil {
			return err
		}
		report.Rows = append(report.Rows, rows...)
	}
	if err := report.Table(os.Stdout); err != nil {
		return err
	}
	verdict(report.Rows)
	return report.Save()
}

// compare measures both candidates on one blob.
func compare(ctx context.Context, r *rig.Rig, g *rig.Registry, quay string, l load) ([]row, error) {
	img, err := image.Random(ctx, rig.ImageDir(), l.size, 1)
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("random%d", l.size/mib)
	// The proxy that counts would take a CPU from the candidates.
	if err := img.Push(ctx, image.Target{URL: "http://" + g.Direct()}, name, "1"); err != nil {
		return nil, err
	}
	dir, err := r.Dir("candidates")
	if err != nil {
		return nil, err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	layer := img.Layers[0]
	url := fmt.Sprintf("http://%s/v2/%s/blobs/%s", g.Direct(), name, layer.Digest)
	candidates := []struct {
		name    string
		program string
		args    []string
	}{
		{"http", self, []string{httpArgument, url, layer.Digest.String(), fmt.Sprint(layer.Size), filepath.Join(dir, "blob")}},
		{"quay", quay, []string{
			"pull", "--to", "store", "--no-daemon", "--progress", "quiet",
			"--store", filepath.Join(dir, "store"), fmt.Sprintf("%s/%s:1", g.Direct(), name),
		}},
	}
	// No logins and no cluster's secret of whoever runs this.
	env := []string{"HOME=" + dir, "XDG_CONFIG_HOME=" + dir, "DOCKER_CONFIG=" + dir}
	usage := map[string][]bench.Usage{}
	for i := range l.runs {
		for _, c := range candidates {
			syscall.Sync() // what the last one wrote is not for the next one to wait for
			u, err := bench.Measure(ctx, env, c.program, c.args...)
			if err != nil {
				return nil, fmt.Errorf("candidate %s: %w", c.name, err)
			}
			usage[c.name] = append(usage[c.name], u)
			fmt.Fprintf(os.Stderr, "%5d MiB, run %d of %d: %s %.2f s, %.2f CPU-s, %d MB\n", l.size/mib, i+1, l.runs, c.name, u.Seconds, u.CPU, u.PeakRSS/1e6)
			for _, what := range []string{"blob", "store"} {
				if err := os.RemoveAll(filepath.Join(dir, what)); err != nil {
					return nil, err
				}
			}
		}
	}
	var rows []row
	for _, c := range candidates {
		rows = append(rows, rowOf(c.name, layer.Size, usage[c.name], usage["http"]))
	}
	return rows, nil
}

func rowOf(candidate string, size int64, runs, http []bench.Usage) row {
	var seconds, ratio, cpu, rss bench.Series
	for i, u := range runs {
		seconds = append(seconds, u.Seconds)
		ratio = append(ratio, http[i].Seconds/u.Seconds)
		cpu = append(cpu, u.CPU*gib/float64(size))
		rss = append(rss, float64(u.PeakRSS)/1e6)
	}
	return row{
		Candidate: candidate, Bytes: size, Runs: len(runs),
		Seconds: seconds.Median(), SecondsMin: seconds.Min(), SecondsMax: seconds.Max(),
		MiBS:        float64(size) / mib / seconds.Median(),
		RatioToHTTP: ratio.Median(), RatioMin: ratio.Min(), RatioMax: ratio.Max(),
		CPUPerGiB: cpu.Median(), PeakRSS: rss.Max(),
	}
}

// verdict says whether docker quay does what is asked of it.
func verdict(rows []row) {
	var peak float64
	ratio, size := 0.0, int64(0)
	for _, r := range rows {
		if r.Candidate != "quay" {
			continue
		}
		peak = max(peak, r.PeakRSS)
		if size != accepted {
			ratio, size = r.RatioToHTTP, r.Bytes
		}
	}
	fmt.Printf("rate of quay at %d MiB: %.2f of plain HTTP's (asked: %.2f): %s\n", size/mib, ratio, acceptRatio, bench.Pass(ratio >= acceptRatio))
	fmt.Printf("peak memory of quay at any size: %.0f MB (asked: at most %d): %s\n", peak, acceptRSS, bench.Pass(peak <= acceptRSS))
}
