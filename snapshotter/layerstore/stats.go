package layerstore

import (
	"sync/atomic"
	"time"
)

// Stats says what became of a layer since the store was opened.
type Stats struct {
	Chunks       int
	Present      int   // of the chunks
	PresentBytes int64 // of the data file
	Complete     bool
	Demand       int64         // reads that met a missing chunk
	Waits        int64         // reads that had to wait
	Waited       time.Duration // by all of them together
	FetchedBytes int64         // asked of the source
	DecodedBytes int64         // handed out by decoders
	DecodedTwice int64         // chunks that were present before: those between a place where decoding can begin and what was wanted
	Failures     int64         // decoders that failed
	Why          string        // it is not complete: one sentence; "" when it is
}

type counters struct {
	demand, waits, waited, fetched, decoded, twice, failures atomic.Int64
	lastErr                                                  atomic.Pointer[string]
}

// Stats counts what was done for this layer.
func (h *Layer) Stats() Stats {
	l := h.l
	st := Stats{
		Chunks:       l.chunks.len(),
		Complete:     l.complete.Load(),
		Demand:       l.stats.demand.Load(),
		Waits:        l.stats.waits.Load(),
		Waited:       time.Duration(l.stats.waited.Load()),
		FetchedBytes: l.stats.fetched.Load(),
		DecodedBytes: l.stats.decoded.Load(),
		DecodedTwice: l.stats.twice.Load(),
		Failures:     l.stats.failures.Load(),
	}
	if l.full.Load() {
		st.Present, st.PresentBytes = st.Chunks, l.info.DataSize
	} else {
		for c := range st.Chunks {
			if l.has.has(c) {
				st.Present++
				st.PresentBytes += l.chunks.size(c)
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch last := l.stats.lastErr.Load(); {
	case st.Complete:
	case st.Present == st.Chunks:
		st.Why = "all is there and waits to be synced"
	case l.removed:
		st.Why = "the layer was removed while it was in use"
	case len(l.runs) > 0:
		st.Why = "it is being decoded"
	case last != nil:
		st.Why = *last
	default:
		st.Why = "nobody has asked for the rest"
	}
	return st
}
