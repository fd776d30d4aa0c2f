package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

// What is asked for, with a thousand nodes; `make bench-simulate` does it with ten thousand.
func TestThousandNodes(t *testing.T) {
	var few, many row
	for _, s := range []scenario{crowd(100, 200), crowd(1000, 200)} {
		r, _, took := simulate(s)
		t.Logf("%+v in %v", r, took)
		if !r.accepted() {
			t.Errorf("%d nodes: %+v", s.nodes, r)
		}
		few, many = many, r
	}
	if many.Control > 1.5*few.Control {
		t.Errorf("control traffic is not flat: %.0f bytes per node and second with 100 nodes, %.0f with 1000", few.Control, many.Control)
	}
}

// Nodes that come, go and lie, fewer of them.
func TestMishaps(t *testing.T) {
	for _, s := range []scenario{rolling(300), churn(300), liars(300)} {
		r, _, took := simulate(s)
		t.Logf("%+v in %v", r, took)
		if !r.accepted() {
			t.Errorf("%+v", r)
		}
	}
}

// The same seed gives the same simulation.
func TestRepeatable(t *testing.T) {
	a, _, _ := simulate(crowd(20, 200))
	b, _, _ := simulate(crowd(20, 200))
	if a.Slowest != b.Slowest || a.Copies != b.Copies {
		t.Errorf("%+v\n%+v", a, b)
	}
}

func TestPlot(t *testing.T) {
	r, c, _ := simulate(crowd(10, 200))
	svg := string(drawing([]row{r}, []curve{c}))
	for in := xml.NewDecoder(strings.NewReader(svg)); ; {
		_, err := in.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"seconds since the first start", "copies of the blob", "crowd, 10 nodes", "prefers-color-scheme"} {
		if !strings.Contains(svg, want) {
			t.Errorf("the plot does not say %q", want)
		}
	}
}
