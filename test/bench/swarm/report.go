package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
)

// row is one candidate in one scenario: medians over the runs. Times are from the start signal until a node's store has the
// image, digest checked; for a node that comes later, from its own start.
type row struct {
	Scenario   string  `json:"scenario"`
	Candidate  string  `json:"candidate"`
	Nodes      int     `json:"nodes"`
	UplinkMbit int     `json:"uplink_mbit"`
	Bytes      int64   `json:"bytes"` // that each node gets
	Runs       int     `json:"runs"`
	Ideal      float64 `json:"ideal_s"`
	P50        float64 `json:"p50_s"` // the median of the nodes
	Slowest    float64 `json:"slowest_s"`
	SlowestMin float64 `json:"slowest_s_min"` // over the runs, as max
	SlowestMax float64 `json:"slowest_s_max"`
	Ratio      float64 `json:"ratio"` // slowest_s to ideal_s
	// Rest is the slowest of the nodes that nothing was done to: not slow, not late.
	Rest      float64 `json:"rest_slowest_s"`
	Copies    float64 `json:"origin_copies"`
	CopiesMax float64 `json:"origin_copies_max"`
	// Waste is what came in over the links of the nodes, killed ones left out, beyond the image, as a part of it: bytes that were there
	// already, messages, acknowledgements and headers (those once for each packet before segmentation).
	Waste float64 `json:"waste"`
	// CPUPerGiB is what the daemons used for each GiB received, sending included; 0 for plain, which has none.
	CPUPerGiB float64 `json:"cpu_s_per_gib"`
	Busy      float64 `json:"busy_percent"` // of all CPUs while the nodes pulled
	// Before is the same just before, with idle daemons: what else the machine had to do.
	Before float64 `json:"before_percent"`
	OK     bool    `json:"ok"` // every node, killed ones left out, has the right bytes, in every run
}

// measure runs a scenario as often as it says.
func (w *world) measure(ctx context.Context, s scenario, plain bool) ([]row, error) {
	blobs, err := w.blobs(ctx, &s)
	if err != nil {
		return nil, err
	}
	plain = plain && s.plain
	alone := plainScenario(&s)
	var single blob
	if plain {
		if single, err = w.push(ctx, alone.size); err != nil {
			return nil, err
		}
	}
	var quays, plains []outcome
	for i := range s.runs {
		out, err := w.play(ctx, &s, blobs)
		if err != nil {
			return nil, fmt.Errorf("scenario %s with %d nodes: %w", s.name, s.nodes, err)
		}
		quays = append(quays, out)
		out.print(os.Stderr, &s, "quay", i)
		if !plain {
			continue
		}
		if out, err = w.playPlain(ctx, &alone, single); err != nil {
			return nil, fmt.Errorf("scenario %s with %d nodes: %w", s.name, s.nodes, err)
		}
		plains = append(plains, out)
		out.print(os.Stderr, &alone, "plain", i)
	}
	rows := []row{w.rowOf(&s, "quay", quays)}
	if plain {
		rows = append(rows, w.rowOf(&alone, "plain", plains))
	}
	return rows, nil
}

// print writes a line for each run, for who waits for the table.
func (o *outcome) print(out io.Writer, s *scenario, candidate string, run int) {
	fmt.Fprintf(out, "%s, %d nodes, run %d of %d: %s", s.name, s.nodes, run+1, s.runs, candidate)
	for _, t := range o.took {
		fmt.Fprintf(out, " %.2f", t.Seconds())
	}
	fmt.Fprintf(out, " s, %.3f copies, waste %.3f, %.2f CPU-s/GiB, machine %.0f %% busy (%.0f %% before)\n", o.copies, o.waste, o.cpu, o.busy, o.before)
	if o.failure != nil {
		fmt.Fprintf(out, "%v\n", o.failure)
	}
}

func (w *world) rowOf(s *scenario, candidate string, runs []outcome) row {
	var p50, slowest, rest, copies, waste, cpu, busy, before bench.Series
	ok := true
	for _, o := range runs {
		ok = ok && o.failure == nil
		copies = append(copies, o.copies)
		waste = append(waste, o.waste)
		cpu = append(cpu, o.cpu)
		busy = append(busy, o.busy)
		before = append(before, o.before)
		if len(o.took) == 0 {
			continue
		}
		all := inSeconds(o.took)
		p50 = append(p50, all.Median())
		slowest = append(slowest, all.Max())
		rest = append(rest, inSeconds(o.rest).Max())
	}
	least := s.ideal(w.rate).Seconds()
	return row{
		Scenario: s.name, Candidate: candidate, Nodes: s.nodes, UplinkMbit: int(w.rate / 1e6), Bytes: s.bytes(), Runs: len(runs),
		Ideal: least, P50: p50.Median(), Slowest: slowest.Median(), SlowestMin: slowest.Min(), SlowestMax: slowest.Max(),
		Ratio: slowest.Median() / least, Rest: rest.Median(), Copies: copies.Median(), CopiesMax: copies.Max(),
		Waste: waste.Median(), CPUPerGiB: cpu.Median(), Busy: busy.Median(), Before: slices.Max(before), OK: ok,
	}
}

func inSeconds(all []time.Duration) (s bench.Series) {
	for _, t := range all {
		s = append(s, t.Seconds())
	}
	return s
}

// What is asked of docker quay at 200 Mbit/s.
const (
	acceptRatio      = 1.15 // cold, up to eight nodes
	acceptRatioMany  = 1.25 // cold, with more
	acceptCopies     = 1.05 // cold
	acceptCopiesHard = 1.3  // in any other scenario
)

// verdict says whether docker quay does what is asked of it, and reports whether every row is ok.
func verdict(w io.Writer, rows []row) bool {
	ok := true
	for _, r := range rows {
		ok = ok && r.OK
		if r.Candidate != "quay" {
			continue
		}
		copies := acceptCopiesHard
		met := r.OK
		fmt.Fprintf(w, "%s, %d nodes: ", r.Scenario, r.Nodes)
		if r.Scenario == "cold" {
			copies = acceptCopies
			ratio := acceptRatio
			if r.Nodes > 8 {
				ratio = acceptRatioMany
			}
			met = met && r.Ratio <= ratio
			fmt.Fprintf(w, "%.2f of the ideal time (asked: %.2f), ", r.Ratio, ratio)
		}
		met = met && r.CopiesMax <= copies
		fmt.Fprintf(w, "at most %.3f copies from the registry (asked: %.2f), every node right: %v: %s\n", r.CopiesMax, copies, r.OK, bench.Pass(met))
	}
	return ok
}
