package store

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"
)

// used sets when a blob was last opened, in minutes ago.
func used(t *testing.T, s *Store, d digest.Digest, minutes int) {
	t.Helper()
	at := time.Now().Add(-time.Duration(minutes) * time.Minute)
	if err := os.Chtimes(filepath.Join(s.blobDir(d), fileUsed), at, at); err != nil {
		t.Fatal(err)
	}
}

func there(t *testing.T, s *Store, d digest.Digest) bool {
	t.Helper()
	_, err := s.Stat(d)
	return err == nil
}

func TestEviction(t *testing.T) {
	const quota = 5 * mib
	dir := t.TempDir()
	s := openStore(t, dir, 0) // to fill it
	oldest, old, recent, pinned := fill(t, s, mib+1), fill(t, s, mib+2), fill(t, s, mib+3), fill(t, s, mib+4)
	s = openStore(t, dir, quota)
	for d, m := range map[digest.Digest]int{pinned: 90, oldest: 60, old: 30, recent: 10} {
		used(t, s, d, m)
	}
	if err := s.Pin(pinned, "test"); err != nil {
		t.Fatal(err)
	}
	u, err := s.Usage()
	if err != nil || u.Blobs != 4 || u.Quota != quota || u.Bytes < 4*mib || u.Bytes > quota || u.Pinned < mib || u.Pinned > 2*mib {
		t.Fatalf("usage %+v, %v", u, err)
	}

	ctx := t.Context()
	for _, c := range []struct {
		name string
		need int64
		left string
	}{
		{"nothing", 0, "oldest old recent pinned"},
		{"what is free", 100 * kib, "oldest old recent pinned"},
		{"one blob's room", mib, "old recent pinned"},
	} {
		if err := s.MakeRoom(ctx, c.need); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		for n, d := range map[string]digest.Digest{"oldest": oldest, "old": old, "recent": recent, "pinned": pinned} {
			if left := slices.Contains(strings.Fields(c.left), n); there(t, s, d) != left {
				t.Errorf("%s: %s is there: %v, want %v", c.name, n, !left, left)
			}
		}
	}

	// More than can go: nothing goes.
	err = s.MakeRoom(ctx, 4*mib)
	want(t, "room that pinned blobs hold", err, ErrQuota)
	for _, part := range []string{"4MiB more", "quota of 5MiB", "pinned", "in use"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("the error does not say %q: %v", part, err)
		}
	}
	if !there(t, s, old) || !there(t, s, recent) {
		t.Error("evicted in vain")
	}

	// Opening is use; what is open stays though it is the oldest.
	used(t, s, recent, 120)
	b := openBlob(t, s, recent, mib+3)
	if in, _ := s.Stat(recent); time.Since(in.Used) > time.Minute {
		t.Errorf("opened now, used %s", in.Used)
	}
	used(t, s, recent, 120)
	if err := s.MakeRoom(ctx, 2*mib); err != nil {
		t.Error(err)
	}
	if there(t, s, old) || !there(t, s, recent) || !there(t, s, pinned) {
		t.Error("evicted what is open, or kept what is not")
	}
	want(t, "remove open", s.Remove(recent), ErrInUse)
	b.Close()
	if err := s.Remove(recent); err != nil {
		t.Error(err)
	}
	want(t, "remove absent", s.Remove(recent), fs.ErrNotExist)
	want(t, "remove pinned", s.Remove(pinned), ErrPinned)
	if err := s.Unpin(pinned, "test"); err != nil {
		t.Fatal(err)
	}
	if err := s.MakeRoom(ctx, quota); err != nil || there(t, s, pinned) {
		t.Errorf("an unpinned blob stayed: %v", err)
	}
	if es, _ := os.ReadDir(filepath.Join(dir, dirTrash)); len(es) > 0 {
		t.Errorf("left in the trash: %v", es)
	}
}

func TestQuotaAtOpen(t *testing.T) {
	const quota = 3 * mib
	s := openStore(t, t.TempDir(), quota)
	first := fill(t, s, 2*mib)
	_, d := content(quota + 1)
	_, err := s.Blob(t.Context(), d, quota+1)
	want(t, "blob above the quota", err, ErrQuota)
	if there(t, s, d) || !there(t, s, first) {
		t.Error("a refused blob left a trace")
	}

	data, d := content(2*mib + 5)
	b := openBlob(t, s, d, 2*mib+5) // takes the first one's place
	if there(t, s, first) {
		t.Error("nothing was evicted")
	}
	// The room is promised, though nothing of it is written.
	if u, _ := s.Usage(); u.Reserved != 2*mib+5 {
		t.Errorf("usage %+v", u)
	}
	_, other := content(2 * mib)
	_, err = s.Blob(t.Context(), other, 2*mib)
	want(t, "blob in room that is promised", err, ErrQuota)
	needed, err := s.Need(t.Context(), other, 2*mib)
	if err != nil {
		t.Fatal("a blob that is needed:", err)
	}
	if u, _ := s.Usage(); u.Reserved != 4*mib+5 {
		t.Errorf("usage %+v", u)
	}
	needed.Close()
	put(t, b, data, all(b)...)
	if err := b.Verify(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.Close()
	b = openBlob(t, s, other, 2*mib)
	b.Close()

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = s.Blob(ctx, d, 2*mib+5)
	want(t, "blob with an ended context", err, context.Canceled)
}

func TestPins(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir, 0)
	d := fill(t, s, 1000)
	_, absent := content(999)
	long := "image:" + strings.Repeat("long/", 60) + "é:\n../.."
	for _, p := range []struct {
		d     digest.Digest
		owner string
	}{{d, "b"}, {d, "a"}, {d, "a"}, {d, long}, {absent, "a"}} {
		if err := s.Pin(p.d, p.owner); err != nil {
			t.Fatal(err)
		}
	}
	if s.Pin(d, "") == nil || s.Pin(d, strings.Repeat("x", maxOwner+1)) == nil {
		t.Error("pinned by nobody, or by too much of a name")
	}
	pins := func() string {
		t.Helper()
		in, err := openStore(t, dir, 0).Stat(d) // another process reads the same
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(in.Pins, " ")
	}
	if got := pins(); got != "a b "+long {
		t.Errorf("pins %q", got)
	}
	if err := s.Unpin(d, "a"); err != nil {
		t.Error(err)
	}
	if err := s.Unpin(d, "a"); err != nil {
		t.Error("unpin without a pin:", err)
	}
	if err := s.UnpinAll(long); err != nil {
		t.Error(err)
	}
	if err := s.UnpinAll("nobody"); err != nil {
		t.Error("unpin all of nobody:", err)
	}
	if got := pins(); got != "b" {
		t.Errorf("pins %q, want b", got)
	}
	// A pin comes before its blob.
	fill(t, s, 999)
	want(t, "remove", s.Remove(absent), ErrPinned)
	if err := s.UnpinAll("a"); err != nil {
		t.Error(err)
	}
	if err := s.Remove(absent); err != nil {
		t.Error(err)
	}
	// A pin cut short by a crash still pins.
	if err := os.Truncate(filepath.Join(s.pinDir("b"), pinName(d)), 0); err != nil {
		t.Fatal(err)
	}
	want(t, "remove", s.Remove(d), ErrPinned)
	checkModes(t, dir)
}

// TestUseAfterTheClockWasSetBack: that is recorded at once, not when the clock has come to where it was.
func TestUseAfterTheClockWasSetBack(t *testing.T) {
	s := openStore(t, t.TempDir(), 0)
	d := fill(t, s, mib)
	b := openBlob(t, s, d, mib)
	ahead := time.Now().Add(24 * time.Hour)
	used(t, s, d, -24*60)
	b.state.touched.Store(ahead.UnixNano())
	b.state.touch()
	fi, err := os.Stat(filepath.Join(s.blobDir(d), fileUsed))
	if err != nil || time.Until(fi.ModTime()) > time.Minute {
		t.Errorf("the blob was last used at %v, %v", fi.ModTime(), err)
	}
}
