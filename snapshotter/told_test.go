package snapshotter

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/docker-quay/docker-quay/snapshotter/lazy/lazytest"
)

// TestEROFSToldByOthers: what a node that unpacked a plain layer tells of it lets another one mount the layer before
// it is there, and says what to fetch first. A node that tells nonsense does no harm.
func TestEROFSToldByOthers(t *testing.T) {
	plain, want := layerOf(t, lazytest.Gzip, "plain")
	table, wantTable := layerOf(t, lazytest.EStargz, "table")
	other, _ := layerOf(t, lazytest.Gzip, "other")
	img := lazytest.NewImage()
	for _, l := range []lazytest.Layer{plain, table, other} {
		img.Add(l)
	}
	let := img.Hold()
	first := newEROFS(t, img)
	first.layer("plain", "", plain)
	first.layer("other", "", other)
	first.layer("table", "", table)
	read := func(r *rig, name, want string) {
		t.Helper()
		r.in(name, func(dir string) {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
				t.Error(err)
			}
		})
	}
	read(first, "plain", want)
	read(first, "table", wantTable)
	let()
	eventually(t, func() bool { return first.layers.Status().Data == 3 })
	said := map[string][]byte{}
	for name, l := range map[string]lazytest.Layer{"plain": plain, "other": other, "table": table} {
		b, err := first.layers.Tell(t.Context(), l.Desc.Digest)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		said[name] = b
	}
	if i := bytes.IndexByte(said["table"], '\n'); i != len(said["table"])-1 {
		t.Errorf("of a layer with a table of its own %d bytes of index are told", len(said["table"])-1-i)
	}
	if !bytes.Contains(said["table"], []byte(`"order":[{"off":`)) {
		t.Errorf("what was read first of a lazy layer is not told: %s", said["table"])
	}
	if _, err := first.layers.Tell(t.Context(), "sha256:0000000000000000000000000000000000000000000000000000000000000000"); err == nil {
		t.Error("something is told of a layer that is not here")
	}

	t.Run("not believed", func(t *testing.T) {
		img := lazytest.NewImage()
		img.Add(plain)
		img.Tell(plain.Desc.Digest, said["plain"])
		r := newEROFS(t, img)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r.erofs.NoMembers = true
		r.open(nil)
		r.layer("plain", "", plain)
		if n := countLines(r.log.String(), "served=eager"); n != 1 {
			t.Errorf("%d layers are unpacked", n)
		}
	})
	for _, c := range []struct {
		name string
		said []byte
		lazy bool
	}{
		{"the truth", said["plain"], true},
		{"nothing", []byte{}, false},
		{"no end", bytes.Repeat([]byte{' '}, 1<<20), false},
		{"another version", append([]byte(`{"version":9}`+"\n"), said["plain"][bytes.IndexByte(said["plain"], '\n')+1:]...), false},
		{"another layer's", said["other"], false},
		{"cut short", said["plain"][:len(said["plain"])-20], false},
		{"only an order", said["table"], false},
		{"an order of nowhere", append([]byte(`{"version":1,"order":[{"off":1099511627776,"len":4}]}`+"\n"), said["plain"][bytes.IndexByte(said["plain"], '\n')+1:]...), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := lazytest.NewImage()
			img.Add(plain)
			img.Tell(plain.Desc.Digest, c.said)
			r := newEROFS(t, img)
			if !r.layer("plain", "", plain) {
				t.Fatal("the layer is left to containerd")
			}
			served := map[bool]string{true: "served=lazy", false: "served=eager"}
			got := []int{countLines(r.log.String(), served[c.lazy]), countLines(r.log.String(), served[!c.lazy])}
			if d := cmp.Diff([]int{1, 0}, got); d != "" {
				t.Error("how the layer came:", d)
			}
			read(r, "plain", want)
			eventually(t, func() bool { return r.layers.Status().Data == 1 })
			read(r, "plain", want)
		})
	}
}

// TestEROFSComparesLater: an index that was somebody's word is compared with its layer also when the daemon ended before
// it came to that, and every mount reads the complete layer by then.
func TestEROFSComparesLater(t *testing.T) {
	plain, _ := layerOf(t, lazytest.Gzip, "plain")
	img := lazytest.NewImage()
	img.Add(plain)
	r := newEROFS(t, img)
	r.layer("plain", "", plain)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	claim := filepath.Join(r.root, "claims", plain.Desc.Digest.Encoded())
	if err := os.WriteFile(claim, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r.open(nil)
	eventually(t, func() bool { _, err := os.Lstat(claim); return errors.Is(err, fs.ErrNotExist) })
}
