package snapshotter

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/index"
	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// TestEROFSTreesAreEqual: what a container sees of layers of any kind is what it would see of them unpacked.
func TestEROFSTreesAreEqual(t *testing.T) {
	lower, upper := trees(t)
	type maker func(testing.TB, []byte) lazytest.Layer
	for _, c := range []struct {
		name         string
		lower, upper maker
		served       [2]string
	}{
		{"eStargz on eStargz", lazytest.EStargz, lazytest.EStargz, [2]string{"lazy", "lazy"}},
		{"zstd chunked on zstd chunked", lazytest.ZstdChunked, lazytest.ZstdChunked, [2]string{"lazy", "lazy"}},
		{"plain on eStargz", lazytest.EStargz, lazytest.Gzip, [2]string{"lazy", "eager"}},
		{"plain on plain", lazytest.Gzip, lazytest.Gzip, [2]string{"eager", "eager"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := lazytest.NewImage()
			l, u := c.lower(t, lower), c.upper(t, upper)
			img.Add(l)
			img.Add(u)
			let := img.Hold()
			if c.served[1] == "eager" {
				let()
			}
			r := newEROFS(t, img)
			chain, lazily := r.pull(l, u)
			if d := cmp.Diff([]bool{true, true}, lazily); d != "" {
				t.Error("which layers are ours:", d)
			}
			want := describe(t, unpacked(t, l, u))
			see := func(when string) {
				r.in(chain[1], func(dir string) {
					if d := cmp.Diff(want, describe(t, dir)); d != "" {
						t.Error(when, d)
					}
				})
			}
			see("at first:")
			if c.served[1] != "eager" {
				let()
			}
			eventually(t, func() bool { st := r.layers.Status(); return st.Mounts == 2 && st.Data == 2 })
			see("when complete:")
			for i, layer := range []lazytest.Layer{l, u} {
				if n := countLines(r.log.String(), "served="+c.served[i], layer.Desc.Digest.String()); n != 1 {
					t.Errorf("layer %d has %d lines in the log with %s, want 1", i, n, c.served[i])
				}
			}
		})
	}
}

// TestEROFSSuite is containerd's own specification of a snapshotter; see TestSuite.
func TestEROFSSuite(t *testing.T) {
	needRoot(t)
	log := new(lines)
	captureLibraryLog(log.logger())
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		o := erofsOptions(t, filepath.Join(root, "sn"), lazytest.NewImage(), log)
		s, err := OpenSnapshots(ctx, o.State, Mounting{EROFS: o}, log.logger())
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	})
}

// layerOf makes a layer of one file of several chunks.
func layerOf(t testing.TB, make func(testing.TB, []byte) lazytest.Layer, name string) (l lazytest.Layer, want string) {
	t.Helper()
	want = body(name, 40*lazytest.ChunkSize)
	return make(t, lazytest.Tar(t, file(name, want, 0o644))), want
}

// TestEROFSRemove: with its last snapshot a layer leaves the disk; one that is in use is read to its end first.
func TestEROFSRemove(t *testing.T) {
	img := lazytest.NewImage()
	part, want := layerOf(t, lazytest.EStargz, "part")
	whole, _ := layerOf(t, lazytest.Gzip, "whole")
	img.Add(part)
	img.Add(whole)
	let := img.Hold()
	defer let()
	r := newEROFS(t, img)
	r.layer("whole", "", whole)
	r.layer("whole again", "", whole)
	r.layer("part", "", part)
	if u, err := r.Usage(t.Context(), "whole"); err != nil || u.Size < int64(len(want)) || u.Size > 4*int64(len(want)) {
		t.Errorf("the usage of a layer of %d bytes is %+v, %v", len(want), u, err)
	}
	if u, err := r.Usage(t.Context(), "part"); err != nil || u.Size >= int64(len(want)) {
		t.Errorf("the usage of a layer of which nothing is there is %+v, %v", u, err)
	}
	f, err := os.Open(filepath.Join(mountsBelow(t, filepath.Join(r.root, "snapshots"))[2], "part"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, name := range []string{"part", "whole"} {
		if err := r.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if st := r.layers.Status(); st.Mounts != 1 || st.Layers.Layers != 2 {
		t.Errorf("one of three snapshots is left, and one layer is in use besides: %+v", st)
	}
	b := make([]byte, len(want))
	if _, err := f.ReadAt(b, 0); err != nil || string(b) != want {
		t.Error("a file that was open when its layer was removed:", err)
	}
	f.Close()
	if err := r.Remove(t.Context(), "whole again"); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		st := r.layers.Status()
		return st.Mounts == 0 && st.Layers.Layers == 0 && st.Layers.Bytes == 0
	})
	eventually(t, func() bool { open, _, _ := img.Counts(""); return open == 0 })
}

// TestEROFSRefused: what cannot be mounted rightly is left to containerd.
func TestEROFSRefused(t *testing.T) {
	base := lazytest.Gzip(t, lazytest.Tar(t, file("a", "a", 0o600)))
	odd := lazytest.Gzip(t, lazytest.Tar(t, file("a/b", "b", 0o600), file("a", "a", 0o600), file("a/c", "c", 0o600)))
	img := lazytest.NewImage()
	img.Add(base)
	img.Add(odd)
	r := newEROFS(t, img)
	if !r.layer("base", "", base) {
		t.Error("an ordinary layer is left to containerd")
	}
	labels := lazytest.Labels(base)
	labels[diffID] = odd.Desc.Digest.String()
	if r.prepare("other", "", base, labels) {
		t.Error("a layer that is not the one in the image's configuration is mounted")
	}
}

const diffID = "containerd.io/snapshot/diff-id"

// TestEROFSCorrupt: wrong bytes are an error, in the file they belong to.
func TestEROFSCorrupt(t *testing.T) {
	bad, want := body("bad", 40*lazytest.ChunkSize), body("good", 40*lazytest.ChunkSize)
	l := lazytest.EStargz(t, lazytest.Tar(t, file("bad", bad, 0o644), file("good", want, 0o644)))
	img := lazytest.NewImage()
	img.Add(l)
	let := img.Hold()
	defer let()
	r := newEROFS(t, img)
	chain, _ := r.pull(l)
	img.Corrupt(l.Desc.Digest, 2000, 200)
	r.in(chain[0], func(dir string) {
		if b, err := os.ReadFile(filepath.Join(dir, "bad")); !errors.Is(err, unix.EIO) {
			t.Errorf("reading gives %d bytes and %v, want EIO", len(b), err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "good")); err != nil || string(b) != want {
			t.Errorf("the other file: %v", err)
		}
	})
}

// TestEROFSPublished: a plain layer with a published index is lazy at once, and completed it was compared; a forged index
// is found out, and its layer not used for new containers.
func TestEROFSPublished(t *testing.T) {
	for _, forged := range []bool{false, true} {
		t.Run(fmt.Sprintf("forged %v", forged), func(t *testing.T) {
			l, want := layerOf(t, lazytest.Gzip, "a")
			x, err := index.Build(t.Context(), bytes.NewReader(l.Data), l.Desc, nil, index.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if forged {
				x.Entries[1].Mode |= 0o4000
			}
			img := lazytest.NewImage()
			img.Add(l)
			img.Publish(x)
			let := img.Hold()
			r := newEROFS(t, img)
			r.layer("a", "", l)
			if countLines(r.log.String(), "served=lazy", "published index") != 1 {
				t.Error("the layer is not lazy")
			}
			r.in("a", func(dir string) {
				if b, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(b) != want {
					t.Error(err)
				}
			})
			let()
			if !forged {
				eventually(t, func() bool { st := r.layers.Status(); return st.Data == 1 })
				return
			}
			eventually(t, func() bool { return countLines(r.log.String(), "level=ERROR", "published index") == 1 })
			if _, err := r.Prepare(t.Context(), "container", "a"); !errdefs.IsUnavailable(err) {
				t.Errorf("a container on a forged layer: got %v, want unavailable", err)
			}
			if err := errors.Join(r.Remove(t.Context(), "container"), r.Remove(t.Context(), "a")); err != nil {
				t.Fatal(err)
			}
			r.layer("a", "", l)
			if countLines(r.log.String(), "served=eager") != 1 {
				t.Error("pulled again, the layer is not unpacked")
			}
			r.in("a", func(dir string) {
				if d := cmp.Diff(describe(t, unpacked(t, l)), describe(t, dir)); d != "" {
					t.Error(d)
				}
			})
		})
	}
}

// TestEROFSSideBySide: many pulls of one chain at once end with one snapshot of each layer, one mount, and one fetch.
func TestEROFSSideBySide(t *testing.T) {
	l, _ := layerOf(t, lazytest.Gzip, "a")
	img := lazytest.NewImage()
	img.Add(l)
	r := newEROFS(t, img)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			labels := lazytest.Labels(l)
			labels[targetLabel] = "A"
			_, err := r.Prepare(t.Context(), fmt.Sprintf("extract-%d", i), "", snapshots.WithLabels(labels))
			if !errdefs.IsAlreadyExists(err) {
				t.Errorf("got %v, want already exists", err)
			}
		})
	}
	wg.Wait()
	if left := mountsBelow(t, filepath.Join(r.root, "snapshots")); len(left) != 1 {
		t.Errorf("mounts: %v", left)
	}
	if _, fetched, _ := img.Counts(l.Desc.Digest); fetched != 1 {
		t.Errorf("%d fetches, want 1", fetched)
	}
}

// TestEROFSManyLayers: sixty layers, which take three seconds one after another, and less side by side.
func TestEROFSManyLayers(t *testing.T) {
	img := lazytest.NewImage()
	var layers []lazytest.Layer
	for i := range 60 {
		l := lazytest.Gzip(t, lazytest.Tar(t,
			special(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755}),
			file(fmt.Sprintf("d/%d", i), fmt.Sprint(i), 0o644), file("top", fmt.Sprint(i), 0o644)))
		img.Add(l)
		layers = append(layers, l)
	}
	r := newEROFS(t, img)
	chain, _ := r.pull(layers...)
	r.in(chain[59], func(dir string) {
		if d := cmp.Diff(describe(t, unpacked(t, layers...)), describe(t, dir)); d != "" {
			t.Error(d)
		}
	})
	begun := time.Now()
	r.reboot()
	r.open(nil)
	t.Log("60 layers unmounted and mounted again in", time.Since(begun))
	for i := 59; i >= 0; i-- {
		if err := r.Remove(t.Context(), chain[i]); err != nil {
			t.Fatal(err)
		}
	}
	if st := r.layers.Status(); st.Mounts != 0 || st.Layers.Layers != 0 {
		t.Errorf("left: %+v", st)
	}
}

// TestEROFSImplicit: directories that a layer leaves out have the attributes of the nearest layer below, also after a reboot.
func TestEROFSImplicit(t *testing.T) {
	dir := func(name string, mode int64) lazytest.Entry {
		return lazytest.Entry{Header: tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode, Uid: 7, Gid: 8,
			PAXRecords: map[string]string{"SCHILY.xattr.user.note": name}}}
	}
	layers := []lazytest.Layer{
		lazytest.Gzip(t, lazytest.Tar(t, dir("d/", 0o700), dir("d/e/", 0o711), file("d/a", "a", 0o600), dir("g/", 0o2770))),
		lazytest.Gzip(t, lazytest.Tar(t, dir("d/", 0o750), file("d/c", "c", 0o600))),
		lazytest.Gzip(t, lazytest.Tar(t, file("d/e/b", "b", 0o600), file("new/f", "f", 0o600), file("g/h/i/j", "j", 0o600))),
	}
	img := lazytest.NewImage()
	for _, l := range layers {
		img.Add(l)
	}
	r := newEROFS(t, img)
	chain, ours := r.pull(layers...)
	if d := cmp.Diff([]bool{true, true, true}, ours); d != "" {
		t.Error("which layers are ours:", d)
	}
	want := map[string]string{"d": "750 7:8 d/", "d/e": "711 7:8 d/e/", "new": "755 0:0 ", "g": "2770 7:8 g/", "g/h": "755 0:8 ", "g/h/i": "755 0:0 "}
	for range 2 {
		r.in(chain[2], func(root string) {
			for name, want := range want {
				path := filepath.Join(root, name)
				var st unix.Stat_t
				if err := unix.Lstat(path, &st); err != nil {
					t.Fatal(err)
				}
				note := make([]byte, 100)
				n, _ := unix.Lgetxattr(path, "user.note", note)
				if got := fmt.Sprintf("%o %d:%d %s", st.Mode&0o7777, st.Uid, st.Gid, note[:max(n, 0)]); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
			for _, f := range []string{"d/a", "d/c", "d/e/b", "new/f", "g/h/i/j"} {
				if b, err := os.ReadFile(filepath.Join(root, f)); err != nil || string(b) != f[len(f)-1:] {
					t.Errorf("%s has %q, %v", f, b, err)
				}
			}
		})
		r.reboot()
		r.open(nil)
	}
}

// TestEROFSInheritedACL: what is made in a directory with a default access control list gets one when it is unpacked. A layer that
// leaves such a directory out is left to containerd, which unpacks it.
func TestEROFSInheritedACL(t *testing.T) {
	acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x20\x00\x05\x00\xff\xff\xff\xff"
	layers := []lazytest.Layer{
		lazytest.Gzip(t, lazytest.Tar(t, lazytest.Entry{Header: tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o755,
			PAXRecords: map[string]string{"SCHILY.xattr.system.posix_acl_default": acl}}})),
		lazytest.Gzip(t, lazytest.Tar(t, file("d/f", "f", 0o600))),
	}
	img := lazytest.NewImage()
	for _, l := range layers {
		img.Add(l)
	}
	r := newEROFS(t, img)
	chain, ours := r.pull(layers...)
	if d := cmp.Diff([]bool{true, false}, ours); d != "" {
		t.Error("which layers are ours:", d)
	}
	r.in(chain[1], func(root string) {
		if b, err := os.ReadFile(filepath.Join(root, "d/f")); err != nil || string(b) != "f" {
			t.Errorf("%q, %v", b, err)
		}
	})
}
