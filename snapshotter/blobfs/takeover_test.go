package blobfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// killsEnv is how many times TestKillStorm kills the daemon; 200 takes a minute.
const killsEnv = "BLOBFS_TEST_KILLS"

// storm starts readers of the plain files, and of EROFS mounts over them in both ways.
func (r *rig) storm() []*process {
	r.t.Helper()
	var plain, cached, direct []string
	for id, f := range testFiles() {
		path := filepath.Join(mountOf(r.dir), strconv.FormatUint(id, 10))
		arg := fmt.Sprintf("%d:%d:", id, f.Size())
		plain = append(plain, arg+path)
		cached = append(cached, arg+erofsOver(r.t, path, f.Size(), ""))
		direct = append(direct, arg+erofsOver(r.t, path, f.Size(), ",directio"))
	}
	return []*process{r.start("reader", plain...), r.start("reader", cached...), r.start("reader", direct...), r.start("reader", direct...)}
}

// The daemon is killed at random moments, also while it starts: readers notice nothing.
func TestKillStorm(t *testing.T) {
	kills := 20
	if n, err := strconv.Atoi(os.Getenv(killsEnv)); err == nil {
		kills = n
	}
	r := newRig(t)
	d := r.start("daemon")
	d.serving()
	readers := r.storm()
	for i := range kills {
		time.Sleep(rand.N(100 * time.Millisecond))
		d.end(unix.SIGKILL)
		d = r.start("daemon")
		if i%4 != 0 { // else it may not even come to serve
			if l := d.serving(); l != "serving true" {
				t.Fatalf("after kill %d it does not take over: %s", i, l)
			}
		}
	}
	d.end(unix.SIGKILL)
	d = r.start("daemon")
	d.serving()
	time.Sleep(200 * time.Millisecond)
	for _, p := range readers {
		p.finish()
	}
	if text, err := d.end(unix.SIGTERM); err != nil {
		t.Errorf("the last daemon: %v: %s", err, text)
	}
}

// An upgrade: the former daemon is told to stop, the next one goes on. The mount stays.
func TestUpgradeUnderStorm(t *testing.T) {
	r := newRig(t)
	d := r.start("daemon")
	if l := d.serving(); l != "serving false" {
		t.Fatal(l)
	}
	before, err := mounted(mountOf(r.dir))
	if err != nil || before == "" {
		t.Fatal(before, err)
	}
	readers := r.storm()
	for range 5 {
		time.Sleep(100 * time.Millisecond)
		if text, err := d.end(unix.SIGTERM); err != nil {
			t.Fatalf("the daemon does not stop: %v: %s", err, text)
		}
		d = r.start("daemon")
		if l := d.serving(); l != "serving true" {
			t.Fatal(l)
		}
	}
	for _, p := range readers {
		p.finish()
	}
	if after, err := mounted(mountOf(r.dir)); after != before || err != nil {
		t.Errorf("the mount %s became %s, %v", before, after, err)
	}
}

// Without keeper a dead daemon is EIO, never other bytes; the next one mounts anew.
func TestKeeperKilled(t *testing.T) {
	r := newRig(t)
	d := r.start("daemon")
	d.serving()
	readers := r.storm()
	time.Sleep(100 * time.Millisecond)
	r.killKeeper()
	time.Sleep(100 * time.Millisecond)
	for _, p := range readers { // the daemon has the connection: nothing happened yet
		select {
		case <-p.read:
			text, _ := p.end(unix.SIGKILL)
			t.Fatalf("a reader ended with the keeper: %s", text)
		default:
		}
	}
	d.end(unix.SIGKILL)
	for _, p := range readers {
		select {
		case <-p.read:
		case <-time.After(20 * time.Second):
			t.Fatal("a reader hangs without keeper and daemon")
		}
		text, err := p.end(unix.SIGTERM)
		failed := strings.Contains(text, unix.EIO.Error()) || strings.Contains(text, unix.ENOTCONN.Error()) || strings.Contains(text, unix.ECONNABORTED.Error())
		if err == nil || !failed || strings.Contains(text, "wrong bytes") {
			t.Errorf("a reader without keeper and daemon: %v: %s", err, text)
		}
	}
	t.Setenv(roleEnv, "keeper")
	again := newRigIn(t, r.dir)
	d = again.start("daemon")
	if l := d.serving(); l != "serving false" {
		t.Fatal(l)
	}
	p := again.start("reader", "3:16777216:"+filepath.Join(mountOf(r.dir), "3"))
	time.Sleep(300 * time.Millisecond)
	p.finish()
}

// A daemon that is killed while a thread of its own waits for an answer of its own
// cannot end, and keeps its locks, until the next one answers. So that one must not wait
// for its locks first: see the package comment.
func TestKilledWhileWaitingForItself(t *testing.T) {
	r := newRig(t)
	old := r.start("selfish")
	old.serving()
	gone := make(chan struct{})
	old.Process.Signal(unix.SIGKILL)
	go func() { old.end(unix.SIGKILL); close(gone) }()
	lock, err := os.Open(filepath.Join(r.dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	select {
	case <-gone:
		t.Error("it ends, which was not so on Linux 6.18: then the package comment is wrong")
	case <-time.After(300 * time.Millisecond):
		if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
			t.Errorf("its lock is free although it has not ended: %v", err)
		}
	}
	d := r.start("daemon")
	if l := d.serving(); l != "serving true" {
		t.Fatal(l)
	}
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Fatal("the next daemon does not free it")
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("its lock is not free: %v", err)
	}
}

// Keep gives the connection to a keeper that was started anew under a living daemon.
func TestConnectAndKeep(t *testing.T) {
	r := newRig(t)
	ctx := context.Background()
	dev, taken, err := Connect(ctx, r.store(), mountOf(r.dir))
	if err != nil || taken {
		t.Fatal(taken, err)
	}
	defer dev.Close()
	again, taken, err := Connect(ctx, r.store(), mountOf(r.dir))
	if err != nil || !taken {
		t.Fatal(taken, err)
	}
	again.Close()
	r.killKeeper()
	r = newRigIn(t, r.dir)
	for range 2 {
		if err := Keep(ctx, r.store(), mountOf(r.dir), dev); err != nil {
			t.Fatal(err)
		}
	}
	dev.Close()
	dev, taken, err = Connect(ctx, r.store(), mountOf(r.dir))
	if err != nil || !taken {
		t.Fatal("after Keep: ", taken, err)
	}
	dev.Close()
	// A mount that is gone is made anew, and its connection dropped.
	unmount(mountOf(r.dir))
	dev, taken, err = Connect(ctx, r.store(), mountOf(r.dir))
	if err != nil || taken {
		t.Fatal(taken, err)
	}
	dev.Close()
	if l, err := r.store().List(ctx); len(l) != 1 || err != nil {
		t.Errorf("the store has %v, %v", l, err)
	}
	// So is one whose connection the store lost.
	l, _ := r.store().List(ctx)
	if err := r.store().Drop(ctx, l[0]); err != nil {
		t.Fatal(err)
	}
	dev, taken, err = Connect(ctx, r.store(), mountOf(r.dir))
	if err != nil || taken {
		t.Fatal(taken, err)
	}
	dev.Close()
	if b, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Count(b, []byte(" "+mountOf(r.dir)+" ")) != 1 {
		t.Error("mounts are stacked")
	}
}

// full is a Store that takes nothing.
type full struct{ memory }

func (*full) Put(context.Context, string, *os.File) error { return errors.New("no room") }

func TestConnectWithoutRoomLeavesNothing(t *testing.T) {
	needFuse(t)
	dir := t.TempDir()
	defer unmount(mountOf(dir))
	if dev, _, err := Connect(t.Context(), &full{}, mountOf(dir)); err == nil {
		dev.Close()
		t.Fatal("a connection that nobody keeps is used")
	}
	if s, err := mounted(mountOf(dir)); s != "" || err != nil {
		t.Errorf("the mount %s is left, %v", s, err)
	}
}

// counted counts who has it open.
type counted struct {
	pattern
	opened, released atomic.Int64
}

func (c *counted) Opened()   { c.opened.Add(1) }
func (c *counted) Released() { c.released.Add(1) }

// A File is told of each that opens it before that goes on, and of each end; an EROFS has its device open until its last user
// is gone, though its mount went without being busy.
func TestCounted(t *testing.T) {
	r := newRig(t)
	dev, _, err := Connect(t.Context(), r.store(), mountOf(r.dir))
	if err != nil {
		t.Fatal(err)
	}
	s := New(dev, Options{})
	dev.Close()
	done := make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() { done <- s.Run(ctx) }()
	f := &counted{pattern: pattern{seed: 2, size: 1 << 20, now: true}}
	if err := s.Add(2, "f", f); err != nil {
		t.Fatal(err)
	}
	counts := func(opened, released int64) {
		t.Helper()
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			if f.opened.Load() == opened && f.released.Load() == released {
				return
			}
		}
		t.Errorf("opened %d times and released %d, want %d and %d", f.opened.Load(), f.released.Load(), opened, released)
	}
	data := erofsOver(t, filepath.Join(mountOf(r.dir), "f"), 1<<20, "")
	counts(1, 0)
	merged := t.TempDir()
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "lowerdir="+filepath.Dir(data)+":"+t.TempDir()); err != nil {
		t.Fatal(err)
	}
	if err := unix.Unmount(filepath.Dir(data), 0); err != nil {
		t.Errorf("the mount below an overlay is busy: %v", err)
	}
	time.Sleep(50 * time.Millisecond)
	counts(1, 0)
	if err := unix.Unmount(merged, 0); err != nil {
		t.Fatal(err)
	}
	counts(1, 1)
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
