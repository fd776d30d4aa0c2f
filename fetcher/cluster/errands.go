package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"sync"
	"time"
)

const (
	// questionRead bounds the time to read a question, answerWrite the time to
	// write an answer or a beat: a member that reads slower than 1 MB/s does not hold a place.
	questionRead = 5 * time.Second
	answerWrite  = 10 * time.Second
)

// gate counts what is under way for others.
type gate struct {
	most, each int

	mu sync.Mutex // guards following
	n  int
	by map[string]int // by node ID; those with none are not in it
}

// enter takes a place for a member; ok is false when there is none.
func (g *gate) enter(id string) (leave func(), ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.n >= g.most || g.by[id] >= g.each {
		return nil, false
	}
	if g.by == nil {
		g.by = map[string]int{}
	}
	g.n++
	g.by[id]++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.n--
		if g.by[id]--; g.by[id] == 0 {
			delete(g.by, id)
		}
	}, true
}

// serveErrands adds the endpoints for members without a way to a registry.
func (c *Cluster) serveErrands(mux *http.ServeMux) {
	resolve := &gate{most: questions, each: questionsEach}
	fetch := &gate{most: errands, each: errandsEach}
	mux.HandleFunc("POST /quay/v1/resolve", func(w http.ResponseWriter, r *http.Request) {
		var q Question
		from, leave, ok := c.admit(w, r, resolve, &q, q.validate)
		if !ok {
			return
		}
		defer leave()
		ctx, cancel := context.WithTimeout(r.Context(), AnswerWithin)
		defer cancel()
		a := c.o.Errands.Resolve(ctx, from, q)
		control := http.NewResponseController(w)
		_ = control.SetWriteDeadline(time.Now().Add(answerWrite))
		respond(w, a)
		_ = control.Flush()
		_ = control.SetWriteDeadline(time.Time{}) // the connection may serve slow reads of blobs next
	})
	mux.HandleFunc("POST /quay/v1/fetch", func(w http.ResponseWriter, r *http.Request) {
		var e Errand
		from, leave, ok := c.admit(w, r, fetch, &e, e.validate)
		if !ok {
			return
		}
		defer leave()
		c.runErrand(w, r, from, e)
	})
}

// admit reads a message of a member that may have a place. It answers itself when
// it does not let the message in.
func (c *Cluster) admit(w http.ResponseWriter, r *http.Request, g *gate, msg any, validate func() error) (from string, leave func(), ok bool) {
	if c.o.Errands == nil {
		http.Error(w, ErrNoErrands.Error(), http.StatusNotImplemented)
		return "", nil, false
	}
	if r.TLS == nil {
		http.Error(w, "no TLS", http.StatusForbidden)
		return "", nil, false
	}
	from, err := c.o.PeerID(*r.TLS)
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
		return "", nil, false
	}
	leave, ok = g.enter(from)
	if !ok {
		w.Header().Set("Retry-After", "1")
		http.Error(w, ErrBusy.Error(), http.StatusTooManyRequests)
		return "", nil, false
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(questionRead))
	err = decodeWithin(r.Body, maxQuestion, msg)
	if err == nil {
		err = validate()
	}
	if err != nil {
		leave()
		http.Error(w, err.Error(), http.StatusBadRequest)
		return "", nil, false
	}
	// Else the deadline would look like the end of the connection.
	_ = control.SetReadDeadline(time.Time{})
	return from, leave, true
}

// runErrand runs an errand and tells of it, until it is over or who asked has gone.
func (c *Cluster) runErrand(w http.ResponseWriter, r *http.Request, from string, e Errand) {
	ctx, cancel := context.WithTimeout(r.Context(), errandLimit)
	defer cancel()
	begun := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		var once sync.Once
		done <- c.o.Errands.RunErrand(ctx, from, e, func() { once.Do(func() { close(begun) }) })
	}()
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	tell := func(b beat) {
		_ = control.SetWriteDeadline(time.Now().Add(answerWrite))
		err := json.NewEncoder(w).Encode(b)
		if err == nil {
			err = control.Flush()
		}
		_ = control.SetWriteDeadline(time.Time{})
		if err != nil {
			cancel() // nobody listens any more
		}
	}
	tick := time.NewTicker(errandBeat)
	defer tick.Stop()
	started := false
	for {
		select {
		case <-begun:
			begun, started = nil, true
			tell(beat{State: errandBegun})
		case <-tick.C:
			if started {
				tell(beat{State: errandBegun})
			}
		case err := <-done:
			var refusal *Refusal
			switch {
			case err == nil:
				tell(beat{State: errandDone})
			case errors.As(err, &refusal):
				tell(beat{Refusal: refusal})
			default:
				tell(beat{Refusal: NewRefusal("failed", err)})
			}
			return
		}
	}
}
