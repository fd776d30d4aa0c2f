package progress

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/moby/term"
)

// Options say where and how to report.
type Options struct {
	Mode Mode
	Out  io.Writer // progress and messages: standard error
	Data io.Writer // the result: standard output

	// Size returns the columns and rows of the terminal behind Out; asked again at every redraw, so that a resized
	// window needs no signal. Nil means Out is no terminal (Auto becomes Plain).
	Size func() (cols, rows int)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// TerminalSize returns a Size function when w is a terminal, else nil. A dumb terminal (TERM=dumb) cannot move its
// cursor and counts as none.
func TerminalSize(w io.Writer) func() (cols, rows int) {
	type descriptor interface{ FD() uintptr }
	type file interface{ Fd() uintptr }
	var fd uintptr
	switch f := w.(type) {
	case descriptor: // docker's streams.Out
		fd = f.FD()
	case file:
		fd = f.Fd()
	default:
		return nil
	}
	if !term.IsTerminal(fd) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	return func() (int, int) {
		ws, err := term.GetWinsize(fd)
		if err != nil || ws.Width == 0 || ws.Height == 0 {
			return defaultCols, defaultRows
		}
		return int(ws.Width), int(ws.Height)
	}
}

// What a terminal that does not tell its size is taken for: the VT100's.
const (
	defaultCols = 80
	defaultRows = 24
)

// A renderer draws frames and messages in one mode. Calls are serialized by the Reporter.
type renderer interface {
	draw(frame)
	message(text string)
	// interval is how often to poll: the throttle of this mode.
	interval() time.Duration
	// close leaves the stream as it was found (cursor shown, at the start of a line).
	close()
}

// Reporter shows the progress of one image. All methods may be called concurrently.
type Reporter struct {
	mode Mode
	out  io.Writer
	data io.Writer
	now  func() time.Time

	mu       sync.Mutex
	renderer renderer // guarded by mu
	meter    meter    // guarded by mu
	poll     func() []Blob
	begun    time.Time
	stop     chan struct{} // non-nil while run is alive
	done     chan struct{}
	closed   bool
}

// New makes a reporter. Nothing is shown until Say or Start.
func New(o Options) *Reporter {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Data == nil {
		o.Data = io.Discard
	}
	if o.Out == nil {
		o.Out = io.Discard
	}
	mode := o.Mode
	if mode == Auto || mode == "" {
		mode = Plain
		if o.Size != nil {
			mode = TTY
		}
	}
	r := &Reporter{mode: mode, out: o.Out, data: o.Data, now: o.Now}
	switch mode {
	case TTY:
		size := o.Size
		if size == nil {
			size = func() (int, int) { return defaultCols, defaultRows }
		}
		r.renderer = &ttyRenderer{w: o.Out, size: size}
	case JSON:
		r.renderer = &jsonRenderer{w: o.Out, now: o.Now}
	case Quiet:
		r.renderer = quietRenderer{}
	default:
		r.renderer = &plainRenderer{w: o.Out}
	}
	return r
}

// Mode tells the mode in force, never Auto.
func (r *Reporter) Mode() Mode { return r.mode }

// Say shows a message: a line of its own above whatever is being redrawn, an object of type "message" in JSON, nothing
// when quiet.
func (r *Reporter) Say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.renderer.message(printable(fmt.Sprintf(format, args...)))
}

// Start begins to poll and to draw until Stop. The order of the blobs is the order of the lines. A second Start
// replaces what is polled.
func (r *Reporter) Start(poll func() []Blob) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.poll = poll
	if r.closed || r.stop != nil {
		return
	}
	r.begun = r.now()
	r.stop, r.done = make(chan struct{}), make(chan struct{})
	go r.run(r.stop, r.done)
}

// Stop polls and draws once more, so that the last line is the final state, and waits for the drawing goroutine to end.
// Start may follow.
func (r *Reporter) Stop() {
	r.mu.Lock()
	stop, done := r.stop, r.done
	r.stop = nil
	r.mu.Unlock()
	if stop == nil {
		return
	}
	close(stop)
	<-done
	r.tick(true)
}

// Close stops and puts the terminal right. It is safe from a signal handler's goroutine and may be called repeatedly;
// what is said afterwards is dropped.
func (r *Reporter) Close() {
	r.Stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		r.renderer.close()
	}
}

func (r *Reporter) run(stop <-chan struct{}, done chan<- struct{}) {
	defer close(done)
	t := time.NewTicker(r.renderer.interval())
	defer t.Stop()
	r.tick(false)
	for {
		select {
		case <-stop:
			return
		case <-t.C:
			r.tick(false)
		}
	}
}

func (r *Reporter) tick(last bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.poll == nil {
		return
	}
	now := r.now()
	r.renderer.draw(r.meter.frame(now, now.Sub(r.begun), r.poll(), last))
}

type quietRenderer struct{}

func (quietRenderer) draw(frame)     {}
func (quietRenderer) message(string) {}
func (quietRenderer) close()         {}

// interval: nobody looks, so that polling is only kept alive.
func (quietRenderer) interval() time.Duration { return time.Minute }
