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
	"github.com/docker-quay/docker-quay/test/rig"
)

// reader is a candidate with both images mounted.
type reader struct {
	name     string
	kind     candidate.Candidate
	complete bool // mounted anew when all is there

	machine        *candidate.Machine
	files, program *candidate.Mounted
	turns          []figures
	cpu, elapsed   time.Duration // of the daemon, in all turns, and how long they took
	failed         bool
}

// hot has all candidates read what they have read before, in turns.
func hot(ctx context.Context, r *rig.Rig, p picture, o options) (rows []row, err error) {
	readers := []*reader{
		{name: "ext4", kind: candidate.Overlayfs()},
		{name: "stargz", kind: candidate.Stargz()},
		{name: "quay-lazy", kind: candidate.Quay{Lazy: true, Config: o.config}},
		{name: "quay-complete", kind: candidate.Quay{Lazy: true, Config: o.config}, complete: true},
	}
	w, err := candidate.NewWorld(ctx, candidate.Options{Rig: r, Name: "h", Nodes: len(readers)})
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, reader := range readers {
			err = errors.Join(err, reader.close())
		}
	}()
	if err := push(ctx, w, p); err != nil {
		return nil, err
	}
	for i, reader := range readers {
		if err := reader.open(ctx, w, i+1); err != nil {
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			fmt.Fprintf(os.Stderr, "%s: %v\n", reader.name, err)
			reader.failed = true
		}
	}
	runs := o.runs
	if runs == 0 {
		runs = 5
		if bench.Quick() {
			runs = 1
		}
	}
	before, err := candidate.Calm(ctx)
	if err != nil {
		return nil, err
	}
	// The first turn fills the caches.
	for turn := range runs + 1 {
		for _, reader := range readers {
			if err := reader.read(ctx, p, turn > 0); err != nil {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				fmt.Fprintf(os.Stderr, "%s: %v\n", reader.name, err)
				reader.failed = true
			}
		}
	}
	for _, reader := range readers {
		row := reader.row(readers[0])
		row.Before = before
		rows = append(rows, row)
	}
	return rows, nil
}

// push puts both images into the registry, in the formats that candidates take, with their indexes when docker quay publishes any.
func push(ctx context.Context, w *candidate.World, p picture) error {
	for _, f := range []image.Format{image.Gzip, image.EStargz} {
		for name, make := range map[string]func(context.Context, image.Format) (*image.Image, error){"files": p.files, "program": p.program} {
			img, err := make(ctx, f)
			if err != nil {
				return err
			}
			if _, err := w.Push(ctx, img, name, f.String()); err != nil {
				return err
			}
			if f != image.Gzip {
				continue
			}
			if err := w.Publish(ctx, name, f.String()); err != nil {
				if !errors.Is(err, candidate.ErrNoIndexer) {
					return err
				}
				fmt.Fprintf(os.Stderr, "%s: no index is published: %v\n", name, err)
			}
		}
	}
	return nil
}

// open pulls and mounts both images.
func (r *reader) open(ctx context.Context, w *candidate.World, node int) (err error) {
	if r.machine, err = w.Start(ctx, r.kind, node); err != nil {
		return err
	}
	format := r.kind.Format().String()
	for name, mounted := range map[string]**candidate.Mounted{"files": &r.files, "program": &r.program} {
		ref := w.Ref(name, format)
		if err := r.machine.Pull(ctx, ref); err != nil {
			return err
		}
		if r.complete {
			if err := r.anew(ctx, ref, name); err != nil {
				return err
			}
		}
		if *mounted, err = r.machine.Mount(ctx, ref, name); err != nil {
			return err
		}
	}
	return nil
}

// anew has an image that is mounted lazily be fetched to its end, removed and pulled again, out of what the machine has.
func (r *reader) anew(ctx context.Context, ref, name string) error {
	m, err := r.machine.Mount(ctx, ref, name)
	if err != nil {
		return err
	}
	_, _, err = readAll(m.Dir)
	if err := errors.Join(err, m.Close()); err != nil {
		return err
	}
	if _, _, err := r.machine.Still(ctx); err != nil {
		return err
	}
	if err := r.machine.Forget(ctx, ref); err != nil {
		return err
	}
	return r.machine.Pull(ctx, ref)
}

// read takes a turn.
func (r *reader) read(ctx context.Context, p picture, counts bool) error {
	if r.failed {
		return nil
	}
	before, err := r.machine.HelperCost()
	if err != nil {
		return err
	}
	begun := time.Now()
	f, err := readHot(ctx, r.files.Dir, r.program.Dir, p)
	if err != nil {
		return err
	}
	after, err := r.machine.HelperCost()
	if err != nil || !counts {
		return err
	}
	r.turns = append(r.turns, f)
	r.cpu += after.CPU - before.CPU
	r.elapsed += time.Since(begun)
	return nil
}

// row compares with ext4, turn by turn.
func (r *reader) row(ext4 *reader) row {
	out := row{Candidate: r.name, State: "hot", Runs: len(r.turns), DaemonCPU: r.cpu.Seconds(), Elapsed: r.elapsed.Seconds(), OK: !r.failed && len(r.turns) > 0}
	if r.files != nil {
		out.On = r.files.On
	}
	for _, c := range []struct {
		of           func(figures) float64
		lessIsMore   bool
		value, speed *float64
	}{
		{func(f figures) float64 { return f.seq }, false, &out.Seq, &out.SpeedSeq},
		{func(f figures) float64 { return f.rand }, false, &out.Rand, &out.SpeedRand},
		{func(f figures) float64 { return f.stat }, true, &out.Stat, &out.SpeedStat},
		{func(f figures) float64 { return f.small }, true, &out.Small, &out.SpeedSmall},
		{func(f figures) float64 { return f.exec }, true, &out.Exec, &out.SpeedExec},
	} {
		var values, speeds bench.Series
		for i, f := range r.turns {
			values = append(values, c.of(f))
			if i >= len(ext4.turns) {
				continue
			}
			a, b := c.of(f), c.of(ext4.turns[i])
			if c.lessIsMore {
				a, b = b, a
			}
			if b > 0 {
				speeds = append(speeds, a/b)
			}
		}
		*c.value, *c.speed = values.Median(), speeds.Median()
	}
	return out
}

func (r *reader) close() error {
	var errs []error
	for _, m := range []*candidate.Mounted{r.files, r.program} {
		if m != nil {
			errs = append(errs, m.Close())
		}
	}
	if r.machine != nil {
		errs = append(errs, r.machine.Close())
	}
	return errors.Join(errs...)
}
