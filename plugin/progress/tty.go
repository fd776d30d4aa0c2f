package progress

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"
)

// ttyInterval is the redraw throttle: ten times a second looks fluid, and costs a slow link (ssh) a few kB/s at most.
const ttyInterval = 100 * time.Millisecond

// ECMA-48 control sequences; every terminal that docker's own progress works on knows them.
const (
	cursorUp    = "\x1b[%dA"
	eraseLine   = "\x1b[K" // to the end of the line
	eraseBelow  = "\x1b[J" // to the end of the screen
	hideCursor  = "\x1b[?25l"
	showCursor  = "\x1b[?25h"
	minBarWidth = 10
	maxBarWidth = 30
	speedWidth  = 22 // "  999.9MB/s  ETA 1h2m3s"
)

// ttyRenderer redraws a block of lines in place. The block never grows past the height of the terminal, for a line that
// scrolled off can no longer be redrawn; blobs that do not fit are counted in one line.
type ttyRenderer struct {
	w      io.Writer
	size   func() (cols, rows int)
	drawn  []int // display widths of the lines of the block on screen
	hidden bool  // the cursor is
}

func (t *ttyRenderer) interval() time.Duration { return ttyInterval }

func (t *ttyRenderer) draw(f frame) {
	cols, rows := t.size()
	lines := ttyLines(f, cols, rows)
	var b bytes.Buffer
	if !t.hidden {
		b.WriteString(hideCursor)
		t.hidden = true
	}
	t.rewind(&b, cols)
	t.drawn = t.drawn[:0]
	for _, l := range lines {
		b.WriteString(l)
		b.WriteString(eraseLine + "\r\n")
		t.drawn = append(t.drawn, utf8.RuneCountInString(l))
	}
	b.WriteString(eraseBelow)
	if f.last {
		// The block stays on screen as it is and what follows goes below it.
		t.drawn = t.drawn[:0]
		b.WriteString(showCursor)
		t.hidden = false
	}
	_, _ = t.w.Write(b.Bytes())
}

// message writes above the block: it takes the block away, and the next draw puts it back.
func (t *ttyRenderer) message(text string) {
	cols, _ := t.size()
	var b bytes.Buffer
	t.rewind(&b, cols)
	t.drawn = t.drawn[:0]
	b.WriteString(eraseBelow + text + "\r\n")
	_, _ = t.w.Write(b.Bytes())
}

func (t *ttyRenderer) close() {
	if t.hidden {
		_, _ = io.WriteString(t.w, showCursor)
		t.hidden = false
	}
}

// rewind moves to the first line of the block. A terminal that became narrower since has wrapped our lines, so that each
// takes as many rows as its width needs now.
func (t *ttyRenderer) rewind(b *bytes.Buffer, cols int) {
	up := 0
	for _, w := range t.drawn {
		up += max(1, (w+cols-1)/cols)
	}
	if up > 0 {
		fmt.Fprintf(b, cursorUp, up)
	}
	b.WriteString("\r")
}

func ttyLines(f frame, cols, rows int) []string {
	if f.total.State == Waiting {
		return nil // nothing has begun; with an image that is there already, nothing will
	}
	total := []string{ttyLine(f.total, cols)}
	if s := split(f.total.Blob); s != "" && !strings.Contains(total[0], s) {
		// Who supplied how much is what the user came for: on a narrow terminal it has a line of its own.
		total = append(total, clip(fmt.Sprintf("%-12s  %s", "from", s), cols-1))
	}
	// One row is kept for the cursor below the block.
	room := max(1, rows-1-len(total))
	shown, more := pick(f.rows, room)
	var lines []string
	for _, r := range shown {
		lines = append(lines, ttyLine(r, cols))
	}
	if more != "" {
		lines = append(lines, clip(more, cols-1))
	}
	return append(lines, total...)
}

// pick chooses the rows that fit: what moves or failed first, then what waits, then what is complete; the order is
// kept. more counts the rest, "" when all fit.
func pick(rows []row, room int) (shown []row, more string) {
	if len(rows) <= room {
		return rows, ""
	}
	room-- // for the line that counts the rest
	take := make([]bool, len(rows))
	for _, states := range [][]State{{Failed, Fetching, Verifying}, {Waiting}, {Complete}} {
		for i, r := range rows {
			for _, s := range states {
				if r.State == s && room > 0 && !take[i] {
					take[i] = true
					room--
				}
			}
		}
	}
	rest := map[State]int{}
	hidden := 0
	for i, r := range rows {
		if take[i] {
			shown = append(shown, r)
			continue
		}
		rest[r.State]++
		hidden++
	}
	var parts []string
	for _, s := range []State{Complete, Waiting, Fetching, Verifying, Failed} {
		if rest[s] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", rest[s], s))
		}
	}
	return shown, fmt.Sprintf("... and %d more: %s", hidden, strings.Join(parts, ", "))
}

// ttyLine fits a row into cols columns. What is least needed is left out first: the split by source, the bar, the rate,
// the bytes. The last column stays free, for some terminals wrap at it.
func ttyLine(r row, cols int) string {
	cols--
	line := fmt.Sprintf("%-12s  %-9s", r.name, r.State)
	amount := fmt.Sprintf("  %17s", size(r.Have)+"/"+size(r.Size))
	speed := strings.Repeat(" ", speedWidth)
	switch {
	case r.State == Failed:
		speed = ""
	case r.rate > 0 && r.State != Complete:
		speed = fmt.Sprintf("  %10s  %-8s", size(int64(r.rate))+"/s", eta(r.eta))
	}
	tail := ""
	if s := split(r.Blob); s != "" {
		tail = "  " + s
	}
	if r.Note != "" {
		tail += "  " + r.Note
	}
	used := utf8.RuneCountInString(line)
	if used+len(amount) > cols {
		if r.Size > 0 {
			line += fmt.Sprintf("  %3d%%", r.Have*100/r.Size)
		}
		return clip(line, cols)
	}
	used += len(amount)
	if used+speedWidth > cols {
		speed = ""
	} else {
		used += speedWidth // also where there is none: bars are of one length
	}
	// The bar takes what it can, the tail has what is left; with both in need, the bar stays at its least width.
	bar := ""
	if free := cols - used - 3; free >= minBarWidth {
		w := min(maxBarWidth, max(minBarWidth, free-maxTail))
		bar = "  " + drawBar(r.Blob, w)
	}
	out := line + bar + amount + speed
	if free := cols - utf8.RuneCountInString(out); tail != "" && free > 12 {
		out += clip(tail, free)
	}
	return strings.TrimRight(clip(out, cols), " ")
}

// maxTail is the room kept for "cache 999.9MB, registry 999.9MB, peers 999.9MB" before the bar grows.
const maxTail = 50

func drawBar(b Blob, width int) string {
	inner := width - 2
	n := 0
	if b.Size > 0 {
		n = int(float64(inner) * float64(b.Have) / float64(b.Size))
	}
	n = min(max(n, 0), inner)
	fill := strings.Repeat("=", n)
	if n > 0 && n < inner {
		fill = fill[:n-1] + ">"
	}
	return "[" + fill + strings.Repeat(" ", inner-n) + "]"
}

// clip cuts s to n columns. Every rune we print is one column wide.
func clip(s string, n int) string {
	if n <= 0 {
		return ""
	}
	if utf8.RuneCountInString(s) <= n {
		return s
	}
	r := []rune(s)
	return string(r[:n])
}
