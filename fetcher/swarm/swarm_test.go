package swarm

import (
	"errors"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"
)

// The infohash is how nodes of all versions find each other: these values never change.
func TestInfohashGolden(t *testing.T) {
	d := digest.FromString("docker quay")
	for _, c := range []struct {
		size, piece int64
		want        string
	}{
		{1, 256 << 10, "1a217c81288c2ff805bf5d7f1dae8291ad6f321f"},
		{10_000_000, 256 << 10, "6e950674ac05e03a339093aad6d6d0340aafdbce"},
		{3 << 30, 1 << 20, "13336f189b4379bad3833aec984b9f4ebf3cdfc9"},
	} {
		if got := Infohash(d, c.size, c.piece).HexString(); got != c.want {
			t.Errorf("%d bytes in pieces of %d: %s, want %s", c.size, c.piece, got, c.want)
		}
	}
	seen := map[string]bool{}
	for _, h := range []string{
		Infohash(d, 100, 10).HexString(), Infohash(d, 101, 10).HexString(), Infohash(d, 100, 11).HexString(),
		Infohash(digest.FromString("other"), 100, 10).HexString(), Infohash(digest.SHA512.FromString("docker quay"), 100, 10).HexString(),
	} {
		if seen[h] {
			t.Error("two blobs share an infohash")
		}
		seen[h] = true
	}
}

func TestSeederToLeecher(t *testing.T) {
	b := newBlob(8<<20+12345, 1)
	seeder, leecher := newNode(t), newNode(t)
	ms, ml := newMemory(b).fillAll(), newMemory(b)
	ts, tl := seeder.add(t, ms), leecher.add(t, ml)
	if ts.Infohash() != tl.Infohash() || ts.Infohash() != Infohash(b.digest, int64(len(b.data)), pieceSize) {
		t.Error("infohashes differ")
	}
	if st := ts.lib.Stats(); st.BytesHashed.Int64() != 0 {
		t.Errorf("%v bytes were hashed at Add", &st.BytesHashed)
	}
	tl.AddPeers(addrs(seeder, leecher)) // itself among them
	tl.AddPeers(addrs(seeder))
	wait(t, "availability", func() bool { return tl.Availability()[0] == 1 })
	wantAll(tl)
	wait(t, "complete", ml.complete)
	ml.check(t)
	for i, from := range ml.from {
		if from != seeder.id.ID() && ml.held[i] {
			t.Errorf("piece %d is said to come from %q, want %q", i, from, seeder.id.ID())
		}
	}
	s := tl.Stats()
	if s.Downloaded != int64(len(b.data)) || s.Wasted != 0 || s.Uploaded != 0 || s.Err != nil ||
		s.PerPeer[seeder.id.ID()] != s.Downloaded || len(s.PerPeer) != 1 {
		t.Errorf("leecher %+v", s)
	}
	if s := ts.Stats(); s.Uploaded != int64(len(b.data)) || s.Downloaded != 0 || len(s.PerPeer) != 0 {
		t.Errorf("seeder %+v", s)
	}
	wait(t, "both complete, no connection", func() bool { return tl.Stats().Peers == 0 && ts.Stats().Peers == 0 })
	if _, err := leecher.Add(b.digest, int64(len(b.data)), pieceSize, ml); !errors.Is(err, ErrExists) {
		t.Errorf("second Add: %v", err)
	}
}

// Only what is wanted arrives (and at most the one piece that the swarm wishes for itself), also after Unwant.
func TestWantIsAWindow(t *testing.T) {
	b := newBlob(8<<20, 2)
	seeder, leecher := newNode(t), newNode(t)
	ml := newMemory(b)
	seeder.add(t, newMemory(b).fillAll())
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	tl.Want(3)
	tl.Want(31)
	tl.Want(7)
	tl.Unwant(7)
	wait(t, "pieces 3 and 31", func() bool { return ml.Has(3) && ml.Has(31) })
	never(t, "a piece arrives that nobody wants", 500*time.Millisecond, func() bool { return len(ml.marked) > 2 })
	tl.Want(7)
	wait(t, "piece 7", func() bool { return ml.Has(7) })
}

// Each of three nodes has a third, as when each fetched its share from the origin; all complete, with one copy up per copy down.
func TestThreeNodesCompleteEachOther(t *testing.T) {
	b := newBlob(12<<20, 3)
	var nodes []*node
	for range 3 {
		nodes = append(nodes, newNode(t))
	}
	var mem []*memory
	var tor []*Torrent
	for k, n := range nodes {
		m := newMemory(b)
		for i := k; i < b.pieces(); i += 3 {
			m.fill(i)
		}
		mem = append(mem, m)
		tor = append(tor, n.add(t, m))
	}
	for k := range nodes {
		tor[k].AddPeers(addrs(nodes...))
		wantAll(tor[k])
	}
	for k := range nodes {
		wait(t, "all complete", mem[k].complete)
		mem[k].check(t)
	}
	for k := range nodes {
		s := tor[k].Stats()
		if want := int64(len(b.data)) * 2 / 3; s.Downloaded < want-pieceSize || s.Downloaded > want+pieceSize {
			t.Errorf("node %d downloaded %d, want about %d", k, s.Downloaded, want)
		}
	}
}

// Pieces that come from elsewhere while the torrent runs are announced, and asked for by those who wait.
func TestHaveIsAnnounced(t *testing.T) {
	b := newBlob(4<<20, 4)
	src, dst := newNode(t), newNode(t)
	ms, md := newMemory(b), newMemory(b)
	ts, td := src.add(t, ms), dst.add(t, md)
	td.AddPeers(addrs(src))
	wantAll(td)
	wait(t, "connection", func() bool { return td.Stats().Peers == 1 })
	for i := range b.pieces() {
		ms.fill(i)
		ts.Have(i)
		ts.Have(i)
	}
	wait(t, "complete", md.complete)
	md.check(t)
}

// A piece that the origin gives while peers are giving it, too, is no trouble.
func TestPieceArrivesTwice(t *testing.T) {
	b := newBlob(8<<20, 5)
	seeder, leecher := newNode(t), newNode(t)
	ml := newMemory(b)
	seeder.add(t, newMemory(b).fillAll())
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	wantAll(tl)
	for i := b.pieces() - 1; i >= 0; i-- {
		if !ml.Has(i) {
			ml.fill(i)
			tl.Have(i)
		}
	}
	wait(t, "complete", func() bool { return ml.complete() && tl.missingPieces() == 0 })
	if s := tl.Stats(); s.Err != nil {
		t.Errorf("storage trouble: %v", s.Err)
	}
	ml.check(t)
}

func (t *Torrent) missingPieces() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.missing
}

func TestLostPieceIsFetchedAgain(t *testing.T) {
	t.Parallel()
	b := newBlob(2<<20, 6)
	seeder, leecher := newNode(t), newNode(t)
	ml := newMemory(b)
	seeder.add(t, newMemory(b).fillAll())
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	wantAll(tl)
	wait(t, "complete", ml.complete)
	wait(t, "asleep", func() bool { return tl.missingPieces() == 0 })
	ml.mu.Lock()
	ml.held[2] = false
	clear(ml.data[2*pieceSize : 3*pieceSize])
	ml.mu.Unlock()
	tl.Lost(2)
	tl.Lost(2)
	never(t, "an unwanted piece", 300*time.Millisecond, func() bool { return ml.Has(2) })
	tl.Want(2)
	wait(t, "piece 2", func() bool { return ml.Has(2) })
	ml.check(t)
}

// Two cold nodes; the second learns of the blob 3 s after the first, which has been dialling it in vain.
func TestColdNodesFindEachOther(t *testing.T) {
	t.Parallel()
	b := newBlob(1<<20, 7)
	type pair struct {
		name          string
		early, late   bool // who knows the other's address
		earlyHas      bool // almost all; else nobody has or wants anything
		nodeE, nodeL  *node
		earlyT, lateT *Torrent
	}
	pairs := []*pair{
		{name: "both know each other", early: true, late: true, earlyHas: true},
		{name: "only the early one knows the late", early: true, earlyHas: true},
		{name: "only the late one knows the early", late: true, earlyHas: true},
		{name: "nobody has or wants anything", early: true, late: true},
		{name: "nobody has or wants anything, only the early one dials", early: true},
	}
	for _, p := range pairs {
		p.nodeE, p.nodeL = newNode(t), newNode(t)
		m := newMemory(b)
		if p.earlyHas {
			m.fill(1, 2, 3) // incomplete, so that it dials
		}
		p.earlyT = p.nodeE.add(t, m)
		if p.early {
			p.earlyT.AddPeers(addrs(p.nodeL))
		}
	}
	time.Sleep(3 * time.Second) // the case at hand: nothing can be waited for
	for _, p := range pairs {
		start := time.Now()
		p.lateT = p.nodeL.add(t, newMemory(b))
		if p.late {
			p.lateT.AddPeers(addrs(p.nodeE))
		}
		wait(t, p.name, func() bool { return p.lateT.Stats().Peers == 1 && p.earlyT.Stats().Peers == 1 })
		if d := time.Since(start); d > 1500*time.Millisecond {
			t.Errorf("%s: they met after %v", p.name, d)
		}
	}
	never(t, "a connection breaks or doubles", 1300*time.Millisecond, func() bool {
		return slices.ContainsFunc(pairs, func(p *pair) bool { return p.lateT.Stats().Peers != 1 })
	})
}

func TestBan(t *testing.T) {
	t.Parallel()
	b := newBlob(4<<20, 8)
	bad, good, leecher := newNode(t), newNode(t), newNode(t)
	bad.add(t, newMemory(b).fillAll())
	ml := newMemory(b)
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(bad))
	wait(t, "connection", func() bool { return tl.Stats().Peers == 1 })
	tl.Ban(bad.id.ID())
	tl.Ban("nonsense")
	wait(t, "cut", func() bool { return tl.Stats().Peers == 0 })
	wantAll(tl)
	never(t, "the banned peer is back", 2500*time.Millisecond, func() bool { return tl.Stats().Peers != 0 })
	good.add(t, newMemory(b).fillAll())
	tl.AddPeers(addrs(good))
	wait(t, "complete", ml.complete)
	if n := tl.Stats().PerPeer[bad.id.ID()]; n > pieceSize {
		t.Errorf("%d bytes from the banned peer", n)
	}
}

// A storage that finds a piece wrong gets it again, and not from the peer that gave it.
func TestBadPieceBansItsSupplier(t *testing.T) {
	b := newBlob(4<<20, 9)
	liar, honest, leecher := newNode(t), newNode(t), newNode(t)
	lies := newMemory(b).fillAll()
	for i := range lies.data {
		lies.data[i] ^= 0xff
	}
	liar.add(t, lies)
	ml := newMemory(b)
	var refused atomic.Int32
	ml.hook = func(i int, peer string) error {
		if slices.Contains(Suppliers(peer), liar.id.ID()) {
			refused.Add(1)
			return ErrBadPiece
		}
		return nil
	}
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(liar))
	wantAll(tl)
	wait(t, "ban", func() bool { return refused.Load() > 0 && tl.Stats().Peers == 0 })
	honest.add(t, newMemory(b).fillAll())
	tl.AddPeers(addrs(honest))
	wait(t, "complete", ml.complete)
	ml.check(t)
	if s := tl.Stats(); s.Err != nil {
		t.Errorf("taken for trouble with the storage: %v", s.Err)
	}
}

func TestStorageTroubleIsShownAndEnds(t *testing.T) {
	t.Parallel()
	b := newBlob(2<<20, 10)
	seeder, leecher := newNode(t), newNode(t)
	seeder.add(t, newMemory(b).fillAll())
	ml := newMemory(b)
	full := errors.New("disk full")
	ml.ioErr = full
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	wantAll(tl)
	wait(t, "error", func() bool { return errors.Is(tl.Stats().Err, full) })
	before := tl.Stats()
	never(t, "more is downloaded", time.Second, func() bool {
		return tl.Stats().Downloaded > before.Downloaded+4<<20
	})
	ml.mu.Lock()
	ml.ioErr = nil
	ml.mu.Unlock()
	wait(t, "complete", ml.complete)
	ml.check(t)
	if s := tl.Stats(); s.Err != nil {
		t.Errorf("still: %v", s.Err)
	}
}

func TestSuppliers(t *testing.T) {
	if got := Suppliers(""); got != nil {
		t.Errorf("%q", got)
	}
	b := newBlob(pieceSize, 0)
	s := newNode(t)
	to := s.add(t, newMemory(b))
	x, _ := peerIDOf(strings.Repeat("ab", 16))
	y, _ := peerIDOf(strings.Repeat("cd", 16))
	to.supplied(0, x, 10)
	to.supplied(0, y, 20)
	to.supplied(0, x, 5)
	got := Suppliers(joinSuppliers(to.takeSuppliers(0)))
	if want := []string{strings.Repeat("cd", 16), strings.Repeat("ab", 16)}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if len(to.takeSuppliers(0)) != 0 {
		t.Error("suppliers are kept")
	}
}

// MarkPiece may call back into this and other torrents, while they are dropped and read.
func TestNoDeadlockFromMarkPiece(t *testing.T) {
	b, c := newBlob(8<<20, 11), newBlob(8<<20, 12)
	seeder, leecher := newNode(t), newNode(t)
	seeder.add(t, newMemory(b).fillAll())
	seeder.add(t, newMemory(c).fillAll())
	mb, mc := newMemory(b), newMemory(c)
	tb, tc := leecher.add(t, mb), leecher.add(t, mc)
	half := make(chan struct{})
	mb.hook = func(i int, _ string) error {
		mc.fill(i)
		tc.Have(i)
		tc.Unwant(i)
		tc.Lost(i)
		mc.fill(i)
		tc.Have(i)
		tb.Want(i)
		if i == 16 {
			close(half)
		}
		return nil
	}
	mc.hook = func(int, string) error {
		tb.Have(0)
		return nil
	}
	mb.fill(0)
	tb.AddPeers(addrs(seeder))
	tc.AddPeers(addrs(seeder))
	wantAll(tb)
	wantAll(tc)
	<-half
	tb.Drop()
	mb.mu.Lock()
	mb.closed = true
	mb.mu.Unlock()
	wait(t, "the other completes", mc.complete)
	tb.Drop()
	mb.mu.Lock()
	defer mb.mu.Unlock()
	if mb.late != 0 {
		t.Errorf("%d calls of the storage after Drop", mb.late)
	}
}

func TestDropAndAddAgain(t *testing.T) {
	b := newBlob(4<<20, 13)
	seeder, leecher := newNode(t), newNode(t)
	seeder.add(t, newMemory(b).fillAll())
	ml := newMemory(b)
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	tl.Want(0)
	wait(t, "piece 0", func() bool { return ml.Has(0) })
	tl.Drop()
	tl.Want(1) // no harm
	tl.Have(1)
	tl.Stats()
	tl.Availability()
	tl = leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	wantAll(tl)
	wait(t, "complete", ml.complete)
	if s := tl.Stats(); s.Downloaded > int64(len(b.data))-pieceSize {
		t.Errorf("downloaded %d: a piece that was held came again", s.Downloaded)
	}
}

func TestCloseUnderLoad(t *testing.T) {
	b := newBlob(32<<20, 14)
	seeder, leecher := newNode(t), newNode(t)
	ms, ml := newMemory(b).fillAll(), newMemory(b)
	seeder.add(t, ms)
	tl := leecher.add(t, ml)
	tl.AddPeers(addrs(seeder))
	wantAll(tl)
	<-ml.marked
	leecher.close(t)
	seeder.close(t)
	leecher.close(t)
	ml.mu.Lock()
	ml.closed = true
	ml.mu.Unlock()
	if _, err := leecher.Add(newBlob(1, 0).digest, 1, pieceSize, full{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Add after Close: %v", err)
	}
	tl.Drop()
	ml.mu.Lock()
	defer ml.mu.Unlock()
	if ml.late != 0 {
		t.Errorf("%d calls of the storage after Close", ml.late)
	}
}

func TestNoSeedUploadsNothing(t *testing.T) {
	t.Parallel()
	b := newBlob(4<<20, 15)
	miser, other := newNode(t, noSeed), newNode(t)
	mm, mo := newMemory(b), newMemory(b)
	for i := range b.pieces() / 2 {
		mm.fill(i)
		mo.fill(b.pieces()/2 + i)
	}
	tm, to := miser.add(t, mm), other.add(t, mo)
	tm.AddPeers(addrs(other))
	to.AddPeers(addrs(miser))
	wantAll(tm)
	wantAll(to)
	wait(t, "the miser completes", mm.complete)
	never(t, "the miser uploads", time.Second, func() bool {
		return tm.Stats().Uploaded != 0 || to.Stats().Downloaded != 0
	})
}

func TestLimits(t *testing.T) {
	t.Parallel()
	b := newBlob(4<<20, 16)
	const perSecond = 2 << 20 // the blob takes two seconds, less the burst
	for name, c := range map[string]struct{ up, down nodeOption }{
		"upload":                            {up: upload(rate.NewLimiter(perSecond, 64<<10)), down: func(*Options) {}},
		"download":                          {down: download(rate.NewLimiter(perSecond, 64<<10)), up: func(*Options) {}},
		"upload with a burst below a chunk": {up: upload(rate.NewLimiter(perSecond, 1000)), down: func(*Options) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seeder, leecher := newNode(t, c.up), newNode(t, c.down)
			seeder.add(t, newMemory(b).fillAll())
			ml := newMemory(b)
			tl := leecher.add(t, ml)
			tl.AddPeers(addrs(seeder))
			start := time.Now()
			wantAll(tl)
			wait(t, "complete", ml.complete)
			if d := time.Since(start); d < 1700*time.Millisecond || d > 4*time.Second {
				t.Errorf("%d bytes in %v at %d/s", len(b.data), d, perSecond)
			}
		})
	}
}

// A node seeds a thousand blobs that nobody asks for; 300 here, to be quick.
func TestIdleTorrentsCostLittle(t *testing.T) {
	const n = 300
	s := newNode(t)
	before := runtime.NumGoroutine()
	var m0, m1 runtime.MemStats
	runtime.GC()
	runtime.GC() // once more for what has finalizers
	runtime.ReadMemStats(&m0)
	start := time.Now()
	for i := range n {
		b := blob{digest.FromString(string(rune(i))), make([]byte, 0)}
		if _, err := s.Add(b.digest, 64<<20, pieceSize, full{}); err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(start)
	runtime.GC()
	runtime.GC() // once more for what has finalizers
	runtime.ReadMemStats(&m1)
	per := float64(runtime.NumGoroutine()-before) / n
	t.Logf("%d torrents of 64 MiB: added in %v, %.1f goroutines and %d KiB each", n, took, per, (int64(m1.HeapAlloc)-int64(m0.HeapAlloc))/n>>10)
	if per > 4 {
		t.Errorf("%.1f goroutines per idle torrent", per)
	}
	if took > 10*time.Second { // 0.2 s here; the race detector takes 4
		t.Errorf("adding %d torrents took %v", n, took)
	}
}

// full is a Storage that holds everything.
type full struct{}

func (full) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (full) WriteAt(p []byte, _ int64) (int, error) { return 0, errors.New("full") }
func (full) Has(int) bool                           { return true }
func (full) MarkPiece(int, string) error            { return nil }

func TestAddRefusesNonsense(t *testing.T) {
	s := newNode(t)
	for _, c := range [][2]int64{{0, pieceSize}, {-1, pieceSize}, {1, 0}} {
		if _, err := s.Add(digest.FromString("x"), c[0], c[1], full{}); err == nil {
			t.Errorf("%d bytes in pieces of %d: no error", c[0], c[1])
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("a swarm without identity")
	}
}

func BenchmarkOneToOne(b *testing.B) {
	bl := newBlob(64<<20, 20)
	seeder := newNode(b)
	seeder.add(b, newMemory(bl).fillAll())
	leecher := newNode(b)
	b.SetBytes(int64(len(bl.data)))
	for b.Loop() {
		ml := newMemory(bl)
		tl := leecher.add(b, ml)
		tl.AddPeers(addrs(seeder))
		wantAll(tl)
		for range bl.pieces() {
			<-ml.marked
		}
		tl.Drop()
	}
}

func BenchmarkAvailability(b *testing.B) {
	bl := newBlob(64<<20, 21)
	leecher := newNode(b)
	tl := leecher.add(b, newMemory(bl))
	var peers []*node
	for range 4 {
		p := newNode(b)
		m := newMemory(bl)
		for i := 0; i < bl.pieces(); i += 2 {
			m.fill(i)
		}
		p.add(b, m)
		peers = append(peers, p)
	}
	tl.AddPeers(addrs(peers...))
	wait(b, "peers", func() bool { return tl.Stats().Peers == len(peers) })
	for b.Loop() {
		tl.Availability()
	}
}
