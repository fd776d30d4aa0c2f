package fetcher

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
)

const (
	// tableWait is how long a piece that came from a peer waits for what it is to
	// be checked against. It is asked for together with the piece, from a node
	// that has both, and is a thousandth of its size.
	tableWait = 2 * time.Second
	// tableMost bounds the pieces of one question.
	tableMost = 256
	// ownMost bounds the pieces a complete node sums up for one question, since it
	// has to read them: 64 of 256 KiB take 10 ms.
	ownMost = 64
	// signRow is how many pieces in a row one signature covers, at most: 16 MiB of a
	// small blob, half a kilobyte.
	signRow = 64
	// strikesOut is how many pieces of a node must have differed from what another
	// one said of them before it is not asked any more, for a time, while no
	// registry can tell which of the two is right.
	strikesOut = 3
)

var (
	// errNoWord: no member that is to be believed says what a piece contains.
	errNoWord = errors.New("nobody vouches for the piece")
	// errPutOff: a piece came, and is not taken now. Whether that is a fault of who sent
	// it others judge.
	errPutOff = errors.New("the piece is not taken now")
)

// word is what a member says one piece contains.
type word struct {
	sum  cluster.PieceSum
	by   string             // node ID of the signer
	said *cluster.Statement // to pass on
}

// table is the piece table of one blob: what those who got a piece from the
// registry, or have checked the whole blob, say it contains. A piece from a peer
// is held against it before it counts and is passed on. The table itself is only
// as good as its signers: the blob's digest decides in the end, and then shows who
// signed what was wrong.
type table struct {
	d *download

	mu      sync.Mutex // a leaf; guards following
	sums    map[int]cluster.PieceSum
	words   map[int]word
	changed chan struct{} // closed at the next change of words
	liars   map[string]bool
	strikes map[dispute]int
	sides   map[string]string // who is neither asked nor believed → who is instead
	turned  time.Time         // when sides were last changed for want of progress
	turn    int
	tried   map[string]bool // peers that were believed in everything, in vain
}

func newTable(d *download) *table {
	return &table{
		d: d, sums: map[int]cluster.PieceSum{}, words: map[int]word{}, changed: make(chan struct{}),
		liars: map[string]bool{}, strikes: map[dispute]int{}, sides: map[string]string{}, tried: map[string]bool{},
	}
}

// own notes a piece that this node got from the registry.
func (t *table) own(i int, p []byte) {
	if t.d.noPeers {
		return
	}
	sum := sha256.Sum256(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sums[i] = sum
}

// forget drops what is known of a piece.
func (t *table) forget(i int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.sums, i)
	delete(t.words, i)
}

// statements returns what this node can say of pieces: what it got from the
// registry, what it was told, and, of a complete blob, anything.
func (t *table) statements(pieces []int) []cluster.Statement {
	if len(pieces) > tableMost {
		pieces = pieces[:tableMost]
	}
	complete := t.d.st.Complete()
	var said []cluster.Statement
	var sign []int
	seen := map[*cluster.Statement]bool{}
	read := 0
	t.mu.Lock()
	for _, i := range pieces {
		if w, ok := t.words[i]; ok {
			if !seen[w.said] {
				seen[w.said] = true
				said = append(said, *w.said)
			}
			continue
		}
		if _, ok := t.sums[i]; ok {
			sign = t.row(sign, i)
		} else if complete && i < t.d.pieces && read < ownMost {
			read++
			sign = append(sign, i)
		}
	}
	t.mu.Unlock()
	if s := t.sign(sign); s != nil {
		said = append(said, *s)
	}
	return said
}

// row adds piece i to those that are to be signed, and with it all of its row of
// which the sums are known: one signature then does for reads nearby as well.
// Called with t.mu held.
func (t *table) row(sign []int, i int) []int {
	for j, end := i-i%signRow, min(i-i%signRow+signRow, t.d.pieces); j < end; j++ {
		_, signed := t.words[j]
		if _, ok := t.sums[j]; ok && !signed {
			sign = append(sign, j)
		}
	}
	return sign
}

// sign makes a statement of this node's about pieces it vouches for.
func (t *table) sign(pieces []int) *cluster.Statement {
	slices.Sort(pieces)
	pieces = slices.Compact(pieces)
	pieces = pieces[:min(len(pieces), tableMost)]
	sums := make([]cluster.PieceSum, 0, len(pieces))
	able := pieces[:0:0]
	for _, i := range pieces {
		t.mu.Lock()
		sum, ok := t.sums[i]
		t.mu.Unlock()
		if !ok {
			var err error
			if sum, err = t.sumUp(i); err != nil {
				continue
			}
		}
		able, sums = append(able, i), append(sums, sum)
	}
	if len(able) == 0 {
		return nil
	}
	s := cluster.Sign(t.d.f.id, t.d.desc.Digest, t.d.desc.Size, able, sums)
	t.mu.Lock()
	defer t.mu.Unlock()
	for k, i := range able {
		if _, ok := t.words[i]; !ok {
			t.words[i] = word{sums[k], t.d.f.id.ID(), &s}
		}
	}
	return &s
}

// sumUp reads a piece of a complete blob.
func (t *table) sumUp(i int) (cluster.PieceSum, error) {
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	off, n := t.d.st.PieceRange(i)
	p := (*bp)[:n]
	if _, err := t.d.st.ReadAt(p, off); err != nil {
		return cluster.PieceSum{}, err
	}
	return sha256.Sum256(p), nil
}

// learn takes in statements, of which those about pieces nothing is known of yet
// are checked and kept. It returns how many pieces are new.
func (t *table) learn(said []cluster.Statement) (n int) {
	for k := range said {
		s := &said[k]
		t.mu.Lock()
		news := slices.ContainsFunc(s.Pieces, func(i int) bool { _, ok := t.words[i]; return !ok && i < t.d.pieces })
		t.mu.Unlock()
		if !news {
			continue
		}
		if !s.Verify(t.d.desc.Digest, t.d.desc.Size) {
			t.d.log.Warn("a piece table whose signature is false is ignored", "named", s.By)
			continue
		}
		t.mu.Lock()
		if !t.liars[s.By] && t.sides[s.By] == "" {
			for at, i := range s.Pieces {
				if _, ok := t.words[i]; !ok && i < t.d.pieces {
					t.words[i] = word{s.Sums[at], s.By, s}
					n++
				}
			}
		}
		t.mu.Unlock()
	}
	if n > 0 {
		t.mu.Lock()
		close(t.changed)
		t.changed = make(chan struct{})
		t.mu.Unlock()
	}
	return n
}

// ask asks a node about pieces.
func (t *table) ask(ctx context.Context, node string, pieces []int) {
	d := t.d
	d.mu.Lock()
	m, ok := d.memberOf(node)
	d.mu.Unlock()
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, tableWait)
	defer cancel()
	said, err := d.f.cluster.Statements(ctx, m, d.desc.Digest, d.desc.Size, pieces)
	if err != nil {
		if ctx.Err() == nil {
			d.log.Debug("no piece table", "peer", m.ID, "err", err)
		}
		return
	}
	t.learn(said)
}

// wait returns the word about a piece that came from a peer, which is asked for it
// first when it is not here.
func (t *table) wait(ctx context.Context, i int, from string) (word, error) {
	ctx, cancel := context.WithTimeout(ctx, tableWait)
	defer cancel()
	asked := false
	for {
		t.mu.Lock()
		w, ok := t.words[i]
		changed := t.changed
		t.mu.Unlock()
		switch {
		case ok:
			return w, nil
		case !asked:
			asked = true
			t.ask(ctx, from, []int{i})
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return word{}, fmt.Errorf("piece %d: %w", i, errNoWord)
		}
	}
}

// knows reports whether there is a word about each piece from first to last.
func (t *table) knows(first, last int) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := first; i <= last; i++ {
		if _, ok := t.words[i]; !ok {
			return false
		}
	}
	return true
}

// signer returns whose word a piece was taken on, "" when on nobody's.
func (t *table) signer(i int) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.words[i].by
}
