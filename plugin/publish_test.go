package plugin_test

import (
	"strings"
	"testing"
)

// seed --publish asks and decides what torrent does, stores, and then seeds.
func TestSeedPublish(t *testing.T) {
	const tracker = "http://tracker.test:6969/announce"
	r := run(t, "public", "docker-quay", "seed", "--publish", "--tracker", tracker, "--web-seed", "https://m.test/{digest}", "--duration", "1ms", "example.test/app")
	if r.code != 0 {
		t.Fatalf("%+v", r)
	}
	at := 0
	for _, says := range []string{
		"stored private=false trackers=[[" + tracker + "]] web seeds=[https://m.test/sha256:", "Published the torrents of 1 layers", "seeding 1 torrents", "giving it to peers",
	} {
		i := strings.Index(r.stderr[at:], says)
		if i < 0 {
			t.Fatalf("standard error lacks %q after %q:\n%s", says, r.stderr[:at], r.stderr)
		}
		at += i
	}
	r = run(t, "ok", "docker-quay", "seed", "--publish", "--tracker", tracker, "--duration", "1ms", "example.test/app")
	if r.code != 0 || !strings.Contains(r.stderr, "stored private=true") || !strings.Contains(r.stderr, "the image is not public") {
		t.Errorf("private: %+v", r)
	}
	if r := run(t, "ok", "docker-quay", "seed", "--duration", "1ms", "example.test/app"); r.code != 0 || strings.Contains(r.stderr, "stored") {
		t.Errorf("without --publish: %+v", r)
	}
}

// What is wrong with the flags of torrents is said before anything is fetched or stored.
func TestTorrentFlags(t *testing.T) {
	for _, c := range []struct {
		name, how, says string
		args            []string
	}{
		{"private without a tracker", "ok", "--tracker", []string{"seed", "--publish"}},
		{"tracker without publish", "public", "--publish", []string{"seed", "--tracker", "http://t.test/announce"}},
		{"tracker that is none", "public", "tracker", []string{"seed", "--publish", "--tracker", "ftp://t.test/"}},
		{"policy", "ok", "none of auto, always, never", []string{"pull", "--to", "store", "--torrents", "sometimes"}},
		{"tracker of a pull", "ok", "--tracker", []string{"pull", "--to", "store", "--tracker", "t.test:6969"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := run(t, c.how, "docker-quay", append(c.args, "example.test/app")...)
			if r.code != 125 || !strings.Contains(r.stderr, c.says) || strings.Contains(r.stderr, "stored") {
				t.Errorf("%+v", r)
			}
		})
	}
}
