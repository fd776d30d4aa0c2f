package rig

import (
	"fmt"
	"net/http"
	"strings"
)

// countingWriter counts a response's body and applies the faults that lie in it.
type countingWriter struct {
	http.ResponseWriter
	front   *front
	request *http.Request
	kind    Kind
	faults  Faults
	written int64
	offset  int64 // of the body's first byte in the blob
	status  int
}

// WriteHeader learns where in the blob the body begins.
func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	if r := w.Header().Get("Content-Range"); status == http.StatusPartialContent && strings.HasPrefix(r, "bytes ") {
		// A registry that is not understood here is served on: offset 0 only moves the corruption.
		_, _ = fmt.Sscanf(r, "bytes %d-", &w.offset)
	}
	if w.kind == Blobs && w.faults.WholeOnly {
		w.Header().Del("Accept-Ranges")
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	if w.status >= http.StatusMultipleChoices {
		return w.ResponseWriter.Write(p) // the words of an error are not the content asked for
	}
	if w.kind != Blobs || w.request.Method != http.MethodGet {
		n, err := w.ResponseWriter.Write(p)
		w.front.count(w.kind, w.request, n)
		return n, err
	}
	cut := false
	if limit := w.faults.CutAfter; limit > 0 && w.written+int64(len(p)) >= limit {
		p, cut = p[:limit-w.written], true
	}
	if w.faults.CorruptLen > 0 {
		p = w.corrupt(p)
	}
	n, err := w.ResponseWriter.Write(p)
	w.written += int64(n)
	w.front.count(w.kind, w.request, n)
	if cut {
		// What was written so far still goes out; then the connection is closed in the middle of the body.
		_ = http.NewResponseController(w.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return n, err
}

// corrupt returns p with the bytes inside the faults' window changed. p itself is the proxy's buffer and stays.
func (w *countingWriter) corrupt(p []byte) []byte {
	start := w.offset + w.written
	from := max(w.faults.CorruptAt, start)
	to := min(w.faults.CorruptAt+w.faults.CorruptLen, start+int64(len(p)))
	if from >= to {
		return p
	}
	changed := append([]byte(nil), p...)
	for i := from - start; i < to-start; i++ {
		changed[i] ^= 1
	}
	return changed
}

// Unwrap lets http.ResponseController find Flush.
func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
