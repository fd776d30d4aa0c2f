package main

import (
	"fmt"
	"math"
	"strings"
)

// curve is the share of the nodes that have the blob, by step.
type curve struct {
	scenario   string
	nodes      int
	originMbit int
	done       []float64
}

func (c *curve) label() string {
	s := fmt.Sprintf("%s, %d nodes", c.scenario, c.nodes)
	if c.originMbit != 200 {
		s += fmt.Sprintf(", registry %d Mbit/s", c.originMbit)
	}
	return s
}

// Sizes of the drawing in pixels.
const (
	plotWidth, plotHeight = 560, 300
	plotLeft, plotTop     = 60, 50
	legendLine            = 18
)

// colours can be told apart on white and on black, also by most who are colour-blind; dashes help where they come round again.
var colours = []string{"#4477aa", "#ee6677", "#228833", "#aa8800", "#0099bb", "#aa3377", "#888888"}

// drawing is the SVG: who is done when, and copies against nodes.
func drawing(rows []row, curves []curve) []byte {
	var b strings.Builder
	height := plotTop + plotHeight + 70 + legendLine*max(len(curves), 6)
	width := 2*(plotLeft+plotWidth) + 60
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="sans-serif" font-size="13">
<style>
  svg { color: #222; background: #fff }
  @media (prefers-color-scheme: dark) { svg { color: #ddd; background: #111 } }
  text { fill: currentColor } .axis { stroke: currentColor; fill: none } .grid { stroke: currentColor; opacity: .15 }
  .title { font-size: 16px }
</style>
`, width, height, width, height)
	drawCurves(&b, curves)
	drawCopies(&b, rows)
	b.WriteString("</svg>\n")
	return []byte(b.String())
}

// frame draws the axes of a plot at x, with its title and the names of the axes.
func frame(b *strings.Builder, x int, title, across, up string) {
	fmt.Fprintf(b, `<text class="title" x="%d" y="%d">%s</text>
<path class="axis" d="M%d %dv%dh%d"/>
<text x="%d" y="%d" text-anchor="middle">%s</text>
<text transform="translate(%d %d) rotate(-90)" text-anchor="middle">%s</text>
`, x, plotTop-20, title, x, plotTop, plotHeight, plotWidth, x+plotWidth/2, plotTop+plotHeight+40, across, x-44, plotTop+plotHeight/2, up)
}

func markAcross(b *strings.Builder, x, at float64, label string) {
	fmt.Fprintf(b, `<path class="grid" d="M%.1f %dv%d"/><text x="%.1f" y="%d" text-anchor="middle">%s</text>
`, x+at, plotTop, plotHeight, x+at, plotTop+plotHeight+18, label)
}

func markUp(b *strings.Builder, x, at float64, label string) {
	y := plotTop + plotHeight - at
	fmt.Fprintf(b, `<path class="grid" d="M%.1f %.1fh%d"/><text x="%.1f" y="%.1f" text-anchor="end">%s</text>
`, x, y, plotWidth, x-6, y+4, label)
}

func drawCurves(b *strings.Builder, curves []curve) {
	frame(b, plotLeft, "A blob of 256 MiB, links of 200 Mbit/s: who has it when", "seconds since the first start", "nodes that have it, in percent")
	longest := 1.0
	for _, c := range curves {
		longest = max(longest, float64(len(c.done))*step.Seconds())
	}
	for t := 0.0; t <= longest; t += max(5, math.Ceil(longest/40)*5) {
		markAcross(b, plotLeft, t/longest*plotWidth, fmt.Sprint(t))
	}
	for p := 0; p <= 100; p += 25 {
		markUp(b, plotLeft, float64(p)/100*plotHeight, fmt.Sprint(p))
	}
	for i, c := range curves {
		colour, dash := colours[i%len(colours)], []string{"none", "6 3", "2 3"}[i/len(colours)%3]
		var points strings.Builder
		last := -1.0
		for k, done := range c.done {
			if done != last || k == len(c.done)-1 {
				if k > 0 && last >= 0 {
					fmt.Fprintf(&points, "%.1f,%.1f ", at(k-1, longest), plotTop+plotHeight*(1-last))
				}
				fmt.Fprintf(&points, "%.1f,%.1f ", at(k, longest), plotTop+plotHeight*(1-done))
				last = done
			}
		}
		fmt.Fprintf(b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2" stroke-dasharray="%s"/>
`, strings.TrimSpace(points.String()), colour, dash)
		legend(b, plotLeft, i, colour, dash, c.label())
	}
}

func at(k int, longest float64) float64 {
	return plotLeft + float64(k)*step.Seconds()/longest*plotWidth
}

func legend(b *strings.Builder, x, i int, colour, dash, label string) {
	y := plotTop + plotHeight + 66 + i*legendLine
	fmt.Fprintf(b, `<path d="M%d %dh24" stroke="%s" stroke-width="2" stroke-dasharray="%s"/><text x="%d" y="%d">%s</text>
`, x, y-4, colour, dash, x+32, y, label)
}

func drawCopies(b *strings.Builder, rows []row) {
	x := float64(2*plotLeft + plotWidth + 20)
	frame(b, int(x), "What the registry sends", "nodes", "copies of the blob")
	most := 1.5
	for _, r := range rows {
		most = max(most, r.Copies)
	}
	across := func(nodes int) float64 { return (math.Log10(float64(nodes)) - 0.8) / 3.4 * plotWidth }
	for _, n := range []int{10, 100, 1000, 10000} {
		markAcross(b, x, across(n), fmt.Sprint(n))
	}
	for c := 0.0; c <= most; c += math.Ceil(most/1.5) * 0.25 {
		markUp(b, x, c/most*plotHeight, fmt.Sprint(c))
	}
	y := plotTop + plotHeight*(1-acceptCopies/most)
	fmt.Fprintf(b, `<path d="M%.1f %.1fh%d" class="axis" stroke-dasharray="4 4"/><text x="%.1f" y="%.1f">asked for: %v</text>
`, x, y, plotWidth, x+8, y-6, acceptCopies)
	for i, name := range []string{"crowd", "rolling", "churn", "liars"} {
		for _, r := range rows {
			if r.Scenario == name {
				fmt.Fprintf(b, `<circle cx="%.1f" cy="%.1f" r="5" fill="%s" fill-opacity=".8"/>
`, x+across(r.Nodes), plotTop+plotHeight*(1-r.Copies/most), colours[i])
			}
		}
		fmt.Fprintf(b, `<circle cx="%.1f" cy="%d" r="5" fill="%s"/><text x="%.1f" y="%d">%s</text>
`, x+12, plotTop+plotHeight+62+i*legendLine, colours[i], x+32, plotTop+plotHeight+66+i*legendLine, map[string]string{
			"crowd": "all within 0.1 s", "rolling": "over 30 s", "churn": "a tenth dies at half time, the keeper among them",
			"liars": "one in a hundred claims to hold everything",
		}[name])
	}
}
