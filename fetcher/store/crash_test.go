package store

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
)

func bootStore(t *testing.T, dir, boot string) *Store {
	t.Helper()
	s, err := openBoot(Options{Dir: dir}, boot)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// The machine went down: what the records say counts only where the data bears it out.
func TestReboot(t *testing.T) {
	const size = 5*64*kib + 3
	data, d := content(size)
	for _, c := range []struct {
		name       string
		boot, next string
		checked    bool
	}{
		{"same boot", "one", "one", false},
		{"another boot", "one", "two", true},
		{"boot unknown", "", "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			s := bootStore(t, dir, c.boot)
			b := openBlob(t, s, d, size)
			put(t, b, data, 0, 1, 2, 5)
			b.Close()
			s.Close()

			// Pieces 1 and 5 never reached the disk.
			path := filepath.Join(s.blobDir(d), fileData)
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, i := range []int{1, 5} {
				off, _ := pieceRange(size, i)
				if _, err := f.WriteAt([]byte{0, 0, 0}, off); err != nil {
					t.Fatal(err)
				}
			}
			f.Close()

			if c.checked { // a check that is cut short loses nothing and decides nothing
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				_, err := bootStore(t, dir, c.next).Blob(ctx, d, size)
				want(t, "open with an ended context", err, context.Canceled)
			}
			s = bootStore(t, dir, c.next)
			b = openBlob(t, s, d, size)
			for i, held := range []bool{true, !c.checked, true, false, false, !c.checked} {
				if b.Has(i) != held {
					t.Errorf("piece %d held: %v", i, b.Has(i))
				}
			}
			if !c.checked {
				return
			}
			b.Close()

			// Once checked, and dropped, in this boot.
			b = openBlob(t, bootStore(t, dir, c.next), d, size)
			if b.Has(1) || !b.Has(2) {
				t.Error("the outcome of the check was not kept")
			}
			put(t, b, data, 1, 3, 4, 5)
			if err := b.Verify(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A crash between "verified" and "durable" costs a Verify, no bytes.
func TestCrashBeforeRecord(t *testing.T) {
	const size = 3 * 64 * kib
	data, d := content(size)
	dir := t.TempDir()
	s := bootStore(t, dir, "one")
	b := openBlob(t, s, d, size)
	put(t, b, data, 0, 1, 2)
	path := filepath.Join(s.blobDir(d), filePieces)
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if err := os.WriteFile(path, before, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, boot := range []string{"one", "two"} {
		b = openBlob(t, bootStore(t, dir, boot), d, size)
		if b.Complete() || b.Have() != size {
			t.Errorf("boot %s: complete %v, have %d", boot, b.Complete(), b.Have())
		}
		b.Close()
	}
	b = openBlob(t, bootStore(t, dir, "two"), d, size)
	if err := b.Verify(t.Context()); err != nil || !b.Complete() {
		t.Error(err)
	}
}

// A reader of a complete blob keeps its bytes when another process finds the records damaged and starts over.
func TestResetUnderReader(t *testing.T) {
	const size = 2 * 64 * kib
	data, d := content(size)
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	fill(t, s, size)
	b := openBlob(t, s, d, size)
	if err := os.Truncate(filepath.Join(s.blobDir(d), filePieces), 3); err != nil {
		t.Fatal(err)
	}
	b2 := openBlob(t, openStore(t, dir, 0), d, size)
	if b2.Have() != 0 {
		t.Errorf("started over with %d bytes", b2.Have())
	}
	got := make([]byte, size)
	if _, err := b.ReadAt(got, 0); err != nil || !bytes.Equal(got, data) {
		t.Error("the reader lost its bytes:", err)
	}
	if _, err := b.File(); err == nil {
		t.Error("File gave the unchecked bytes of another")
	}
}
