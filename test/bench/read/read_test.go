package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/bench/lazy/candidate"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestMain(m *testing.M) {
	bench.Init()
	candidate.Init()
	m.Run()
}

// What is asked of docker quay is told for its own rows, and a row that is not ok fails the benchmark.
func TestVerdict(t *testing.T) {
	good := []row{
		{Candidate: "ext4", State: "hot", OK: true},
		{Candidate: "quay-lazy", State: "hot", SpeedSeq: 0.9, SpeedRand: 0.95, SpeedStat: 1.2, SpeedSmall: 1, DaemonCPU: 3, OK: true},
		{Candidate: "quay-complete", State: "hot", SpeedSeq: 1, SpeedRand: 0.95, SpeedStat: 1, SpeedSmall: 1, DaemonCPU: 0.01, Elapsed: 1, OK: true},
		{Candidate: "quay-lazy", State: "cold", ToEager: 1.1, OK: true},
	}
	for _, c := range []struct {
		name   string
		change func([]row)
		ok     bool
		missed int
	}{
		{"good", func([]row) {}, true, 0},
		{"slow", func(r []row) { r[1].SpeedStat = 0.8 }, true, 1},
		{"busy", func(r []row) { r[2].DaemonCPU = 0.02 }, true, 1},
		{"late", func(r []row) { r[3].ToEager = 1.2 }, true, 1},
		{"failed", func(r []row) { r[2].OK = false }, false, 1},
	} {
		rows := append([]row(nil), good...)
		c.change(rows)
		var b strings.Builder
		if ok := verdict(&b, rows); ok != c.ok || strings.Count(b.String(), "NOT MET") != c.missed || strings.Count(b.String(), "\n") != 3 {
			t.Errorf("%s: %v\n%s", c.name, ok, b.String())
		}
	}
}

// What is read is all that is there, and what is not there is an error.
func TestReads(t *testing.T) {
	dir := t.TempDir()
	for name, size := range map[string]int{image.BigFile: 1 << 20, image.SmallFiles + "/a": 0, image.SmallFiles + "/b/c": 5000} {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, make([]byte, size), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if _, n, err := readAll(filepath.Join(dir, image.SmallFiles)); err != nil || n != 5000 {
		t.Errorf("small files: %d bytes, %v", n, err)
	}
	f, err := readHot(t.Context(), dir, "/", picture{turn: 10 * time.Millisecond, start: []string{"/bin/true"}})
	if os.Geteuid() != 0 {
		t.Skip("needs root to change the root")
	}
	if err != nil || f.seq <= 0 || f.rand <= 0 || f.stat <= 0 || f.small <= 0 || f.exec <= 0 {
		t.Errorf("%+v, %v", f, err)
	}
	if _, err := readHot(t.Context(), dir, "/", picture{turn: time.Millisecond, start: []string{"/bin/false"}}); err == nil {
		t.Error("a program that fails, and no error")
	}
	if _, err := inARow(filepath.Join(dir, "none")); err == nil {
		t.Error("a file that is not there, and no error")
	}
	if _, err := atRandom(filepath.Join(dir, image.SmallFiles, "a"), time.Millisecond); err == nil {
		t.Error("an empty file, and no error")
	}
}

// TestMeasure plays every candidate with small images, for the sake of the benchmark: figures are there and can be.
func TestMeasure(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	p := picture{
		files: func(ctx context.Context, f image.Format) (*image.Image, error) {
			return image.Files(ctx, rig.ImageDir(), f, 4<<20, 200)
		},
		program: func(ctx context.Context, f image.Format) (*image.Image, error) {
			return image.Busybox(ctx, rig.ImageDir(), f)
		},
		start: []string{"/app/hello"},
		turn:  10 * time.Millisecond,
	}
	o := options{runs: 1, mbit: 400, roundTrip: 10 * time.Millisecond}
	for name, measure := range map[string]func(context.Context, *rig.Rig, picture, options) ([]row, error){"hot": hot, "cold": cold} {
		t.Run(name, func(t *testing.T) {
			rows, err := measure(t.Context(), rig.ForTest(t), p, o)
			if errors.Is(err, rig.ErrNoNamespaces) || errors.Is(err, rig.ErrNoTool) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			if len(rows) != 4 {
				t.Errorf("%d rows of 4 candidates", len(rows))
			}
			for _, r := range rows {
				if !r.OK || r.Runs != 1 || r.State != name || r.On == "" {
					t.Errorf("not ok: %+v", r)
				}
				if name == "hot" && (r.Seq <= 0 || r.Rand <= 0 || r.Stat <= 0 || r.Small <= 0 || r.Exec <= 0 || r.SpeedSeq <= 0 || r.SpeedStat <= 0) {
					t.Errorf("figures that cannot be: %+v", r)
				}
				if name == "cold" && (r.Pull <= 0 || r.Read <= 0 || r.ToEager <= 0) {
					t.Errorf("figures that cannot be: %+v", r)
				}
				if wanted := map[string]string{"ext4": "ext4", "stargz": "fuse"}[r.Candidate]; wanted != "" && r.On != wanted && r.On != "tmpfs" && r.On != "xfs" {
					t.Errorf("the layers of %s lie on %s", r.Candidate, r.On)
				}
			}
		})
	}
}
