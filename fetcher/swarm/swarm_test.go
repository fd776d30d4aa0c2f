package swarm

import (
	"errors"

	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
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

// Who connects is told everything, in both directions, whoever dialled. Every test of this package ends with the check that no piece came
// along.
func TestPeersTellWhatTheyHold(t *testing.T) {
	t.Parallel()
	b := newBlob("told", 9)
	whole, part, empty := newNode(t), newNode(t), newNode(t)
	tw, tp, te := whole.add(t, b, all), part.add(t, b, some(0, 8)), empty.add(t, b, none)
	if tw.Infohash() != te.Infohash() || tw.Infohash() != Infohash(b.digest, b.size, pieceSize) {
		t.Error("infohashes differ")
	}
	te.AddPeers(addrs(whole, part, empty)) // itself among them
	te.AddPeers(addrs(whole))
	tp.AddPeers(addrs(whole))
	const everything, ends, nothing = "+++++++++", "+-------+", "---------"
	hears(t, te, whole, everything)
	hears(t, te, part, ends)
	hears(t, tp, whole, everything)
	hears(t, tp, empty, nothing)
	hears(t, tw, part, ends)
	hears(t, tw, empty, nothing)
	never(t, "a piece is fetched", 300*time.Millisecond, func() bool { return heard(tw, empty) != nothing })
	if n := tw.Connections(); n != 2 || te.Connections() != 2 || tp.Connections() != 2 {
		t.Errorf("%d, %d and %d connections", n, te.Connections(), tp.Connections())
	}
	if _, err := whole.Add(b.digest, b.size, pieceSize, all); !errors.Is(err, ErrExists) {
		t.Errorf("second Add: %v", err)
	}
}

// Pieces that come while peers are connected are told at once, both ways, and not with the next look at who is connected.
func TestHaveIsToldAtOnce(t *testing.T) {
	t.Parallel()
	b := newBlob("have", 32)
	one, other := newNode(t), newNode(t)
	to, tt := one.add(t, b, none), other.add(t, b, none)
	tt.AddPeers(addrs(one))
	wait(t, "connection", func() bool { return to.Connections() == 1 && tt.Connections() == 1 })
	start := time.Now()
	for i := range b.pieces() / 2 {
		even, odd := 2*i, 2*i+1
		to.Have(even)
		to.Have(even)
		tt.Have(odd)
		wait(t, "word of a piece", func() bool {
			a, b := heard(tt, one), heard(to, other)
			return a != "" && b != "" && a[even] == '+' && b[odd] == '+'
		})
	}
	if took := time.Since(start); took > 5*time.Second { // 16 times there and back; 30 ms when nothing else runs
		t.Errorf("took %v", took)
	}
	hears(t, tt, one, strings.Repeat("+-", 16))
	hears(t, to, other, strings.Repeat("-+", 16))
}

// All pieces have come to both: there is nothing left to tell, and who has everything calls nobody.
func TestCompletePeersPart(t *testing.T) {
	t.Parallel()
	b := newBlob("part", 4)
	one, other := newNode(t), newNode(t)
	to, tt := one.add(t, b, some(0)), other.add(t, b, all)
	to.AddPeers(addrs(other))
	tt.AddPeers(addrs(one))
	hears(t, to, other, "++++")
	for i := range b.pieces() {
		to.Have(i)
	}
	wait(t, "the end of the connection", func() bool { return to.Connections() == 0 && tt.Connections() == 0 })
	never(t, "they connect again", 1500*time.Millisecond, func() bool { return to.Connections() != 0 })
}

// BitTorrent has no word for a piece that is gone, but peers learn of it.
func TestLostIsTold(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name         string
		holds, other func(int) bool
		dials        bool // the one that loses piece 3, else the other one
		before       string
		after        string
	}{
		{"by a part", some(1, 2, 3), none, true, "-+++-", "-++--"},
		{"by a part that is called", some(1, 2, 3), some(4), false, "-+++-", "-++--"},
		{"by the whole", all, none, false, "+++++", "+++-+"},
		{"to the whole", some(1, 2, 3), all, true, "-+++-", "-++--"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBlob("lost "+c.name, 5)
			loser, other := newNode(t), newNode(t)
			tl, to := loser.add(t, b, c.holds), other.add(t, b, c.other)
			if c.dials {
				tl.AddPeers(addrs(other))
			} else {
				to.AddPeers(addrs(loser))
			}
			hears(t, to, loser, c.before)
			start := time.Now()
			tl.Lost(3)
			tl.Lost(3)
			hears(t, to, loser, c.after)
			if took := time.Since(start); took > 5*time.Second {
				t.Errorf("took %v", took)
			}
			tl.Have(3)
			hears(t, to, loser, c.before)
		})
	}
}

// Who had everything dials again when a piece is gone, to know who has it.
func TestLostPieceIsLookedFor(t *testing.T) {
	t.Parallel()
	b := newBlob("sought", 3)
	loser, other := newNode(t), newNode(t)
	tl, to := loser.add(t, b, all), other.add(t, b, all)
	tl.AddPeers(addrs(other))
	never(t, "a connection", 300*time.Millisecond, func() bool { return tl.Connections() != 0 })
	tl.Lost(1)
	hears(t, tl, other, "+++")
	hears(t, to, loser, "+-+")
}

// A piece that is replaced, one by one or after a while, costs no connection.
func TestReplacedPieceIsNoLoss(t *testing.T) {
	t.Parallel()
	b := newBlob("replaced", 100)
	loser, other := newNode(t), newNode(t)
	tl, to := loser.add(t, b, all), other.add(t, b, none)
	to.AddPeers(addrs(loser))
	everything := strings.Repeat("+", 100)
	hears(t, to, loser, everything)
	conn := to.lib.PeerConns()[0]
	for i := range b.pieces() {
		tl.Lost(i)
		tl.Have(i)
	}
	never(t, "the connection is another one", 1500*time.Millisecond, func() bool {
		conns := to.lib.PeerConns()
		return len(conns) != 1 || conns[0] != conn || heard(to, loser) != everything
	})
}

// Two cold nodes; the second learns of the blob 3 s after the first, which has been dialling it in vain.
func TestColdNodesFindEachOther(t *testing.T) {
	t.Parallel()
	b := newBlob("cold", 4)
	type pair struct {
		name          string
		early, late   bool // who knows the other's address
		earlyHas      bool // almost all; else nobody has anything
		nodeE, nodeL  *node
		earlyT, lateT *Torrent
	}
	pairs := []*pair{
		{name: "both know each other", early: true, late: true, earlyHas: true},
		{name: "only the early one knows the late", early: true, earlyHas: true},
		{name: "only the late one knows the early", late: true, earlyHas: true},
		{name: "nobody has anything", early: true, late: true},
		{name: "nobody has anything, only the early one dials", early: true},
	}
	for _, p := range pairs {
		p.nodeE, p.nodeL = newNode(t), newNode(t)
		has := none
		if p.earlyHas {
			has = some(1, 2, 3)
		}
		p.earlyT = p.nodeE.add(t, b, has)
		if p.early {
			p.earlyT.AddPeers(addrs(p.nodeL))
		}
	}
	time.Sleep(3 * time.Second) // the case at hand: nothing can be waited for
	for _, p := range pairs {
		start := time.Now()
		p.lateT = p.nodeL.add(t, b, none)
		if p.late {
			p.lateT.AddPeers(addrs(p.nodeE))
		}
		wait(t, p.name, func() bool { return p.lateT.Connections() == 1 && p.earlyT.Connections() == 1 })
		if d := time.Since(start); d > 1500*time.Millisecond {
			t.Errorf("%s: they met after %v", p.name, d)
		}
	}
	never(t, "a connection breaks or doubles", 1300*time.Millisecond, func() bool {
		return slices.ContainsFunc(pairs, func(p *pair) bool { return p.lateT.Connections() != 1 })
	})
}

// A peer that has joined and left may be met again, as may one that is new, whatever came meanwhile.
func TestPeersAreKept(t *testing.T) {
	t.Parallel()
	b := newBlob("kept", 4)
	stays, goes := newNode(t), newNode(t)
	ts, tg := stays.add(t, b, some(0)), goes.add(t, b, all)
	ts.AddPeers(addrs(goes))
	hears(t, ts, goes, "++++")
	tg.Drop()
	wait(t, "the end", func() bool { return ts.Connections() == 0 })
	ts.Have(1)
	ts.Have(2)
	tg = goes.add(t, b, all)
	hears(t, ts, goes, "++++")
	hears(t, tg, stays, "+++-")
}

func TestBan(t *testing.T) {
	t.Parallel()
	b := newBlob("ban", 4)
	bad, good, leecher := newNode(t), newNode(t), newNode(t)
	tb := bad.add(t, b, some(1, 2, 3))
	tl := leecher.add(t, b, none)
	tl.AddPeers(addrs(bad))
	tb.AddPeers(addrs(leecher))
	wait(t, "connection", func() bool { return tl.Connections() == 1 })
	tl.Ban(bad.id.ID())
	tl.Ban("nonsense")
	if heard(tl, bad) != "" {
		t.Error("the banned peer is named")
	}
	wait(t, "cut", func() bool { return tl.Connections() == 0 })
	never(t, "the banned peer is back", 2500*time.Millisecond, func() bool { return tl.Connections() != 0 })
	good.add(t, b, all)
	tl.AddPeers(addrs(good))
	hears(t, tl, good, "++++")
	tl.Unban(bad.id.ID())
	hears(t, tl, bad, "-+++")
}

// A member that connects for a blob which is not in the swarm may bring it there.
func TestUnknownIsAsked(t *testing.T) {
	t.Parallel()
	b := newBlob("unknown", 2)
	var mu sync.Mutex
	var asked []string
	var holder *node
	mu.Lock()
	holder = newNode(t, func(o *Options) {
		o.Unknown = func(h metainfo.Hash) bool {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, h.HexString())
			_, err := holder.Add(b.digest, b.size, pieceSize, all)
			return err == nil
		}
	})
	mu.Unlock()
	seeker := newNode(t)
	ts := seeker.add(t, b, none)
	ts.AddPeers(addrs(holder))
	hears(t, ts, holder, "++")
	mu.Lock()
	defer mu.Unlock()
	if want := ts.Infohash().HexString(); len(asked) != 1 || asked[0] != want {
		t.Errorf("asked for %v, want %s", asked, want)
	}
}

// Nothing of what may be called with the caller's locks held waits for the library, which calls has under its own.
func TestNoDeadlock(t *testing.T) {
	t.Parallel()
	b := newBlob("locks", 64)
	one, other := newNode(t), newNode(t)
	to, tt := one.add(t, b, none), other.add(t, b, none)
	tt.AddPeers(addrs(one))
	var mu sync.Mutex
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() {
			for i := k; i < b.pieces(); i += 8 {
				mu.Lock()
				to.Have(i)
				tt.Have(i)
				tt.Lost(i)
				tt.AddPeers(addrs(one))
				mu.Unlock()
				to.Peers()
				tt.Connections()
			}
		})
	}
	wg.Wait()
	hears(t, tt, one, strings.Repeat("+", 64))
	to.Drop()
	to.Drop()
}

func TestDropAndAddAgain(t *testing.T) {
	t.Parallel()
	b := newBlob("again", 4)
	seeder, leecher := newNode(t), newNode(t)
	seeder.add(t, b, all)
	tl := leecher.add(t, b, none)
	tl.AddPeers(addrs(seeder))
	hears(t, tl, seeder, "++++")
	tl.Drop()
	tl.Have(1) // no harm
	tl.Lost(1)
	tl.Peers()
	tl.Connections()
	tl.Ban(seeder.id.ID())
	tl = leecher.add(t, b, some(1))
	tl.AddPeers(addrs(seeder))
	hears(t, tl, seeder, "++++")
	if n := leecher.Torrents(); n != 1 {
		t.Errorf("%d torrents", n)
	}
}

func TestCloseWhilePeersTalk(t *testing.T) {
	t.Parallel()
	b := newBlob("close", 400)
	one, other := newNode(t), newNode(t)
	to, tt := one.add(t, b, none), other.add(t, b, none)
	tt.AddPeers(addrs(one))
	wait(t, "connection", func() bool { return to.Connections() == 1 })
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range b.pieces() {
			to.Have(i)
			tt.Have(i)
			tt.Lost(i)
		}
	})
	for range 3 {
		wg.Go(func() { one.close(t) })
	}
	other.close(t)
	wg.Wait()
	if _, err := one.Add(newBlob("late", 1).digest, 1, pieceSize, all); !errors.Is(err, ErrClosed) {
		t.Errorf("Add after Close: %v", err)
	}
	to.Drop()
	if n := one.Connections(); n != 0 {
		t.Errorf("%d connections after Close", n)
	}
}

// A node holds a thousand blobs that nobody asks for; 300 here, to be quick.
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
		if _, err := s.Add(digest.FromString(string(rune(i))), 64<<20, pieceSize, all); err != nil {
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

func TestAddRefusesNonsense(t *testing.T) {
	s := newNode(t)
	for _, c := range [][2]int64{{0, pieceSize}, {-1, pieceSize}, {1, 0}} {
		if _, err := s.Add(digest.FromString("x"), c[0], c[1], all); err == nil {
			t.Errorf("%d bytes in pieces of %d: no error", c[0], c[1])
		}
	}
	if _, err := New(Options{}); err == nil {
		t.Error("a swarm without identity")
	}
}

func BenchmarkPeers(b *testing.B) {
	bl := newBlob("bench", 256)
	leecher := newNode(b)
	tl := leecher.add(b, bl, none)
	var peers []*node
	for range 4 {
		p := newNode(b)
		p.add(b, bl, func(i int) bool { return i%2 == 0 })
		peers = append(peers, p)
	}
	tl.AddPeers(addrs(peers...))
	wait(b, "peers", func() bool { return tl.Connections() == len(peers) })
	for b.Loop() {
		tl.Peers()
	}
}
