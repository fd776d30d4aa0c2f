package layerstore

const (
	// wholeFile is the length of files of which all is fetched when some is read: who opens
	// a program or a library of this length reads most of it, here and there, and each
	// place would cost a round trip.
	wholeFile = 2 << 20
	// aheadLeast and aheadMost bound how far a sequential reader is decoded ahead of:
	// it doubles from the first to the second each time that he has come half way.
	// 8 MiB are 130 ms of a link of 500 Mbit/s, more than any round trip on it.
	aheadLeast = 512 << 10
	aheadMost  = 8 << 20
	// acrossFiles is how much somebody has to have read in a row before it is taken that he goes on
	// with the files that lie behind the one that he reads.
	acrossFiles = 1 << 20
	// maxFollowed is how many sequential readers of a layer are told apart.
	maxFollowed = 8
)

// follower is one place in a layer where somebody reads on.
type follower struct {
	next   int   // the chunk after what he read last
	end    int   // chunks before this one were asked for ahead of him
	window int64 // how far ahead, in bytes of data
	passed int64 // what he has read in a row, in bytes of data
}

// aheadLocked learns that somebody reads at off, in the chunks from first to last, which are missing or
// are marked, and has decoded what he will likely read next: the rest of a file that is not long,
// and what comes next when that continues an earlier read.
func (l *layer) aheadLocked(ld *loaded, off int64, first, last int) {
	begin, end := ld.file(off)
	var f follower
	for i, known := range l.followed {
		if first >= known.next-1 && first <= max(known.end, known.next) && last >= known.next {
			f = known
			f.window = min(max(2*f.window, aheadLeast), aheadMost)
			f.passed += l.chunks.ends[last] - l.chunks.start(f.next)
			l.followed = append(l.followed[:i], l.followed[i+1:]...)
			break
		}
	}
	if f.window == 0 {
		f.passed = l.chunks.ends[last] - l.chunks.start(first)
	}
	f.next = last + 1
	f.end = max(f.end, f.next)
	if len(l.followed) >= maxFollowed {
		l.followed = append(l.followed[:0], l.followed[1:]...)
	}
	switch to := l.chunks.ends[last] + f.window; {
	case f.window > 0 && (to <= end || f.passed >= acrossFiles):
		l.goAheadLocked(ld, &f, l.chunks.at(to), l.chunks.at(l.chunks.ends[last]+f.window/2))
	case end-begin <= wholeFile:
		l.coverLocked(ld, l.chunks.at(begin), l.chunks.at(end-1), Prefetch, false)
	case f.window > 0:
		l.goAheadLocked(ld, &f, l.chunks.at(end-1), l.chunks.at(end-1))
	}
	l.followed = append(l.followed, f)
}

// goAheadLocked has decoded what a reader will come to, and is called again when he comes to the chunk mark.
func (l *layer) goAheadLocked(ld *loaded, f *follower, to, mark int) {
	if f.next > to {
		return
	}
	l.coverLocked(ld, f.next, to, Prefetch, false)
	f.end = max(f.end, to+1)
	l.marks.set(mark)
}

// passed is called for a read at off of present chunks of which one was marked.
func (l *layer) passed(off int64, first, last int) {
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
		l.aheadLocked(ld, off, first, last)
	}
}
