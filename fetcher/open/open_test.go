package open

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"golang.org/x/time/rate"

	"github.com/docker-quay/docker-quay/fetcher/published"
)

// One seeds, one downloads, in every relation of the two kinds of pieces. The store's are of 64 KiB.
func TestPieceLengths(t *testing.T) {
	for _, c := range []struct{ size, pieceLength int }{
		{5<<20 + 12345, 64 << 10}, // the store's own
		{5<<20 + 12345, 512 << 10},
		{5<<20 + 12345, 4 << 20},
		{5<<20 + 12345, 64 << 10},
		{5<<20 + 12345, 16 << 10},
		{3<<20 + 1, 100 << 10},
		{3<<20 + 1, 100<<10 + 7},
		{3<<20 + 1, 300<<10 + 1},
		{1, 64 << 10},
		{64 << 10, 64 << 10},
		{100, 16 << 10},
	} {
		t.Run(fmt.Sprintf("%d bytes in pieces of %d", c.size, c.pieceLength), func(t *testing.T) {
			t.Parallel()
			l := newLayer(c.size, 1)
			p := l.torrent(t, c.pieceLength, false)
			seeder, leecher := newSwarm(t, Options{Seed: true}), newSwarm(t, Options{})
			ts := add(t, seeder, p, newMemory(l).fill())
			m := newMemory(l)
			tl := add(t, leecher, p, m)
			tl.AddPeers(addrOf(seeder))
			wantAll(tl)
			wait(t, "complete", m.complete)
			m.check(t)
			if n := m.from[tl.Supplier()]; n != l.pieces() {
				t.Errorf("%d of %d pieces have the torrent for supplier: %v", n, l.pieces(), m.from)
			}
			wait(t, "both statistics", func() bool {
				return tl.Stats().Downloaded == int64(c.size) && ts.Stats().Uploaded == int64(c.size)
			})
			if !slices.Equal(tl.pieces.wanted, nil) || tl.pieces.used != 0 {
				t.Errorf("wanted %v, %d bytes of buffers when all is done", tl.pieces.wanted, tl.pieces.used)
			}
		})
	}
}

// Only what was wished for is written; what came with it is kept in memory and met at once when it is wished for.
func TestOnlyWishesAreWritten(t *testing.T) {
	t.Parallel()
	l := newLayer(8<<20, 2)
	p := l.torrent(t, 2<<20, false) // 8 pieces of the store
	seeder := newSwarm(t, Options{Seed: true})
	ts := add(t, seeder, p, newMemory(l).fill())
	m := newMemory(l)
	var wished sync.Map
	m.strict = func(i int) bool { _, ok := wished.Load(i); return ok }
	tl := add(t, newSwarm(t, Options{}), p, m)
	tl.AddPeers(addrOf(seeder))
	want := func(i int) {
		wished.Store(i, true)
		tl.Want(i)
		wait(t, fmt.Sprint("piece ", i), func() bool { return m.Has(i) })
	}
	want(3)
	before := ts.Stats().Uploaded
	want(0)
	want(7)
	if n := ts.Stats().Uploaded; n != before || n < 2<<20 {
		t.Errorf("%d bytes were sent for the first wish and %d after its neighbours'", before, n)
	}
	want(30)
	never(t, "something else is marked", 300*time.Millisecond, func() bool { return len(m.marked) > 4 })
	for i := range l.pieces() {
		wished.Store(i, true)
	}
	wantAll(tl)
	wait(t, "complete", m.complete)
	m.check(t)
}

// Pieces that are not aligned: the parts of a store piece arrive with different metainfo pieces.
func TestMemoryIsBounded(t *testing.T) {
	t.Parallel()
	for _, pieceLength := range []int{64 << 10, 300<<10 + 1, 1 << 20} {
		l := newLayer(16<<20, 3)
		p := l.torrent(t, pieceLength, false)
		const budget = 2 << 20
		seeder := newSwarm(t, Options{Seed: true})
		add(t, seeder, p, newMemory(l).fill())
		m := newMemory(l)
		tl := add(t, newSwarm(t, Options{Buffer: budget}), p, m)
		var worst atomic.Int64
		m.mark = func(int, string) error {
			tl.mu.Lock()
			defer tl.mu.Unlock()
			worst.Store(max(worst.Load(), tl.pieces.used))
			return nil
		}
		tl.AddPeers(addrOf(seeder))
		wantAll(tl)
		wait(t, "complete", m.complete)
		m.check(t)
		// What was asked for before the plan changed may still arrive: one wish's worth.
		if w := worst.Load(); w > budget+2*int64(pieceLength)+m.size {
			t.Errorf("pieces of %d: %d bytes in memory, %d allowed", pieceLength, w, budget)
		}
	}
}

// A download goes on where it was, and pieces that came another way are served and not fetched.
func TestResume(t *testing.T) {
	t.Parallel()
	l := newLayer(4<<20, 4)
	p := l.torrent(t, 64<<10, false)
	seeder := newSwarm(t, Options{Seed: true})
	ts := add(t, seeder, p, newMemory(l).fill())
	leecher := newSwarm(t, Options{Seed: true})
	m := newMemory(l)
	tl := add(t, leecher, p, m)
	tl.AddPeers(addrOf(seeder))
	for i := range 5 {
		tl.Want(i)
	}
	wait(t, "five pieces", func() bool { return len(m.marked) == 5 })
	tl.Drop()
	tl.Want(6) // no harm
	tl.Have(6)
	tl.Stats()
	sent := ts.Stats().Uploaded

	m.fill(9)
	tl = add(t, leecher, p, m)
	m.fill(10) // the origin gave it
	tl.Have(10)
	tl.Have(10)
	other := newMemory(l)
	to := add(t, newSwarm(t, Options{}), p, other)
	to.AddPeers(addrOf(leecher))
	wait(t, "what is held is announced", func() bool {
		a := to.Availability()
		return a[0] == 1 && a[4] == 1 && a[9] == 1 && a[10] == 1 && a[5] == 0
	})
	to.Want(10)
	wait(t, "what came another way is served", func() bool { return other.Has(10) })
	tl.AddPeers(addrOf(seeder))
	wantAll(tl)
	wait(t, "complete", m.complete)
	m.check(t)
	if n := ts.Stats().Uploaded - sent; n > int64(len(l.data))-7*m.size {
		t.Errorf("%d bytes were sent for the rest", n)
	}
	tl.Lost(3)
	tl.Lost(3)
	m.mu.Lock()
	m.held[3] = false
	m.mu.Unlock()
	never(t, "a lost piece comes back unasked", 200*time.Millisecond, func() bool { return m.Has(3) })
	tl.Want(3)
	wait(t, "the lost piece", func() bool { return m.Has(3) })
}

// A metainfo of something else is found out before a byte is served.
func TestMetainfoOfSomethingElse(t *testing.T) {
	t.Parallel()
	mine, other := newLayer(4<<20, 5), newLayer(4<<20, 6)
	p := other.torrent(t, 64<<10, false)
	s := newSwarm(t, Options{Seed: true})
	if _, err := s.Add(p, newMemory(mine).fill()); !errors.Is(err, ErrMismatch) {
		t.Errorf("Add of a foreign torrent: %v", err)
	}
	// One wrong piece, which the few checks at the start need not find: when it is asked for.
	m := newMemory(other).fill()
	seeder := add(t, s, p, m)
	m.mu.Lock()
	m.data[140<<10] ^= 1 // in piece 2
	m.mu.Unlock()
	ml := newMemory(other)
	tl := add(t, newSwarm(t, Options{}), p, ml)
	tl.AddPeers(addrOf(s))
	seeder.mu.Lock()
	seeder.pieces.trusted[2] = false // had it been probed
	seeder.mu.Unlock()
	tl.Want(2)
	wait(t, "the mismatch is shown", func() bool { return errors.Is(seeder.Stats().Err, ErrMismatch) })
	tl.Want(3)
	never(t, "the torrent goes on", 300*time.Millisecond, func() bool { return ml.Has(2) || ml.Has(3) })

	// While downloading: the store has a piece that contradicts.
	half := newMemory(other)
	half.fill(0)
	half.data[17] ^= 1
	long := other.torrent(t, 512<<10, false)
	good := newSwarm(t, Options{Seed: true})
	add(t, good, long, newMemory(other).fill())
	th := add(t, newSwarm(t, Options{}), long, half)
	th.AddPeers(addrOf(good))
	th.Want(1) // lies in one metainfo piece with 0
	wait(t, "the contradiction is shown", func() bool { return errors.Is(th.Stats().Err, ErrMismatch) })
	if half.Has(1) {
		t.Error("a piece was marked beside one that contradicts")
	}
}

func TestNoSeedUploadsNothing(t *testing.T) {
	t.Parallel()
	l := newLayer(2<<20, 9)
	p := l.torrent(t, 64<<10, false)
	miser, other := newSwarm(t, Options{}), newSwarm(t, Options{Seed: true})
	mm, mo := newMemory(l), newMemory(l)
	for i := range l.pieces() / 2 {
		mm.fill(i)
		mo.fill(l.pieces()/2 + i)
	}
	tm, to := add(t, miser, p, mm), add(t, other, p, mo)
	tm.AddPeers(addrOf(other))
	to.AddPeers(addrOf(miser))
	wantAll(tm)
	wantAll(to)
	wait(t, "the miser completes", mm.complete)
	never(t, "the miser uploads", 500*time.Millisecond, func() bool {
		return tm.Stats().Uploaded != 0 || to.Stats().Downloaded != 0
	})
}

func TestLimits(t *testing.T) {
	t.Parallel()
	l := newLayer(2<<20, 10)
	p := l.torrent(t, 64<<10, false)
	const perSecond = 2 << 20 // the layer takes one second, less the burst
	limit := func() *rate.Limiter { return rate.NewLimiter(perSecond, 64<<10) }
	for name, c := range map[string]struct{ up, down Options }{
		"upload":   {up: Options{Seed: true, UploadLimit: limit()}},
		"download": {up: Options{Seed: true}, down: Options{DownloadLimit: limit()}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seeder, leecher := newSwarm(t, c.up), newSwarm(t, c.down)
			add(t, seeder, p, newMemory(l).fill())
			m := newMemory(l)
			tl := add(t, leecher, p, m)
			tl.AddPeers(addrOf(seeder))
			start := time.Now()
			wantAll(tl)
			wait(t, "complete", m.complete)
			if d := time.Since(start); d < 800*time.Millisecond || d > 4*time.Second {
				t.Errorf("%d bytes in %v at %d/s", len(l.data), d, perSecond)
			}
		})
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	l := newLayer(1<<20, 11)
	p := l.torrent(t, 64<<10, false)
	s := newSwarm(t, Options{Seed: true, MaxConnections: 3})
	to := add(t, s, p, newMemory(l).fill())
	for range 6 {
		tl := add(t, newSwarm(t, Options{}), p, newMemory(l))
		tl.AddPeers(addrOf(s))
	}
	wait(t, "three connections", func() bool { return to.Stats().Peers == 3 })
	never(t, "a fourth", 500*time.Millisecond, func() bool {
		return to.Stats().Peers > 3 || len(s.openConns()) > 3
	})
}

func TestAddRefusesNonsense(t *testing.T) {
	s := newSwarm(t, Options{})
	l := newLayer(1<<20, 12)
	good := func() *published.Torrent { return l.torrent(t, 64<<10, false) }
	for name, change := range map[string]func(*published.Torrent){
		"another length":     func(p *published.Torrent) { p.Layer.Size++ },
		"no length":          func(p *published.Torrent) { p.Layer.Size, p.Info.Length = 0, 0 },
		"long pieces":        func(p *published.Torrent) { p.Info.PieceLength = maxPieceLength + 1 },
		"no pieces":          func(p *published.Torrent) { p.Info.PieceLength = 0 },
		"a hash missing":     func(p *published.Torrent) { p.Info.Pieces = p.Info.Pieces[20:] },
		"several files":      func(p *published.Torrent) { p.Info.Files = []metainfo.FileInfo{{Length: 1 << 20, Path: []string{"x"}}} },
		"foreign dictionary": func(p *published.Torrent) { p.MetaInfo.InfoBytes = []byte("de") },
	} {
		p := good()
		change(p)
		if _, err := s.Add(p, newMemory(l)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	to := add(t, s, good(), newMemory(l))
	if _, err := s.Add(good(), newMemory(l)); !errors.Is(err, ErrExists) {
		t.Errorf("twice: %v", err)
	}
	to.Drop()
	to.Drop()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Add(good(), newMemory(l)); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := New(Options{Trackers: []string{"wss://x/announce"}}); err == nil {
		t.Error("a tracker of a kind that is not supported")
	}
}

// A node seeds a thousand layers that nobody asks for; 300 here, to be quick.
func TestIdleTorrentsCostLittle(t *testing.T) {
	const n = 300
	s := newSwarm(t, Options{Seed: true})
	before := runtime.NumGoroutine()
	l := newLayer(1<<20, 13)
	start := time.Now()
	for i := range n {
		p := l.torrent(t, 64<<10, false)
		p.Info.Name = fmt.Sprint(i)
		p.MetaInfo.InfoBytes = bencode.MustMarshal(p.Info)
		p.InfoHash = metainfo.HashBytes(p.MetaInfo.InfoBytes)
		add(t, s, p, newMemory(l).fill())
	}
	if per := float64(runtime.NumGoroutine()-before) / n; per > 4 {
		t.Errorf("%.1f goroutines per idle torrent", per)
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("adding %d torrents took %v", n, took)
	}
}

func BenchmarkOneToOne(b *testing.B) {
	l := newLayer(64<<20, 14)
	seeder := newSwarm(b, Options{Seed: true})
	p := l.torrent(b, 64<<10, false)
	add(b, seeder, p, newMemory(l).fill())
	leecher := newSwarm(b, Options{})
	b.SetBytes(int64(len(l.data)))
	for b.Loop() {
		m := newMemory(l)
		tl := add(b, leecher, p, m)
		tl.AddPeers(addrOf(seeder))
		wantAll(tl)
		for range l.pieces() {
			<-m.marked
		}
		tl.Drop()
	}
}
