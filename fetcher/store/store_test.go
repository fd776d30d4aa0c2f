package store

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	digest "github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(childEnv); mode != "" {
		os.Exit(childMain(mode))
	}
	goleak.VerifyTestMain(m)
}

// content is size bytes that look like a compressed layer, the same for the same size.
func content(size int) ([]byte, digest.Digest) {
	var seed [32]byte
	seed[0], seed[1], seed[2], seed[3] = byte(size), byte(size>>8), byte(size>>16), 1
	b := make([]byte, size)
	rand.NewChaCha8(seed).Read(b)
	return b, digest.FromBytes(b)
}

func openStore(t testing.TB, dir string, quota int64) *Store {
	t.Helper()
	s, err := Open(Options{Dir: dir, Quota: quota})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close store: %v", err)
		}
	})
	return s
}

func openBlob(t testing.TB, s *Store, d digest.Digest, size int) *Blob {
	t.Helper()
	b, err := s.Blob(t.Context(), d, int64(size))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func put(t testing.TB, b *Blob, data []byte, pieces ...int) {
	t.Helper()
	for _, i := range pieces {
		off, n := b.PieceRange(i)
		if _, err := b.WriteAt(data[off:off+n], off); err != nil {
			t.Fatal(err)
		}
		if err := b.MarkPiece(i, Origin); err != nil {
			t.Fatal(err)
		}
	}
}

func all(b *Blob) []int {
	var l []int
	for i := range b.Pieces() {
		l = append(l, i)
	}
	return l
}

// fill makes a complete blob of size bytes in the store and closes it.
func fill(t testing.TB, s *Store, size int) digest.Digest {
	t.Helper()
	data, d := content(size)
	b := openBlob(t, s, d, size)
	put(t, b, data, all(b)...)
	if err := b.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	return d
}

func want(t testing.TB, what string, err, target error) {
	t.Helper()
	if !errors.Is(err, target) {
		t.Errorf("%s: error %v, want %v", what, err, target)
	}
}

func TestPieceSize(t *testing.T) {
	for _, c := range []struct {
		size, piece int64
		count       int
	}{
		{0, 64 * kib, 0},
		{1, 64 * kib, 1},
		{64 * kib, 64 * kib, 1},
		{64*kib + 1, 64 * kib, 2},
		{64 * mib, 64 * kib, 1024},
		{64*mib + 1, 128 * kib, 513},
		{256 * mib, 256 * kib, 1024},
		{256*mib + 1, 512 * kib, 513},
		{gib, mib, 1024},
		{gib + 1, mib, 1025},
		{maxSize, mib, 16 * mib},
	} {
		if p, n := PieceSize(c.size), pieceCount(c.size); p != c.piece || n != c.count {
			t.Errorf("%d bytes: %d pieces of %d, want %d of %d", c.size, n, p, c.count, c.piece)
		}
		if c.count > 0 {
			if off, n := pieceRange(c.size, c.count-1); off+n != c.size || n < 1 {
				t.Errorf("%d bytes: last piece is %d+%d", c.size, off, n)
			}
		}
	}
}

func TestBlobLife(t *testing.T) {
	const size = 3*64*kib + 1000
	data, d := content(size)
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	b := openBlob(t, s, d, size)

	if b.Digest() != d || b.Size() != size || b.Pieces() != 4 || b.PieceSize() != 64*kib {
		t.Fatalf("opened as %s, %d bytes, %d pieces of %d", b.Digest(), b.Size(), b.Pieces(), b.PieceSize())
	}
	_, err := b.ReadAt(make([]byte, 1), 0)
	want(t, "read of an empty blob", err, ErrMissing)
	if _, err := b.WriteAt(data[:10], 0); err != nil {
		t.Fatal(err)
	}
	_, err = b.ReadAt(make([]byte, 1), 0)
	want(t, "read of written, unmarked bytes", err, ErrMissing)

	changed := b.Changed()
	put(t, b, data, 0)
	select {
	case <-changed:
	default:
		t.Error("Changed did not tell of a marked piece")
	}
	if !b.Has(0) || b.Has(1) || b.Has(-1) || b.Has(4) || b.Have() != 64*kib || b.Frontier() != 1 || b.Source(0) != Origin || b.Source(1) != 0 {
		t.Error("wrong account of one held piece")
	}
	n, err := b.WriteAt(make([]byte, 10), 5)
	want(t, "write to a held piece", err, ErrHeld)
	if n != 0 {
		t.Errorf("write to a held piece wrote %d bytes", n)
	}
	_, err = b.WriteAt(make([]byte, 64*kib+1), 64*kib-1) // the tail of 0 and all of 1
	want(t, "write across a held piece", err, ErrHeld)
	if err := b.MarkPiece(0, Peer); err != nil || b.Source(0) != Origin {
		t.Errorf("second mark: %v, source %s", err, b.Source(0))
	}
	if b.MarkPiece(4, Origin) == nil || b.MarkPiece(-1, Origin) == nil || b.MarkPiece(1, 0) == nil {
		t.Error("marked what is no piece or has no source")
	}
	for _, r := range [][2]int64{{-1, 1}, {size, 1}, {size - 1, 2}} {
		if _, err := b.WriteAt(make([]byte, r[1]), r[0]); err == nil {
			t.Errorf("write of %d at %d did not fail", r[1], r[0])
		}
	}
	want(t, "verify with pieces missing", b.Verify(t.Context()), ErrMissing)
	want(t, "finish with pieces missing", b.Finish(t.Context(), d), ErrMissing)
	_, err = b.File()
	want(t, "file of an incomplete blob", err, ErrIncomplete)

	put(t, b, data, 3)
	if b.Frontier() != 1 {
		t.Errorf("frontier %d, want 1", b.Frontier())
	}
	put(t, b, data, 1, 2)
	if b.Frontier() != 4 || b.Have() != size {
		t.Errorf("frontier %d, have %d", b.Frontier(), b.Have())
	}
	_, other := content(5)
	want(t, "finish with another sum", b.Finish(t.Context(), other), ErrMismatch)
	if b.Complete() {
		t.Fatal("complete after a mismatch")
	}
	changed = b.Changed()
	if err := b.Finish(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("Changed did not tell of completion")
	}
	if !b.Complete() || b.Verify(t.Context()) != nil || b.Finish(t.Context(), d) != nil {
		t.Error("not complete after Finish")
	}
	if n := b.ClearPieces(func(int, Source) bool { return true }); n != 0 {
		t.Errorf("%d pieces of a complete blob were forgotten", n)
	}
	f, err := b.File()
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	f.Close()
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("file: %d bytes, %v", len(got), err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = b.ReadAt(make([]byte, 1), 0)
	want(t, "read after close", err, fs.ErrClosed)

	// The next process, the next boot.
	s2, err := openBoot(Options{Dir: dir}, "another boot")
	if err != nil {
		t.Fatal(err)
	}
	defer s2.Close()
	b = openBlob(t, s2, d, size)
	if !b.Complete() || b.Have() != size || b.Source(2) != Origin || b.Frontier() != 4 {
		t.Error("completeness was not kept")
	}
	checkModes(t, dir)
}

func checkModes(t *testing.T, dir string) {
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		if m := fi.Mode().Perm(); e.IsDir() && m != modeDir || !e.IsDir() && m != modeFile {
			t.Errorf("%s has mode %o", path, m)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestReadAt(t *testing.T) {
	const size = 2*64*kib + 77
	data, d := content(size)
	s := openStore(t, t.TempDir(), 0)
	b := openBlob(t, s, d, size)
	put(t, b, data, 0, 2)
	for _, c := range []struct {
		name   string
		off, n int64
		want   int
		err    error
	}{
		{"start", 0, 100, 100, nil},
		{"whole held piece", 0, 64 * kib, 64 * kib, nil},
		{"into a missing piece", 64*kib - 1, 2, 0, ErrMissing},
		{"missing piece", 64 * kib, 1, 0, ErrMissing},
		{"end of a missing piece", 128*kib - 1, 1, 0, ErrMissing},
		{"last piece", 128 * kib, 77, 77, nil},
		{"beyond the end", 128 * kib, 78, 77, io.EOF},
		{"at the end", size, 1, 0, io.EOF},
		{"far behind the end", 1 << 60, 1, 0, io.EOF},
		{"nothing", 64 * kib, 0, 0, nil},
	} {
		p := make([]byte, c.n)
		n, err := b.ReadAt(p, c.off)
		if n != c.want || !errors.Is(err, c.err) || (c.err == nil) != (err == nil) {
			t.Errorf("%s: %d, %v; want %d, %v", c.name, n, err, c.want, c.err)
		}
		if n > 0 && !bytes.Equal(p[:n], data[c.off:c.off+int64(n)]) {
			t.Errorf("%s: wrong bytes", c.name)
		}
	}
	if _, err := b.ReadAt(make([]byte, 1), -1); err == nil {
		t.Error("a negative offset was read")
	}
	// Somebody cuts the file: an error, not zeros.
	if err := os.Truncate(filepath.Join(s.blobDir(d), fileData), 100); err != nil {
		t.Fatal(err)
	}
	_, err := b.ReadAt(make([]byte, 200), 0)
	want(t, "read of a file that was cut", err, io.ErrUnexpectedEOF)
}

func TestMismatchAndClear(t *testing.T) {
	const size = 4 * 64 * kib
	data, d := content(size)
	s := openStore(t, t.TempDir(), 0)
	b := openBlob(t, s, d, size)
	bad := bytes.Clone(data)
	bad[64*kib+5] ^= 1
	put(t, b, bad, 0, 2, 3)
	off, n := b.PieceRange(1)
	if _, err := b.WriteAt(bad[off:off+n], off); err != nil {
		t.Fatal(err)
	}
	if err := b.MarkPiece(1, Peer); err != nil {
		t.Fatal(err)
	}
	want(t, "verify", b.Verify(t.Context()), ErrMismatch)
	if b.Complete() {
		t.Fatal("complete with a wrong piece")
	}
	changed := b.Changed()
	if n := b.ClearPieces(func(i int, src Source) bool { return src == Peer && b.Source(i) == Peer }); n != 1 {
		t.Fatalf("%d pieces forgotten, want 1", n)
	}
	<-changed
	if b.Has(1) || b.Source(1) != 0 || b.Have() != 3*64*kib || b.Frontier() != 1 {
		t.Error("wrong account of the forgotten piece")
	}
	// It stays forgotten.
	b.Close()
	b = openBlob(t, s, d, size)
	if b.Has(1) || !b.Has(0) || !b.Has(2) || !b.Has(3) {
		t.Error("reopened with other pieces than were held")
	}
	put(t, b, data, 1)
	if err := b.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestEmptyBlob(t *testing.T) {
	s := openStore(t, t.TempDir(), 1)
	d := digest.FromBytes(nil)
	b := openBlob(t, s, d, 0)
	if b.Pieces() != 0 || b.Frontier() != 0 || b.Complete() {
		t.Error("an empty blob is complete only after Verify")
	}
	if err := b.Verify(t.Context()); err != nil || !b.Complete() {
		t.Fatal(err)
	}
	if _, err := b.ReadAt(make([]byte, 1), 0); err != io.EOF {
		t.Errorf("read: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if b = openBlob(t, s, d, 0); !b.Complete() {
		t.Error("not complete when opened again")
	}
}

func TestSHA512(t *testing.T) {
	data := []byte("a layer")
	d := digest.SHA512.FromBytes(data)
	s := openStore(t, t.TempDir(), 0)
	b := openBlob(t, s, d, len(data))
	put(t, b, data, 0)
	if err := b.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	if l, err := s.List(); err != nil || len(l) != 1 || l[0].Digest != d {
		t.Errorf("list: %v, %v", l, err)
	}
}
