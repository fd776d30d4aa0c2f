package fetcher

import (
	"slices"
	"sync"
	"time"
)

// delays remembers how long the last ranged reads from peers took.
type delays struct {
	mu   sync.Mutex // guards following
	last [128]time.Duration
	n    int
}

func (l *delays) add(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last[l.n%len(l.last)] = d
	l.n++
}

// hedge is how long to wait for a peer before the next source is asked as well.
func (l *delays) hedge() time.Duration {
	p99, n := l.percentile(99)
	if n < hedgeKnown {
		return hedgeAfter
	}
	return min(max(hedgeFactor*p99, hedgeLeast), hedgeMost)
}

// percentile returns the p-th percentile of what is remembered, and of how many.
func (l *delays) percentile(p int) (time.Duration, int) {
	l.mu.Lock()
	n := min(l.n, len(l.last))
	all := slices.Clone(l.last[:n])
	l.mu.Unlock()
	if n == 0 {
		return 0, 0
	}
	slices.Sort(all)
	return all[min(n*p/100, n-1)], n
}
