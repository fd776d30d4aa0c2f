package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/rig"
)

// extras are bytes of files that a format may add to an image: eStargz has a few of a byte each.
const extras = 1 << 10

// coldReader is a candidate that pulls and reads.
type coldReader struct {
	name       string
	kind       candidate.Candidate
	eager      bool // has everything when the pull ends
	pull, read bench.Series
	before     bench.Series
	bytes      int64 // of files
	on         string
	failed     bool
}

// cold has all candidates pull the program's image over a link and read all of it, in turns, each on a machine without anything.
func cold(ctx context.Context, r *rig.Rig, p picture, o options) (rows []row, err error) {
	w, err := candidate.NewWorld(ctx, candidate.Options{Rig: r, Name: "c", Nodes: 1, Rate: rig.Rate(o.mbit) * rig.Mbit, RoundTrip: o.roundTrip})
	if err != nil {
		return nil, err
	}
	// The link is slow for what is only pushed; what the other state reads is not needed.
	p.files = p.program
	if err := push(ctx, w, p); err != nil {
		return nil, err
	}
	readers := []*coldReader{
		{name: "ext4", kind: candidate.Overlayfs(), eager: true},
		{name: "stargz", kind: candidate.Stargz()},
		{name: "quay-eager", kind: candidate.Quay{Config: o.config}, eager: true},
		{name: "quay-lazy", kind: candidate.Quay{Lazy: true, Config: o.config}},
	}
	runs := o.runs
	if runs == 0 {
		runs = 3
		if bench.Quick() {
			runs = 1
		}
	}
	for range runs {
		for _, reader := range readers {
			if err := reader.play(ctx, w); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				fmt.Fprintf(os.Stderr, "%s, cold: %v\n", reader.name, err)
				reader.failed = true
			}
		}
	}
	var eager float64
	for _, r := range readers {
		if pull := r.pull.Median(); r.eager && pull > 0 && (eager == 0 || pull < eager) {
			eager = pull
		}
	}
	for _, r := range readers {
		out := row{
			Candidate: r.name, State: "cold", On: r.on, Runs: len(r.pull), Pull: r.pull.Median(), Read: r.read.Median(), Before: r.before.Max(),
			OK: !r.failed && len(r.pull) > 0 && max(r.bytes-readers[0].bytes, readers[0].bytes-r.bytes) <= extras,
		}
		if eager > 0 {
			out.ToEager = (out.Pull + out.Read) / eager
		}
		rows = append(rows, out)
	}
	return rows, nil
}

// play pulls and reads once.
func (r *coldReader) play(ctx context.Context, w *candidate.World) (err error) {
	m, err := w.Start(ctx, r.kind, 1)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	before, err := candidate.Calm(ctx)
	if err != nil {
		return err
	}
	ref := w.Ref("program", r.kind.Format().String())
	begun := time.Now()
	if err := m.Pull(ctx, ref); err != nil {
		return err
	}
	pulled := time.Since(begun).Seconds()
	files, err := m.Mount(ctx, ref, "cold")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(files.Close(), err) }()
	read, n, err := readAll(files.Dir)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%s, cold: pulled in %.2f s, %.0f MB read in %.2f s (machine %.0f %% busy before)\n", r.name, pulled, float64(n)/1e6, read, before)
	r.pull, r.read, r.before = append(r.pull, pulled), append(r.read, read), append(r.before, before)
	r.bytes, r.on = n, files.On
	return nil
}
