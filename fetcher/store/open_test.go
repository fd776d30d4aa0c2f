package store

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"
)

func TestRefusedNames(t *testing.T) {
	s := openStore(t, t.TempDir(), 0)
	for _, d := range []digest.Digest{
		"", "sha256", "sha256:", "sha256:../../../../etc/passwd", "sha256:AB", "md5:d41d8cd98f00b204e9800998ecf8427e",
		digest.SHA384.FromString("x"), "../sha256:" + digest.Digest(digest.FromString("x").Encoded()),
	} {
		_, err := s.Blob(t.Context(), d, 1)
		want(t, "blob "+string(d), err, ErrDigest)
		_, err = s.Stat(d)
		want(t, "stat "+string(d), err, ErrDigest)
		want(t, "remove "+string(d), s.Remove(d), ErrDigest)
		want(t, "pin "+string(d), s.Pin(d, "me"), ErrDigest)
		want(t, "put "+string(d), s.PutContent(d, nil), ErrDigest)
		_, err = s.Content(d)
		want(t, "content "+string(d), err, ErrDigest)
	}
	for _, size := range []int64{-1, -1 << 63, maxSize + 1, 1<<63 - 1} {
		_, err := s.Blob(t.Context(), digest.FromString("x"), size)
		want(t, "hostile size", err, ErrSize)
	}
	if l, err := s.List(); err != nil || len(l) != 0 {
		t.Errorf("something was left: %v, %v", l, err)
	}
}

func TestWrongSize(t *testing.T) {
	data, d := content(75 * kib)
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	ctx := t.Context()

	// Nothing held yet: a wrong descriptor does not block the right one, unless somebody uses it.
	b := openBlob(t, s, d, 17)
	_, err := s.Blob(ctx, d, 75*kib)
	want(t, "other size while open", err, ErrSize)
	b.Close()

	b = openBlob(t, s, d, 75*kib)
	put(t, b, data, 0)
	b.Close()
	_, err = s.Blob(ctx, d, 17)
	want(t, "other size, incomplete", err, ErrSize)
	b = openBlob(t, s, d, 75*kib)
	if !b.Has(0) {
		t.Fatal("a piece was lost")
	}
	put(t, b, data, 1)
	if err := b.Verify(ctx); err != nil {
		t.Fatal(err)
	}
	b.Close()
	_, err = s.Blob(ctx, d, 17)
	want(t, "other size, complete", err, ErrSize)
	if i, err := s.Stat(d); err != nil || !i.Complete || i.Size != 75*kib {
		t.Errorf("afterwards: %+v, %v", i, err)
	}
}

func TestNothingLeftOfNothing(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	data, d := content(1000)
	b := openBlob(t, s, d, 1000)
	b2 := openBlob(t, s, d, 1000)
	if _, err := b.WriteAt(data[:10], 0); err != nil {
		t.Fatal(err)
	}
	b.Close()
	if _, err := s.Stat(d); err != nil {
		t.Error("gone while open")
	}
	b2.Close()
	_, err := s.Stat(d)
	want(t, "stat", err, fs.ErrNotExist)
	for _, sub := range []string{"blobs/sha256", "trash"} {
		if es, _ := os.ReadDir(filepath.Join(dir, sub)); len(es) != 0 {
			t.Errorf("%s holds %v", sub, es)
		}
	}
}

func TestClosedStore(t *testing.T) {
	data, d := content(1000)
	s := openStore(t, t.TempDir(), 0)
	b := openBlob(t, s, d, 1000)
	put(t, b, data, 0)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal("second close:", err)
	}
	_, err := s.Blob(context.Background(), d, 1000)
	want(t, "blob", err, fs.ErrClosed)
	if err := b.Verify(t.Context()); err != nil {
		t.Error("a handle does not outlive its store:", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	want(t, "pin", s.Pin(d, "me"), fs.ErrClosed)
}

func TestTrashIsEmptied(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	s.Close()
	trash := filepath.Join(dir, dirTrash)
	os.MkdirAll(filepath.Join(trash, "old-1", "sub"), 0o700)
	os.WriteFile(filepath.Join(trash, "old-1", "sub", "data"), []byte("x"), 0o600)
	os.WriteFile(filepath.Join(trash, "new-young"), nil, 0o600)
	os.WriteFile(filepath.Join(trash, "new-old"), nil, 0o600)
	long := time.Now().Add(-2 * tempAge)
	os.Chtimes(filepath.Join(trash, "new-old"), long, long)
	openStore(t, dir, 0)
	es, _ := os.ReadDir(trash)
	if len(es) != 1 || es[0].Name() != "new-young" {
		t.Errorf("left: %v", es)
	}
}
