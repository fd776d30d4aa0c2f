package main

import (
	"errors"
	"math"
	"strings"
	"testing"

	"github.com/docker-quay/docker-quay/test/bench"
	"github.com/docker-quay/docker-quay/test/rig"
)

func TestMain(m *testing.M) {
	bench.Init()
	m.Run()
}

func TestIdeal(t *testing.T) {
	const rate = 80 * rig.Mbit // 10^7 bytes a second
	for _, c := range []struct {
		name  string
		nodes int
		slow  bool
		want  float64
	}{
		{"one node waits for the registry", 1, false, 10},
		{"many wait for nothing else", 16, false, 10},
		{"a slow node waits for its own link", 8, true, 100},
	} {
		if got := ideal(c.nodes, 1e8, rate, c.slow).Seconds(); math.Abs(got-c.want) > 1e-6 {
			t.Errorf("%s: %v s, want %v", c.name, got, c.want)
		}
	}
}

func TestScenarios(t *testing.T) {
	names := func(o options) (all string) {
		chosen, err := o.scenarios()
		if err != nil {
			return err.Error()
		}
		for _, s := range chosen {
			if s.slow > s.nodes || s.runs < 1 || s.images < 1 || s.size%512 != 0 {
				t.Errorf("scenario %+v", s)
			}
			all += s.name + " "
		}
		return strings.TrimSpace(all)
	}
	everything := "cold cold cold cold rolling churn slow-node late origin-gone many-images"
	for _, c := range []struct {
		name  string
		o     options
		quick bool
		want  string
	}{
		{"all", options{}, false, everything},
		{"quick", options{}, true, strings.TrimPrefix(everything, "cold cold ")},
		{"one", options{only: "late"}, false, "late"},
		{"one size", options{nodes: 3}, false, strings.TrimPrefix(everything, "cold cold cold ")},
		{"none", options{only: "never"}, false, `there is no scenario "never"`},
		{"too many nodes", options{nodes: 17}, false, "-nodes 17 is not between 2 and 16"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Setenv("QUICK", map[bool]string{true: "1"}[c.quick])
			if got := names(c.o); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	s := scenario{nodes: 16, size: 256 * mib}
	if p := plainScenario(&s); p.size != 32*mib || p.nodes != 16 {
		t.Errorf("plain beside 16 nodes gets %d bytes", p.size)
	}
}

// A row that is not ok, and only that, fails the benchmark; what is asked of docker quay is told beside it.
func TestVerdict(t *testing.T) {
	good := row{Scenario: "cold", Candidate: "quay", Nodes: 16, Ratio: 1.2, CopiesMax: 1, OK: true}
	slow, failed := good, good
	slow.Nodes = 8
	failed.OK = false
	for _, c := range []struct {
		name string
		r    row
		ok   bool
		told string
	}{{"good", good, true, ": met"}, {"slow", slow, true, "NOT MET"}, {"failed", failed, false, "NOT MET"}} {
		var b strings.Builder
		if ok := verdict(&b, []row{c.r}); ok != c.ok || !strings.Contains(b.String(), c.told) {
			t.Errorf("%s: %v, %s", c.name, ok, b.String())
		}
	}
}

// TestPlay plays the scenarios in small, for the sake of the benchmark: what it says must be what was done to the nodes.
func TestPlay(t *testing.T) {
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
	r := rig.ForTest(t)
	w, err := newWorld(t.Context(), r, 4, 400*rig.Mbit)
	if errors.Is(err, rig.ErrNoNamespaces) || errors.Is(err, rig.ErrNoTool) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []scenario{
		{name: "cold", nodes: 3, size: 16 * mib, images: 1, runs: 1, plain: true},
		{name: "churn", nodes: 4, size: 32 * mib, images: 1, runs: 1, disturb: kill},
		{name: "late and slow", nodes: 3, size: 4 * mib, images: 2, runs: 1, delay: late, slow: 2},
	} {
		t.Run(s.name, func(t *testing.T) {
			rows, err := w.measure(t.Context(), s, true)
			if err != nil {
				t.Fatal(err)
			}
			for _, row := range rows {
				if !row.OK {
					t.Errorf("not ok: %+v", row)
				}
				// A burst is free, so that a small image may be a little faster than its link.
				if row.Slowest < 0.8*row.Ideal || row.P50 > row.Slowest || row.Rest > row.Slowest || row.Bytes < int64(s.images)*(s.size-4096) {
					t.Errorf("figures that cannot be: %+v", row)
				}
				if row.Copies < 0.99 || row.Candidate == "plain" && row.Copies < float64(s.nodes) {
					t.Errorf("the registry sent %v copies: %+v", row.Copies, row)
				}
				if row.Waste < 0 || row.Candidate == "quay" && row.CPUPerGiB <= 0 {
					t.Errorf("costs that cannot be: %+v", row)
				}
			}
			if want := map[bool]int{true: 2, false: 1}[s.plain]; len(rows) != want {
				t.Errorf("%d rows, want %d", len(rows), want)
			}
		})
	}
	// The same network has its links and its registry back.
	out, err := w.playPlain(t.Context(), &scenario{nodes: 2}, w.pushed["random4194304"])
	if err != nil || len(out.took) != 2 {
		t.Errorf("afterwards: %+v, %v", out, err)
	}
}
