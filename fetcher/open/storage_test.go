package open

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"
)

// The storage may know better than the metainfo.
func TestStorageRefusesAPiece(t *testing.T) {
	t.Parallel()
	l := newLayer(1<<20, 7)
	p := l.torrent(t, 64<<10, false)
	seeder := newSwarm(t, Options{Seed: true})
	add(t, seeder, p, newMemory(l).fill())
	m := newMemory(l)
	m.mark = func(int, string) error { return ErrBadPiece }
	tl := add(t, newSwarm(t, Options{}), p, m)
	tl.AddPeers(addrOf(seeder))
	tl.Want(1)
	wait(t, "the end", func() bool { return errors.Is(tl.Stats().Err, ErrMismatch) })
}

// A piece that the storage puts off is no trouble: the wish ends, the rest goes on, and a later wish is met.
func TestStoragePutsAPieceOff(t *testing.T) {
	t.Parallel()
	l := newLayer(1<<20, 15)
	p := l.torrent(t, 64<<10, false)
	seeder := newSwarm(t, Options{Seed: true})
	ts := add(t, seeder, p, newMemory(l).fill())
	m := newMemory(l)
	var put atomic.Int32
	m.mark = func(i int, _ string) error {
		if i == 1 && put.Add(1) == 1 {
			return ErrPutOff
		}
		return nil
	}
	tl := add(t, newSwarm(t, Options{}), p, m)
	tl.AddPeers(addrOf(seeder))
	wantAll(tl)
	wait(t, "the others", func() bool { return len(m.marked) == 15 && put.Load() == 1 })
	never(t, "it is tried again unasked, or shown as trouble", 300*time.Millisecond, func() bool {
		return put.Load() > 1 || tl.Stats().Err != nil
	})
	tl.Want(1)
	wait(t, "complete", m.complete)
	m.check(t)
	if n := ts.Stats().Uploaded; n != int64(len(l.data)) {
		t.Errorf("%d bytes were sent for %d", n, len(l.data))
	}
}

func TestStorageTroubleIsShownAndEnds(t *testing.T) {
	t.Parallel()
	l := newLayer(2<<20, 8)
	p := l.torrent(t, 64<<10, false)
	seeder := newSwarm(t, Options{Seed: true})
	add(t, seeder, p, newMemory(l).fill())
	m := newMemory(l)
	full := errors.New("disk full")
	m.ioErr = full
	tl := add(t, newSwarm(t, Options{}), p, m)
	tl.AddPeers(addrOf(seeder))
	wantAll(tl)
	wait(t, "error", func() bool { return errors.Is(tl.Stats().Err, full) })
	m.mu.Lock()
	m.ioErr = nil
	m.mu.Unlock()
	wait(t, "complete", m.complete)
	m.check(t)
	if s := tl.Stats(); s.Err != nil || s.Downloaded > int64(len(l.data)) {
		t.Errorf("still %v, or %d bytes downloaded twice", s.Err, s.Downloaded-int64(len(l.data)))
	}
}
