package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
)

// contestant is a candidate under the name that the report has for it.
type contestant struct {
	name string
	kind func(config string) candidate.Candidate
}

var contestants = []contestant{
	{"overlayfs", func(string) candidate.Candidate { return candidate.Overlayfs() }},
	{"quay", func(config string) candidate.Candidate { return candidate.Quay{Lazy: true, Config: config} }},
	{"quay-off", func(config string) candidate.Candidate { return candidate.Quay{Config: config} }},
}

const (
	// restWithin bounds what is fetched after a pull.
	restWithin = time.Minute
	// lookEvery is how often it is looked whether it is all there.
	lookEvery = 5 * time.Millisecond
)

// outcome is what one pull came to.
type outcome struct {
	seconds       float64
	cost, helpers candidate.Cost
	complete      bool
	read          float64 // seconds
	bytes         int64   // of files
	before        float64
}

// measure plays all rounds on one image.
func measure(ctx context.Context, w *candidate.World, name string, img *image.Image, o options) (rows []row, err error) {
	ref, err := w.Push(ctx, img, name, "1")
	if err != nil {
		return nil, err
	}
	outcomes := make([][]outcome, len(contestants))
	failed := make([]bool, len(contestants))
	for range o.runs {
		for i, k := range contestants {
			out, err := play(ctx, w, k.kind(o.config), ref, img.Size())
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			if err != nil {
				fmt.Fprintf(os.Stderr, "%s, %s: %v\n", name, k.name, err)
				failed[i] = true
				continue
			}
			fmt.Fprintf(os.Stderr, "%s, %s: %.2f s, %.2f s of CPU, %.0f MB (machine %.0f %% busy before)\n",
				name, k.name, out.seconds, out.cost.CPU.Seconds(), float64(out.cost.PeakRSS)/1e6, out.before)
			outcomes[i] = append(outcomes[i], out)
		}
	}
	var base float64
	var right int64 // bytes of files
	for i, k := range contestants {
		r := toRow(outcomes[i])
		r.Image, r.Candidate, r.ImageBytes = name, k.name, img.Size()
		r.OK = !failed[i] && r.Runs > 0
		if i == 0 && r.OK {
			base, right = r.Seconds, outcomes[i][0].bytes
		}
		for _, out := range outcomes[i] {
			r.OK = r.OK && out.bytes == right
		}
		if base > 0 {
			r.ToOverlayfs = r.Seconds / base
		}
		rows = append(rows, r)
	}
	return rows, nil
}

// play pulls once, to a machine without anything.
func play(ctx context.Context, w *candidate.World, kind candidate.Candidate, ref string, size int64) (out outcome, err error) {
	m, err := w.Start(ctx, kind, 1)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if out.before, err = candidate.Calm(ctx); err != nil {
		return out, err
	}
	start, err := m.Received()
	if err != nil {
		return out, err
	}
	before, err := m.Cost()
	if err != nil {
		return out, err
	}
	begun := time.Now()
	if err := m.Pull(ctx, ref); err != nil {
		return out, err
	}
	out.complete = true
	for {
		out.seconds = time.Since(begun).Seconds()
		got, err := m.Received()
		if err != nil {
			return out, err
		}
		if got-start >= size {
			break
		}
		out.complete = false
		if time.Since(begun) > restWithin {
			return out, fmt.Errorf("%d of %d bytes came within %v", got-start, size, restWithin)
		}
		if err := bench.Wait(ctx, lookEvery); err != nil {
			return out, err
		}
	}
	if out.cost, err = m.Cost(); err != nil {
		return out, err
	}
	out.cost.CPU -= before.CPU
	if out.helpers, err = m.HelperCost(); err != nil {
		return out, err
	}
	// Whatever was left for later shows here.
	begun = time.Now()
	files, err := m.Mount(ctx, ref, "check")
	if err != nil {
		return out, err
	}
	out.bytes, err = files.Read()
	out.read = time.Since(begun).Seconds()
	return out, errors.Join(err, files.Close())
}

func toRow(outcomes []outcome) (r row) {
	var seconds, cpu, read, before bench.Series
	r.Complete = true
	for _, o := range outcomes {
		seconds = append(seconds, o.seconds)
		cpu = append(cpu, o.cost.CPU.Seconds())
		read = append(read, o.read)
		before = append(before, o.before)
		r.PeakRSS = max(r.PeakRSS, float64(o.cost.PeakRSS)/1e6)
		r.HelperRSS = max(r.HelperRSS, float64(o.helpers.PeakRSS)/1e6)
		r.Complete = r.Complete && o.complete
	}
	r.Runs = len(outcomes)
	r.Seconds, r.SecondsMin, r.SecondsMax = seconds.Median(), seconds.Min(), seconds.Max()
	r.CPU, r.Read, r.Before = cpu.Median(), read.Median(), before.Max()
	return r
}
