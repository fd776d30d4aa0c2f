package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// killsEnv is how many times TestKillStorm kills the daemon: the 200 of the acceptance take minutes.
	killsEnv = "QUAY_TEST_KILLS"
	// stormConfig keeps the image from being complete before the storm is over.
	stormConfig = "[limits]\ndownload = \"4MiB\"\n[lazy]\nquiet = \"1h\"\n"
)

// needsEROFS skips a test where the daemon mounts layers by FUSE.
func (d *daemon) needsEROFS() {
	d.w.Helper()
	if st := d.status(); st.Layers == nil || st.Layers.Mount != "erofs" && st.Layers.Mount != "loop" {
		d.w.Skipf("layers are not mounted as EROFS here: %+v", st.Layers)
	}
}

func (d *daemon) status() api.Status {
	d.w.Helper()
	c, st, err := api.Dial(d.w.ctx, d.socket)
	d.w.must(err)
	c.Close()
	return st
}

// readStorm is a program that reads the image's files over and over, has the kernel forget what it has read, and
// compares it with what it should be: "OK n" at the end, "WRONG" or "ERROR" before.
const readStorm = `
import hashlib, json, os, random, signal, sys
stop = False
def ended(*_):
    global stop
    stop = True
signal.signal(signal.SIGTERM, ended)
known, n = json.load(open("/storm/sums.json")), 0
files = sorted(known)
random.seed(int(sys.argv[1]))
print("READY", len(files), flush=True)
while not stop:
    f = random.choice(files)
    try:
        fd = os.open(f, os.O_RDONLY)
        h = hashlib.sha256()
        while True:
            b = os.read(fd, 1 << 20)
            if not b:
                break
            h.update(b)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    except OSError as e:
        print("ERROR", f, e, flush=True)
        sys.exit(1)
    if h.hexdigest() != known[f]:
        print("WRONG", f, flush=True)
        sys.exit(1)
    n += 1
print("OK", n, flush=True)
`

// storm is a container that reads.
type storm struct {
	w   *world
	id  string
	out string
	run *rig.Process
}

// startStorm starts a container of the demo image that reads until it is ended.
func (w *world) startStorm(c *rig.Containerd, img *image.Image, ref string, seed int) *storm {
	w.Helper()
	dir := w.dir(fmt.Sprintf("storm%d", seed))
	w.must(os.WriteFile(filepath.Join(dir, "storm.py"), []byte(readStorm), 0o644))
	all, err := img.FileSums()
	w.must(err)
	sums := map[string]string{}
	for path, sum := range all {
		if strings.HasPrefix(path, "/usr/lib/python3/") {
			sums[path] = sum
		}
	}
	text, err := json.Marshal(sums)
	w.must(err)
	w.must(os.WriteFile(filepath.Join(dir, "sums.json"), text, 0o644))
	out := filepath.Join(dir, "out")
	f, err := os.Create(out)
	w.must(err)
	w.Cleanup(func() { f.Close() })
	s := &storm{w: w, id: c.ContainerID(fmt.Sprintf("storm%d", seed)), out: out}
	s.run, err = w.rig.Start(w.ctx, rig.Command{
		Name: fmt.Sprintf("storm%d", seed), Path: "ctr", Stdout: f,
		Args: []string{"--address", c.Socket(), "--namespace", "apps", "run", "--rm", "--snapshotter", "quay",
			"--mount", "type=bind,src=" + dir + ",dst=/storm,options=rbind:ro", ref, s.id, "/usr/bin/python3", "/storm/storm.py", strconv.Itoa(seed)},
		Ready: func(context.Context) error {
			if text := s.text(); !strings.HasPrefix(text, "READY") {
				return fmt.Errorf("it says %q", text)
			}
			return nil
		},
	})
	w.must(err)
	return s
}

func (s *storm) text() string {
	b, _ := os.ReadFile(s.out)
	return string(b)
}

// alive checks that nothing went wrong so far.
func (s *storm) alive() {
	s.w.Helper()
	select {
	case <-s.run.Done():
		s.w.Fatalf("a container in the storm ended: %s%s", s.text(), s.run.Log())
	default:
	}
}

// end ends it and checks what it saw.
func (s *storm) end(c *rig.Containerd) {
	s.w.Helper()
	s.alive()
	if _, err := c.Ctr(s.w.ctx, "apps", "task", "kill", "--signal", "SIGTERM", s.id); err != nil {
		s.w.Error(err)
	}
	_ = s.run.Wait(s.w.ctx)
	text := s.text()
	_, counted, _ := strings.Cut(text, "OK ")
	if n, err := strconv.Atoi(strings.TrimSpace(counted)); err != nil || n < 50 {
		s.w.Errorf("a container in the storm says %q", text)
	}
	s.w.Logf("storm: %q", text)
}

// TestKillStorm: the daemon is killed at random moments while containers read what is not on the node yet, and each time
// started again. They read on, and nothing but what is in the image.
func TestKillStorm(t *testing.T) {
	kills := 12
	if n, err := strconv.Atoi(os.Getenv(killsEnv)); err == nil {
		kills = n
	}
	img := demo(t, image.EStargz)
	w := newWorldFor(t, 1, private, testTimeout+time.Duration(kills)*3*time.Second)
	ref := w.push(img, "demo", "storm")
	n := w.network.Node(1)
	d := w.daemon(n, daemonOptions{config: stormConfig})
	d.needsEROFS()
	d.login()
	c := w.containerd(n, d)
	r := containerdRuntime(w.user(n).uses(d), c, "quay")
	r.login()
	r.pull(append(r.to, "--lazy", "keep", ref)...)
	var storms []*storm
	for i := range 2 {
		storms = append(storms, w.startStorm(c, img, ref, i+1))
	}
	var slowest time.Duration
	for i := range kills {
		time.Sleep(rand.N(400 * time.Millisecond))
		if i%6 == 5 {
			w.must(d.process.Stop()) // an upgrade is an orderly end
		} else {
			w.must(d.process.Kill9())
		}
		begun := time.Now()
		d.start()
		slowest = max(slowest, time.Since(begun))
		for _, s := range storms {
			s.alive()
		}
	}
	time.Sleep(time.Second)
	for _, s := range storms {
		s.end(c)
	}
	st := d.status().Layers
	t.Logf("%d kills; the slowest start until the API answered took %s; %+v", kills, slowest.Round(time.Millisecond), st)
	if st.ReadErrors > 0 {
		t.Errorf("%d reads of containers failed", st.ReadErrors)
	}
}
