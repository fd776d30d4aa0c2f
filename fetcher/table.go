package fetcher

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
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

// dispute is between who sent pieces and who says that they are wrong.
type dispute struct{ supplier, signer string }

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

// check holds a piece from a peer against the word about it.
func (t *table) check(i int, sum cluster.PieceSum, w word, peer string) error {
	if sum == w.sum {
		return nil
	}
	t.d.f.count.wrong.Add(1)
	t.d.log.Warn("a piece is not what was said of it", "piece", i, "from", peer, "said_by", w.by)
	t.d.wg.Go(func() { t.d.judge(i, w, peer) })
	return fmt.Errorf("%w: piece %d from %s is not what %s said of it", errPutOff, i, peer, w.by)
}

// judge finds out who is wrong about a piece, its supplier or who signed the word
// about it, by asking the registry. Without one the signer is believed until the
// blob's digest says otherwise: see swapSides.
func (d *download) judge(i int, w word, peer string) {
	d.mu.Lock()
	source := d.origin
	if d.originErr != nil || d.noRange {
		source = nil
	}
	d.mu.Unlock()
	if source != nil && !d.st.Has(i) {
		fl := &flight{first: i, last: i, done: make(chan struct{})}
		if err := d.demandOrigin(d.ctx, source, fl); err == nil {
			d.table.mu.Lock()
			sum, ok := d.table.sums[i]
			d.table.mu.Unlock()
			if ok && sum == w.sum {
				d.ban(peer)
				return
			}
			if ok {
				d.disbelieve(w.by)
				return
			}
		}
	}
	if peer != w.by && d.table.strike(dispute{peer, w.by}) {
		d.banFor(peer, Disputed)
	}
}

// strike counts a dispute; whether the supplier is out by it. Then it is not
// believed either: else it could have the signer out in turn, and nobody was left.
func (t *table) strike(p dispute) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.strikes[p]++; t.strikes[p] < strikesOut || t.sides[p.signer] != "" {
		return false
	}
	t.sides[p.supplier] = p.signer
	t.unsay(p.supplier)
	return true
}

// unsay drops what a node said of pieces that are not here. Called with t.mu held.
func (t *table) unsay(node string) {
	for i, w := range t.words {
		if w.by == node && !t.d.st.Has(i) {
			delete(t.words, i)
		}
	}
}

// takeTurns is for a fetch that nothing comes of, with peers that contradict each
// other and no registry to ask: one after the other is asked and believed alone. It
// reports whether that changed anything.
func (d *download) takeTurns(now time.Time) bool {
	if d.lastPiece.before(now) < stalledAfter {
		return false
	}
	t := d.table
	t.mu.Lock()
	if len(t.sides) == 0 || now.Sub(t.turned) < stalledAfter {
		t.mu.Unlock()
		return false
	}
	in := map[string]bool{}
	for supplier, signer := range t.sides {
		in[supplier], in[signer] = true, true
	}
	all := slices.Sorted(maps.Keys(in))
	t.turned = now
	t.turn++
	chosen := all[t.turn%len(all)]
	t.sides, t.strikes = map[string]string{}, map[dispute]int{}
	for _, node := range all {
		if node != chosen {
			t.sides[node] = chosen
			t.unsay(node)
		}
	}
	t.mu.Unlock()
	d.log.Info("peers contradict each other and nothing comes: another one is believed", "peer", chosen)
	d.forgive(chosen)
	for _, node := range all {
		if node != chosen {
			d.banFor(node, Disputed)
		}
	}
	return true
}

// forgive asks a peer again that was banned for a dispute.
func (d *download) forgive(node string) {
	d.mu.Lock()
	was := d.banned[node]
	delete(d.banned, node)
	delete(d.bannedFor, node)
	if h := d.helpers[node]; h != nil {
		h.fails, h.until = 0, time.Time{}
	}
	tor := d.tor
	if was {
		d.addPeers()
	}
	d.mu.Unlock()
	if was && tor != nil {
		tor.Unban(node)
	}
}

// swapSides is for a blob whose digest does not match and no registry to ask: in
// each dispute the signer was believed, and now the supplier is, unless there are
// pieces left from before the dispute to fetch again first. It reports whether
// there was a dispute.
func (d *download) swapSides() bool {
	t := d.table
	t.mu.Lock()
	before := map[int]bool{} // taken on the word of who was only later left out
	for i, w := range t.words {
		before[i] = t.sides[w.by] != "" && d.st.Has(i)
	}
	t.mu.Unlock()
	if d.drop(func(i int) bool { return before[i] && d.st.Source(i) == store.Peer }) > 0 {
		return true
	}
	t.mu.Lock()
	sides := t.sides
	t.sides, t.strikes = map[string]string{}, map[dispute]int{}
	t.mu.Unlock()
	for supplier, signer := range sides {
		d.forgive(supplier)
		d.mu.Lock()
		from := map[int]bool{}
		for i, s := range d.supplier {
			from[i] = s == signer
		}
		d.mu.Unlock()
		d.disbelieve(signer)
		d.drop(func(i int) bool { return from[i] })
	}
	return len(sides) > 0
}

// disbelieve drops all that a node said of the blob's pieces, with the pieces that
// were taken on its word, and asks it no more.
func (d *download) disbelieve(node string) {
	if node == d.f.id.ID() {
		return
	}
	t := d.table
	t.mu.Lock()
	was := t.liars[node]
	t.liars[node] = true
	said := map[int]bool{}
	for i, w := range t.words {
		if w.by == node {
			said[i] = true
			delete(t.words, i)
		}
	}
	t.mu.Unlock()
	if !was {
		d.log.Warn("peer said of pieces what they do not contain, and is not believed any more", "peer", node)
	}
	d.banFor(node, FalseTable)
	d.drop(func(i int) bool { return said[i] && d.st.Source(i) == store.Peer })
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
