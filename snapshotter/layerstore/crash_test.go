package layerstore

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

// childDir names the store that this binary, started as a child, fills until it is
// killed.
const childDir = "LAYERSTORE_TEST_CHILD"

const crashSize = 48 << 20

func childMain() {
	dir := os.Getenv(childDir)
	if dir == "" {
		return
	}
	sm := newSample(99, crashSize)
	s, err := Open(dir, Options{Meta: testMeta, Log: quiet()})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	h, err := s.Create(context.Background(), sm.x)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	m := newMemory(sm.blob)
	m.delay.Store(int64(time.Millisecond))
	h.SetSource(m.open)
	fmt.Println("filling")
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(g), uint64(os.Getpid())))
			p := make([]byte, 100<<10)
			for {
				off := rnd.IntN(crashSize - len(p))
				if err := h.ReadAt(context.Background(), p, int64(off)); err != nil || !bytes.Equal(p, sm.data[off:off+len(p)]) {
					fmt.Fprintln(os.Stderr, "wrong bytes or", err)
					os.Exit(1)
				}
			}
		})
	}
	wg.Go(func() { h.Complete(context.Background()) })
	// An eager layer on its way, most of the time.
	for i := uint64(0); ; i++ {
		e := newSample(100+i%3, 8<<20)
		h, err := s.Unpack(context.Background(), e.desc(), bytes.NewReader(e.blob))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		h.Close()
		s.Remove(e.x.Blob)
	}
}

// checkPresent compares what counts as present with the truth.
func checkPresent(t *testing.T, s *Store, sm sample) (present int) {
	t.Helper()
	h, err := s.Get(sm.x.Blob)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	for c := range h.l.chunks.len() {
		if !h.l.full.Load() && !h.l.has.has(c) {
			continue
		}
		present++
		check(t, h, sm, int(h.l.chunks.start(c)), int(h.l.chunks.size(c)))
	}
	return present
}

func TestKillLosesAndSpoilsNothing(t *testing.T) {
	dirs := map[string]string{"disk": t.TempDir(), "tmpfs": ""}
	if os.Geteuid() == 0 {
		dirs["tmpfs"] = smallTmpfs(t, "200m")
	} else {
		delete(dirs, "tmpfs")
	}
	sm := newSample(99, crashSize)
	for name, dir := range dirs {
		t.Run(name, func(t *testing.T) {
			before := 0
			for round := range 6 {
				cmd := exec.Command(os.Args[0])
				cmd.Env = append(os.Environ(), childDir+"="+dir)
				var stderr bytes.Buffer
				cmd.Stderr = &stderr
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				out.Read(make([]byte, 1))
				time.Sleep(time.Duration(rand.IntN(80)) * time.Millisecond)
				cmd.Process.Kill()
				cmd.Wait()
				if stderr.Len() > 0 {
					t.Fatal(stderr.String())
				}
				s := openStore(t, dir, Options{})
				if b := s.Broken(); len(b) > 0 {
					t.Fatal(b)
				}
				present := checkPresent(t, s, sm)
				if present < before {
					t.Errorf("%d chunks were there before, %d are now", before, present)
				}
				before = present
				for i := range uint64(3) {
					e := newSample(100+i, 8<<20)
					if _, ok := s.layers[e.x.Blob]; ok {
						checkPresent(t, s, e)
					}
				}
				t.Logf("round %d: %d of %d chunks", round, present, len(sm.x.Chunks))
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// What was not synced when the power failed does not count, whatever the disk has of
// it: here it has zeros, and the bitmap that says otherwise.
func TestPowerFailure(t *testing.T) {
	dir := t.TempDir()
	sm := newSample(20, 8<<20)
	s := openStore(t, dir, Options{})
	h := create(t, s, sm, newMemory(sm.blob))
	check(t, h, sm, 0, 1<<20)
	if err := h.l.sync(); err != nil {
		t.Fatal(err)
	}
	synced := h.Stats().Present
	check(t, h, sm, 4<<20, 1<<20)
	// The files as they are now, as the machine stops.
	after := t.TempDir()
	if err := os.CopyFS(filepath.Join(after, dirLayers), os.DirFS(filepath.Join(dir, dirLayers))); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(after, dirLayers, folderName(sm.x.Blob), fileData)
	f, err := os.OpenFile(data, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 4<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	s2, err := openBooted(after)
	if err != nil {
		t.Fatal(err)
	}
	defer s2.Close()
	h2, err := s2.Get(sm.x.Blob)
	if err != nil {
		t.Fatal(err)
	}
	defer h2.Close()
	if got := h2.Stats().Present; got != synced {
		t.Errorf("%d chunks count after the power failed, %d were synced", got, synced)
	}
	h2.SetSource(newMemory(sm.blob).open)
	check(t, h2, sm, 0, len(sm.data))
}

// openBooted opens a store as after a reboot.
func openBooted(dir string) (*Store, error) {
	s, err := Open(dir, Options{Meta: testMeta, Log: quiet()})
	if err == nil {
		s.boot = "another"
	}
	return s, err
}

// A sync that fails may have lost what it should have written: it is decoded again.
func TestFailedSync(t *testing.T) {
	sm := newSample(21, 4<<20)
	m := newMemory(sm.blob)
	h := create(t, openStore(t, t.TempDir(), Options{}), sm, m)
	check(t, h, sm, 0, 512<<10)
	if err := h.l.sync(); err != nil {
		t.Fatal(err)
	}
	check(t, h, sm, 2<<20, 512<<10)
	h.l.flush.Lock()
	err := h.l.present.sync(func() error { return unix.EIO })
	h.l.flush.Unlock()
	if err == nil {
		t.Fatal("no error")
	}
	if h.l.has.any(2<<20/index.DefaultChunkSize, 3<<20/index.DefaultChunkSize) || !h.l.has.all(0, 512<<10/index.DefaultChunkSize-1) {
		t.Error("what was not synced still counts, or what was does not")
	}
	before := m.reads.Load()
	check(t, h, sm, 0, 512<<10)
	if m.reads.Load() != before {
		t.Error("what had been synced was fetched again")
	}
	check(t, h, sm, 2<<20, 512<<10)
	if m.reads.Load() == before {
		t.Error("what had been lost was not fetched")
	}
}
