package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// errWrong says that a container was shown what is not in its image: worse than any error.
var errWrong = errors.New("wrong bytes")

// tenant is a container that runs and does nothing, and the files of its image. They are read by this process, below the
// container's root: as the container reads them, but with each byte compared, also those before an error.
type tenant struct {
	w     *world
	c     *rig.Containerd
	id    string
	root  string
	files map[string][]byte
	names []string // of the files below /data
}

// stock is the image of tenants: over 20 MiB to read, half of that to fetch.
func (w *world) stock(f image.Format) *image.Image {
	w.Helper()
	img, err := image.Stock(w.ctx, rig.ImageDir(), f, stockBig, stockSmall)
	w.must(err)
	return img
}

const (
	stockBig   = 20 * mib
	stockSmall = 400
	bigFile    = "/" + image.BigFile
)

// tenant starts a container of a stock image, which containerd has.
func (w *world) tenant(c *rig.Containerd, img *image.Image, ref string) *tenant {
	w.Helper()
	files, err := img.FileBytes()
	w.must(err)
	t := &tenant{w: w, c: c, id: c.ContainerID(fmt.Sprintf("tenant%d", w.people.Add(1))), files: files}
	for name := range files {
		if strings.HasPrefix(name, "/data/") {
			t.names = append(t.names, name)
		}
	}
	slices.Sort(t.names)
	if _, err := c.Ctr(w.ctx, "apps", "run", "--detach", "--snapshotter", "quay", ref, t.id); err != nil {
		w.Fatal(err)
	}
	_, pid := t.task()
	t.root = fmt.Sprintf("/proc/%d/root", pid)
	return t
}

// task tells whether the container runs, and its process.
func (t *tenant) task() (containerd.ProcessStatus, uint32) {
	t.w.Helper()
	client, err := t.c.Client("apps")
	t.w.must(err)
	defer client.Close()
	ctx := namespaces.WithNamespace(t.w.ctx, "apps")
	container, err := client.LoadContainer(ctx, t.id)
	t.w.must(err)
	task, err := container.Task(ctx, nil)
	t.w.must(err)
	st, err := task.Status(ctx)
	t.w.must(err)
	return st.Status, task.Pid()
}

// alive checks that the container was not stopped.
func (t *tenant) alive() {
	t.w.Helper()
	if st, _ := t.task(); st != containerd.Running {
		t.w.Errorf("container %s is %s", t.id, st)
	}
}

// end ends the container.
func (t *tenant) end() {
	t.w.Helper()
	for _, args := range [][]string{{"task", "kill", "--signal", "SIGKILL", t.id}, {"task", "rm", "--force", t.id}, {"container", "rm", t.id}} {
		_, err := t.c.Ctr(t.w.ctx, "apps", args...)
		t.w.must(err)
	}
}

// read reads a file from the layer, not from memory, and compares.
func (t *tenant) read(name string) error { return t.part(name, 0, len(t.files[name])) }

// part reads n bytes of it.
func (t *tenant) part(name string, from, n int) error {
	f, err := os.Open(t.root + name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return err
	}
	want, buf := t.files[name], make([]byte, 256<<10)
	if info, err := f.Stat(); err != nil || info.Size() != int64(len(want)) {
		return fmt.Errorf("%s has %d bytes, %v: %w", name, info.Size(), err, errWrong)
	}
	for off, end := from, from+n; off < end; {
		n, err := f.ReadAt(buf[:min(len(buf), end-off)], int64(off))
		if !bytes.Equal(buf[:n], want[off:off+n]) {
			return fmt.Errorf("%s from byte %d: %w", name, off, errWrong)
		}
		if off += n; errors.Is(err, io.EOF) && off < end {
			return fmt.Errorf("%s ends at byte %d: %w", name, off, errWrong)
		}
		if err != nil && off < end {
			return err
		}
	}
	return nil
}

// reads checks that all of these files can be read; none named are all.
func (t *tenant) reads(when string, names ...string) {
	t.w.Helper()
	if len(names) == 0 {
		names = t.names
	}
	for _, name := range names {
		if err := t.read(name); err != nil {
			t.w.Fatalf("%s: %v", when, err)
		}
	}
}

// later reads a part of a file in the background.
func (t *tenant) later(name string, from, n int) <-chan error {
	done := make(chan error, 1)
	go func() { done <- t.part(name, from, n) }()
	return done
}

// await gives what came of a read that must end.
func (t *tenant) await(what string, done <-chan error) error {
	t.w.Helper()
	select {
	case err := <-done:
		if errors.Is(err, errWrong) || err != nil && !errors.Is(err, unix.EIO) {
			t.w.Fatalf("%s: %v", what, err)
		}
		return err
	case <-t.w.ctx.Done():
		t.w.Fatalf("%s hangs", what)
		return nil
	}
}

// crowd reads a tenant's files at random.
type crowd struct {
	t          *tenant
	ok, failed atomic.Int64
	stop       atomic.Bool
	done       sync.WaitGroup
	mu         sync.Mutex // guards following
	last       error      // of those that failed
	wrong      error      // not EIO
}

// crowdPart is what a reader reads at a time of the big file.
const crowdPart = 128 << 10

// errorPause keeps readers that get errors from doing nothing else.
const errorPause = 20 * time.Millisecond

// crowd starts so many readers. They end with the test, or by end.
func (t *tenant) crowd(readers int) *crowd {
	t.w.Helper()
	c := &crowd{t: t}
	for i := range readers {
		random := rand.New(rand.NewPCG(uint64(i), 0))
		c.done.Go(func() {
			for !c.stop.Load() {
				var err error
				if random.IntN(4) > 0 {
					err = t.read(t.names[random.IntN(len(t.names))])
				} else { // of which most is missing for longest
					err = t.part(bigFile, random.IntN(stockBig/crowdPart)*crowdPart, crowdPart)
				}
				if err == nil {
					c.ok.Add(1)
					continue
				}
				c.failed.Add(1)
				c.mu.Lock()
				if c.last = err; !errors.Is(err, unix.EIO) {
					c.wrong = err
				}
				c.mu.Unlock()
				time.Sleep(errorPause)
			}
		})
	}
	t.w.Cleanup(func() { c.stop.Store(true) })
	return c
}

// goesOn waits until so many more reads have succeeded.
func (c *crowd) goesOn(what string, reads int64) {
	c.t.w.Helper()
	from := c.ok.Load()
	c.t.w.until(what, func() bool { return c.ok.Load() >= from+reads })
}

// end ends it, and checks that it saw nothing but what is in the image, or EIO where that may be.
func (c *crowd) end(errorsMayBe bool) {
	c.t.w.Helper()
	c.stop.Store(true)
	ended := make(chan struct{})
	go func() { c.done.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-c.t.w.ctx.Done():
		c.t.w.Fatal("a container's read hangs")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wrong != nil || c.failed.Load() > 0 && !errorsMayBe {
		c.t.w.Errorf("of %d reads %d failed: %v, %v", c.ok.Load()+c.failed.Load(), c.failed.Load(), c.wrong, c.last)
	}
	c.t.w.Logf("the container read %d files, and got %d errors (%v)", c.ok.Load(), c.failed.Load(), c.last)
}
