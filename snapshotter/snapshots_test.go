package snapshotter

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

func sum(b []byte) [8]byte { s := sha256.Sum256(b); return [8]byte(s[:8]) }

// TestSuite is containerd's own specification of a snapshotter. It is told that it deals
// with overlayfs, as the kernel's overlayfs cannot rename a folder of a lower layer,
// which the suite then leaves out.
func TestSuite(t *testing.T) {
	needRoot(t)
	log := new(lines)
	captureLibraryLog(log.logger())
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := OpenSnapshots(ctx, root, Mounting{Layers: lazytest.NewImage()}, log.logger())
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	})
}

// body is n bytes that differ from file to file and from chunk to chunk.
func body(seed string, n int) string {
	var b strings.Builder
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%s %d %x\n", seed, i, sha256.Sum256([]byte(seed+fmt.Sprint(i))))
	}
	return b.String()[:n]
}

// trees are two layers with everything a layer can have.
func trees(t *testing.T) (lower, upper []byte) {
	lower = lazytest.Tar(t,
		special(tar.Header{Name: "usr/", Typeflag: tar.TypeDir, Mode: 0o755}),
		special(tar.Header{Name: "usr/bin/", Typeflag: tar.TypeDir, Mode: 0o755}),
		file("usr/bin/tool", body("tool", 5*lazytest.ChunkSize+17), 0o755),
		file("usr/bin/su", "setuid", 0o4755),
		file("usr/bin/exact", body("exact", 2*lazytest.ChunkSize), 0o700),
		special(tar.Header{Name: "usr/bin/link", Typeflag: tar.TypeLink, Linkname: "usr/bin/tool", Mode: 0o755}),
		special(tar.Header{Name: "usr/bin/ln", Typeflag: tar.TypeSymlink, Linkname: "../../nowhere", Mode: 0o777}),
		special(tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o755}),
		file("etc/empty", "", 0o600),
		file("etc/shadow", "secret", 0),
		lazytest.Entry{Header: tar.Header{Name: "etc/owned", Mode: 0o640, Uid: 1000, Gid: 100000}, Body: "mine"},
		lazytest.Entry{Header: tar.Header{Name: "etc/caps", Mode: 0o755, PAXRecords: map[string]string{
			"SCHILY.xattr.user.note":           "a\x00b",
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		}}, Body: "capable"},
		file("etc/ünï code\n", "name", 0o644),
		special(tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}),
		special(tar.Header{Name: "dev/", Typeflag: tar.TypeDir, Mode: 0o755}),
		special(tar.Header{Name: "dev/null", Typeflag: tar.TypeChar, Mode: 0o666, Devmajor: 1, Devminor: 3}),
		special(tar.Header{Name: "dev/pipe", Typeflag: tar.TypeFifo, Mode: 0o600}),
		special(tar.Header{Name: "cache/", Typeflag: tar.TypeDir, Mode: 0o755}),
		file("cache/old", "old", 0o644),
		special(tar.Header{Name: "gone/", Typeflag: tar.TypeDir, Mode: 0o755}),
		file("gone/child", "child", 0o644),
	)
	upper = lazytest.Tar(t,
		special(tar.Header{Name: "etc/", Typeflag: tar.TypeDir, Mode: 0o711}),
		file("etc/.wh.empty", "", 0o644),
		file("etc/shadow", "changed", 0o600),
		special(tar.Header{Name: "cache/", Typeflag: tar.TypeDir, Mode: 0o700}),
		file("cache/.wh..wh..opq", "", 0o644),
		file("cache/new", body("new", 3*lazytest.ChunkSize), 0o644),
		file(".wh.gone", "", 0o644),
		file("added", "added", 0o644),
	)
	return lower, upper
}

// TestTreesAreEqual: what a container sees of lazy layers is what it would see of
// unpacked ones, in every combination.
func TestTreesAreEqual(t *testing.T) {
	lower, upper := trees(t)
	type maker func(testing.TB, []byte) lazytest.Layer
	for _, c := range []struct {
		name         string
		lower, upper maker
		lazily       []bool
	}{
		{"eStargz on eStargz", lazytest.EStargz, lazytest.EStargz, []bool{true, true}},
		{"zstd chunked on zstd chunked", lazytest.ZstdChunked, lazytest.ZstdChunked, []bool{true, true}},
		{"plain on eStargz", lazytest.EStargz, lazytest.Gzip, []bool{true, false}},
		{"zstd chunked on plain", lazytest.Gzip, lazytest.ZstdChunked, []bool{false, true}},
		{"plain on plain", lazytest.Gzip, lazytest.Gzip, []bool{false, false}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := lazytest.NewImage()
			l, u := c.lower(t, lower), c.upper(t, upper)
			img.Add(l)
			img.Add(u)
			r := newRig(t, img)
			chain, lazily := r.pull(l, u)
			if d := cmp.Diff(c.lazily, lazily); d != "" {
				t.Error("which layers are lazy:", d)
			}
			want := describe(t, unpacked(t, l, u))
			r.in(chain[1], func(dir string) {
				if d := cmp.Diff(want, describe(t, dir)); d != "" {
					t.Error(d)
				}
			})
			for i, layer := range []lazytest.Layer{l, u} {
				if _, fetched, _ := img.Counts(layer.Desc.Digest); (fetched == 1) != c.lazily[i] {
					t.Errorf("layer %d: %d background fetches", i, fetched)
				}
				served := map[bool]string{true: "served=lazy", false: "served=unpack"}[c.lazily[i]]
				if n := countLines(r.log.String(), served, layer.Desc.Digest.String()); n != 1 {
					t.Errorf("layer %d has %d lines in the log with %s, want 1", i, n, served)
				}
			}
		})
	}
}

func countLines(log string, all ...string) (n int) {
lines:
	for l := range strings.Lines(log) {
		for _, s := range all {
			if !strings.Contains(l, s) {
				continue lines
			}
		}
		n++
	}
	return n
}

// TestView: a read-only view of one lazy layer.
func TestView(t *testing.T) {
	lower, _ := trees(t)
	l := lazytest.EStargz(t, lower)
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	chain, _ := r.pull(l)
	m, err := r.View(t.Context(), "view", chain[0])
	if err != nil {
		t.Fatal(err)
	}
	want := describe(t, unpacked(t, l))
	err = mount.WithTempMount(t.Context(), m, func(dir string) error {
		if d := cmp.Diff(want, describe(t, dir)); d != "" {
			t.Error(d)
		}
		if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, unix.EROFS) {
			t.Errorf("writing gives %v, want EROFS", err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestCorruptChunk: wrong bytes are an error, in the file they belong to and nowhere else.
func TestCorruptChunk(t *testing.T) {
	want := body("good", 4*lazytest.ChunkSize)
	for _, c := range []struct {
		name string
		make func(testing.TB, []byte) lazytest.Layer
	}{{"eStargz", lazytest.EStargz}, {"zstd chunked", lazytest.ZstdChunked}} {
		t.Run(c.name, func(t *testing.T) {
			// The archive's order is kept: the first file's bytes come first.
			l := c.make(t, lazytest.Tar(t, file("bad", body("bad", 4*lazytest.ChunkSize), 0o644), file("good", want, 0o644)))
			img := lazytest.NewImage()
			img.Add(l)
			r := newRig(t, img)
			chain, lazily := r.pull(l)
			if !lazily[0] {
				t.Fatal("not lazy")
			}
			img.Corrupt(l.Desc.Digest, 2000, 200)
			r.in(chain[0], func(dir string) {
				if b, err := os.ReadFile(filepath.Join(dir, "bad")); !errors.Is(err, unix.EIO) {
					t.Errorf("reading gives %d bytes and %v, want EIO", len(b), err)
				}
				if b, err := os.ReadFile(filepath.Join(dir, "good")); err != nil || string(b) != want {
					t.Errorf("the other file: %v", err)
				}
			})
			if n := countLines(r.log.String(), "level=ERROR", "could not be read"); n == 0 {
				t.Error("nothing in the log")
			}
		})
	}
}

// TestSourceAway: reads fail while the source is away, and come right when it is back.
func TestSourceAway(t *testing.T) {
	want := body("f", 3*lazytest.ChunkSize)
	l := lazytest.EStargz(t, lazytest.Tar(t, file("f", want, 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	chain, _ := r.pull(l)
	r.in(chain[0], func(dir string) {
		img.Down(errors.New("registry away"))
		if _, err := os.ReadFile(filepath.Join(dir, "f")); !errors.Is(err, unix.EIO) {
			t.Errorf("got %v, want EIO", err)
		}
		img.Down(nil)
		if b, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(b) != want {
			t.Error("after the source came back:", err)
		}
	})
}

// TestRestart: after a restart the lazy layers are there again; one whose source is
// gone hurts only itself, and heals when the source is back.
func TestRestart(t *testing.T) {
	a := lazytest.EStargz(t, lazytest.Tar(t, file("a", body("a", 100000), 0o644)))
	b := lazytest.ZstdChunked(t, lazytest.Tar(t, file("b", body("b", 100000), 0o644)))
	img := lazytest.NewImage()
	img.Add(a)
	img.Add(b)
	r := newRig(t, img)
	r.layer("A", "", a)
	r.layer("B", "", b)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if left := mountsBelow(t, r.root); len(left) > 0 {
		t.Fatalf("mounts left: %v", left)
	}
	img.Remove(b.Desc.Digest)
	r.open(img)
	r.in("A", func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, a)), describe(t, dir)); d != "" {
			t.Error(d)
		}
	})
	if _, err := r.Prepare(t.Context(), "broken", "B"); !errdefs.IsUnavailable(err) {
		t.Errorf("a container on the broken layer: got %v, want unavailable", err)
	}
	if n := countLines(r.log.String(), "failed=1", "layers=1"); n != 1 {
		t.Error("the log does not say that one of two failed")
	}
	if err := r.Remove(t.Context(), "broken"); err != nil {
		t.Fatal(err)
	}
	img.Add(b)
	r.in("B", func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, b)), describe(t, dir)); d != "" {
			t.Error(d)
		}
	})
}

// TestKilled: what a killed daemon left mounted is cleared away at the next start.
func TestKilled(t *testing.T) {
	l := lazytest.EStargz(t, lazytest.Tar(t, file("a", "text", 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	r.layer("A", "", l)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// A bind mount stands for the dead FUSE mount.
	stale := filepath.Join(r.root, "snapshots", "1", "fs")
	if err := os.MkdirAll(stale, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(t.TempDir(), stale, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(r.root, "chunks", "7", "left"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.open(img)
	if n := len(mountsBelow(t, r.root)); n != 1 {
		t.Errorf("%d mounts, want the layer's", n)
	}
	if _, err := os.Stat(filepath.Join(r.root, "chunks", "7")); !errors.Is(err, fs.ErrNotExist) {
		t.Error("chunks of the dead daemon are still there:", err)
	}
	r.in("A", func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(b) != "text" {
			t.Error(string(b), err)
		}
	})
}

// TestLostMount: a mount that somebody took away is made again when it is needed.
func TestLostMount(t *testing.T) {
	l := lazytest.EStargz(t, lazytest.Tar(t, file("a", "text", 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	r.layer("A", "", l)
	at := mountsBelow(t, r.root)
	if len(at) != 1 {
		t.Fatalf("mounts: %v", at)
	}
	if err := unix.Unmount(at[0], 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { open, _, _ := img.Counts(""); return open == 0 })
	r.in("A", func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(b) != "text" {
			t.Error(string(b), err)
		}
	})
}

// TestRemoveInUse: a layer that is removed while a file of it is open is served until
// the file is closed, and released then.
func TestRemoveInUse(t *testing.T) {
	want := body("f", 4*lazytest.ChunkSize)
	l := lazytest.EStargz(t, lazytest.Tar(t, file("f", want, 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	r.layer("A", "", l)
	f, err := os.Open(filepath.Join(mountsBelow(t, r.root)[0], "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Remove(t.Context(), "A"); err != nil {
		t.Fatal(err)
	}
	if left := mountsBelow(t, r.root); len(left) > 0 {
		t.Errorf("still mounted: %v", left)
	}
	b := make([]byte, len(want))
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != want {
		t.Error("the open file:", err)
	}
	f.Close()
	eventually(t, func() bool { open, _, _ := img.Counts(""); return open == 0 })
}

// TestConcurrentPrepare: many pulls of one chain at once end with one snapshot of each
// layer, one mount, and nothing else.
func TestConcurrentPrepare(t *testing.T) {
	l := lazytest.EStargz(t, lazytest.Tar(t, file("a", body("a", 50000), 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	labels := lazytest.Labels(l)
	labels[targetLabel] = "A"
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			_, err := r.Prepare(t.Context(), fmt.Sprintf("extract-%d", i), "", snapshots.WithLabels(labels))
			if !errdefs.IsAlreadyExists(err) {
				t.Errorf("got %v, want already exists", err)
			}
		})
	}
	wg.Wait()
	var names []string
	if err := r.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		names = append(names, i.Name)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"A"}, names); d != "" {
		t.Error(d)
	}
	if left := mountsBelow(t, r.root); len(left) != 1 {
		t.Errorf("mounts: %v", left)
	}
	if open, _, _ := img.Counts(""); open != 1 {
		t.Errorf("%d handles open, want 1", open)
	}
}

// TestManyLayers: an image of sixty lazy layers, and its neighbours looked at in time.
func TestManyLayers(t *testing.T) {
	img := lazytest.NewImage()
	var layers []lazytest.Layer
	for i := range 60 {
		l := lazytest.EStargz(t, lazytest.Tar(t,
			special(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}),
			file(fmt.Sprintf("d/%d", i), fmt.Sprint(i), 0o644), file("top", fmt.Sprint(i), 0o644)))
		img.Add(l)
		layers = append(layers, l)
	}
	r := newRig(t, img)
	chain, _ := r.pull(layers...)
	r.in(chain[59], func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, layers...)), describe(t, dir)); d != "" {
			t.Error(d)
		}
	})
	for i := 59; i >= 0; i-- {
		if err := r.Remove(t.Context(), chain[i]); err != nil {
			t.Fatal(err)
		}
	}
	if left := mountsBelow(t, r.root); len(left) > 0 {
		t.Errorf("mounts left: %v", left)
	}
}

// TestUnmountEndsMount: a snapshot removed while its layer is being looked up does
// not wait for the answer.
func TestUnmountEndsMount(t *testing.T) {
	l := lazytest.EStargz(t, lazytest.Tar(t, file("a", "text", 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	r := newRig(t, img)
	stop := img.Hang()
	defer stop()
	labels := lazytest.Labels(l)
	at := filepath.Join(t.TempDir(), "fs")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.fs.Mount(t.Context(), at, labels) }()
	eventually(t, func() bool {
		select {
		case err := <-done:
			if err == nil {
				t.Error("mounted")
			}
			return true
		default:
			if err := r.fs.Unmount(t.Context(), at); err != nil {
				t.Error(err)
			}
			return false
		}
	})
}

// TestLocked: two daemons never work on one folder.
func TestLocked(t *testing.T) {
	r := newRig(t, nil)
	if _, err := OpenSnapshots(t.Context(), r.root, Mounting{}, r.log.logger()); !errors.Is(err, ErrInUse) {
		t.Errorf("got %v, want ErrInUse", err)
	}
}

func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Error("did not happen within 10 s")
}
