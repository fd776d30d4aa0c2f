package progress

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares with testdata/NAME.golden, in which the escape character is written as ␛.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	got = strings.ReplaceAll(got, "\x1b", "␛")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", file, diff)
	}
}

var (
	first  = digest.Digest("sha256:" + strings.Repeat("a1", 32))
	second = digest.Digest("sha256:" + strings.Repeat("b2", 32))
	third  = digest.Digest("sha256:" + strings.Repeat("c3", 32))
)

// story is a pull of three layers as it is polled: one is in the cache, one comes from registry and peers, the last
// stalls, fails at first, and its note tries to move the cursor.
var story = []struct {
	after time.Duration
	say   string
	blobs []Blob
}{
	{0, "Pulling example.test/app:1.4 into Docker", []Blob{
		{Digest: first, Size: 2_000_000, State: Waiting}, {Digest: second, Size: 50_000_000, State: Waiting}, {Digest: third, Size: 300_000, State: Waiting}}},
	{time.Second, "", []Blob{
		{Digest: first, Size: 2_000_000, Have: 2_000_000, FromCache: 2_000_000, State: Complete},
		{Digest: second, Size: 50_000_000, Have: 10_000_000, FromOrigin: 4_000_000, FromPeers: 6_000_000, Peers: 3, State: Fetching},
		{Digest: third, Size: 300_000, State: Waiting}}},
	{time.Second, "", []Blob{
		{Digest: first, Size: 2_000_000, Have: 2_000_000, FromCache: 2_000_000, State: Complete},
		{Digest: second, Size: 50_000_000, Have: 20_000_000, FromOrigin: 6_000_000, FromPeers: 14_000_000, Peers: 3, State: Fetching},
		{Digest: third, Size: 300_000, State: Failed, Note: "the registry \x1b[2Jsaid\nno"}}},
	{4 * time.Second, "A message\x07 in the middle", []Blob{
		{Digest: first, Size: 2_000_000, Have: 2_000_000, FromCache: 2_000_000, State: Complete},
		{Digest: second, Size: 50_000_000, Have: 50_000_000, FromOrigin: 10_000_000, FromPeers: 40_000_000, Peers: 3, State: Verifying},
		{Digest: third, Size: 300_000, Have: 100_000, FromPeers: 100_000, State: Fetching}}},
	{time.Second, "", []Blob{
		{Digest: first, Size: 2_000_000, Have: 2_000_000, FromCache: 2_000_000, State: Complete},
		{Digest: second, Size: 50_000_000, Have: 50_000_000, FromOrigin: 10_000_000, FromPeers: 40_000_000, Peers: 3, State: Complete},
		{Digest: third, Size: 300_000, Have: 300_000, FromPeers: 300_000, State: Complete, Uploaded: 5_000_000}}},
}

// tell runs the story without a goroutine: each step is one tick.
func tell(t *testing.T, mode Mode, cols, rows int) (out, data string) {
	t.Helper()
	var o, d bytes.Buffer
	now := time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC)
	r := New(Options{
		Mode: mode, Out: &o, Data: &d, Now: func() time.Time { return now },
		Size: func() (int, int) { return cols, rows },
	})
	r.begun = now
	for i, step := range story {
		now = now.Add(step.after)
		if step.say != "" {
			r.Say("%s", step.say)
		}
		r.poll = func() []Blob { return step.blobs }
		r.tick(i == len(story)-1)
	}
	err := r.Finish(Summary{
		Reference: "example.test/app:1.4", Digest: first, Target: "Docker (containerd image store, snapshotter quay) at unix:///run/docker.sock",
		Duration: 7 * time.Second, Total: Sum(story[len(story)-1].blobs), Layers: 3, Lazy: 2, Notes: []string{"the cached tag was used"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return o.String(), d.String()
}

func TestGolden(t *testing.T) {
	for _, c := range []struct {
		name       string
		mode       Mode
		cols, rows int
	}{
		{"tty-wide", TTY, 140, 40},
		{"tty-80", TTY, 80, 24},
		{"tty-narrow", TTY, 30, 24},
		{"tty-low", TTY, 80, 4},
		{"plain", Plain, 0, 0},
		{"json", JSON, 0, 0},
		{"quiet", Quiet, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, data := tell(t, c.mode, c.cols, c.rows)
			golden(t, c.name, out+"-- standard output --\n"+data)
			if c.mode == TTY {
				return
			}
			for _, r := range out + data {
				if r != '\n' && unicode.IsControl(r) {
					t.Fatalf("%q in the output of mode %s", r, c.mode)
				}
			}
		})
	}
}

func TestAutoMode(t *testing.T) {
	if m := New(Options{Mode: Auto}).Mode(); m != Plain {
		t.Errorf("off a terminal: %s", m)
	}
	if m := New(Options{Mode: Auto, Size: func() (int, int) { return 80, 24 }}).Mode(); m != TTY {
		t.Errorf("on a terminal: %s", m)
	}
	if _, err := ParseMode("fancy"); err == nil || !strings.Contains(err.Error(), "plain") {
		t.Errorf("error %v", err)
	}
}

func TestSum(t *testing.T) {
	for _, c := range []struct {
		states []State
		want   State
	}{
		{[]State{Waiting, Waiting}, Waiting},
		{[]State{Waiting, Complete}, Fetching},
		{[]State{Verifying, Complete}, Verifying},
		{[]State{Complete, Complete}, Complete},
		{[]State{Complete, Failed}, Failed},
		{nil, Complete},
	} {
		var blobs []Blob
		for _, s := range c.states {
			blobs = append(blobs, Blob{State: s, Size: 10, Have: 5, Peers: 2})
		}
		got := Sum(blobs)
		if got.State != c.want || got.Size != int64(10*len(blobs)) {
			t.Errorf("%v: %s of %d bytes, want %s", c.states, got.State, got.Size, c.want)
		}
	}
}
