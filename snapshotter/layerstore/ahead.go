package layerstore

const (
	// aheadLeast and aheadMost bound how far a sequential reader is decoded ahead of:
	// it doubles from the first to the second each time that he has come half way.
	// 8 MiB are 130 ms of a link of 500 Mbit/s, more than any round trip on it.
	aheadLeast = 512 << 10
	aheadMost  = 8 << 20
	// maxFollowed is how many sequential readers of a layer are told apart.
	maxFollowed = 8
)

// follower is one place in a layer where somebody reads on.
type follower struct {
	next   int   // the chunk after what he read last
	end    int   // chunks before this one were asked for ahead of him
	window int64 // how far ahead, in bytes of data
}

// aheadLocked learns that the chunks from first to last are read, which are missing or
// are marked, and has decoded what comes next when that continues an earlier read.
func (l *layer) aheadLocked(ld *loaded, first, last int) {
	var f follower
	for i, known := range l.followed {
		if first >= known.next-1 && first <= max(known.end, known.next) && last >= known.next {
			f = known
			f.window = min(max(2*f.window, aheadLeast), aheadMost)
			l.followed = append(l.followed[:i], l.followed[i+1:]...)
			break
		}
	}
	f.next = last + 1
	f.end = max(f.end, f.next)
	if len(l.followed) >= maxFollowed {
		l.followed = append(l.followed[:0], l.followed[1:]...)
	}
	if f.window > 0 && f.next < l.chunks.len() {
		to := l.chunks.at(l.chunks.ends[last] + f.window)
		l.coverLocked(ld, f.next, to, Prefetch, false)
		f.end = to + 1
		l.marks.set(l.chunks.at(l.chunks.ends[last] + f.window/2))
	}
	l.followed = append(l.followed, f)
}

// passed is called for a read of present chunks of which one was marked.
func (l *layer) passed(first, last int) {
	marked := false
	for c := first; c <= last; c++ {
		marked = l.marks.clear(c) || marked
	}
	if !marked {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.usableLocked(Prefetch) != nil {
		return
	}
	if ld, err := l.indexLocked(); err == nil {
		l.aheadLocked(ld, first, last)
	}
}
