package plugin_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/plugin"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// stranger is what somebody without a login gets of the image from memory.
func stranger(how string) (plugin.Stranger, error) {
	switch how {
	case "public":
		return plugin.Stranger{Public: true, WebSeed: "https://example.test/v2/app/blobs/{digest}"}, nil
	case "away":
		return plugin.Stranger{}, errors.New("the registry does not answer")
	}
	return plugin.Stranger{}, nil
}

func TestTorrentHelp(t *testing.T) {
	for name, args := range map[string][]string{
		"help-torrent": {"torrent", "--help"},
		"help-tracker": {"tracker", "--help"},
	} {
		t.Run(name, func(t *testing.T) {
			r := run(t, "ok", "docker-quay", args...)
			if r.code != 0 || r.stderr != "" {
				t.Errorf("exit code %d, standard error %q", r.code, r.stderr)
			}
			noControl(t, r.stdout)
			golden(t, name, r.stdout)
		})
	}
	// quayctl's lines have their own help still.
	if r := run(t, "ok", "docker-quay", "torrent", "pull", "--help"); r.code != 0 || !strings.HasPrefix(r.stdout, "Usage:  docker quay torrent pull [OPTIONS] IMAGE") {
		t.Errorf("%+v", r)
	}
	if r := run(t, "ok", "docker-torrent", "--help"); r.code != 0 || !strings.Contains(r.stdout, "\n  seed ") {
		t.Errorf("%+v", r)
	}
}

// files reads the torrents that a run printed the names of.
func files(t *testing.T, r result) []*published.Torrent {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	var out []*published.Torrent
	for _, file := range strings.Fields(r.stdout) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tor, err := published.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if want := tor.Layer.Digest.Encoded()[:12] + ".torrent"; filepath.Base(file) != want {
			t.Errorf("%s, want %s", file, want)
		}
		out = append(out, tor)
	}
	return out
}

func TestTorrent(t *testing.T) {
	const tracker = "http://tracker.test:6969/announce"
	dir := t.TempDir()
	at := func(args ...string) []string { return append([]string{"torrent", "-o", dir}, args...) }

	r := run(t, "public", "docker-quay", at("example.test/app")...)
	all := files(t, r)
	if len(all) != 1 || all[0].Private || len(all[0].Trackers) != 0 || len(all[0].WebSeeds) != 1 ||
		all[0].WebSeeds[0] != "https://example.test/v2/app/blobs/"+all[0].Layer.Digest.String() {
		t.Errorf("public: %+v", all)
	}
	for _, says := range []string{"Making torrents of example.test/app:latest", "fetched by this process", "by the DHT alone", "infohash " + all[0].InfoHash.HexString()} {
		if !strings.Contains(r.stderr, says) {
			t.Errorf("standard error lacks %q:\n%s", says, r.stderr)
		}
	}
	first, _ := os.ReadFile(strings.TrimSpace(r.stdout))

	private := run(t, "ok", "docker-quay", at("--tracker", tracker, "--tracker", "udp://t2.test:1", "example.test/app")...)
	tors := files(t, private)
	if len(tors) != 1 || !tors[0].Private || len(tors[0].WebSeeds) != 0 || len(tors[0].Trackers) != 2 || tors[0].Trackers[0][0] != tracker || tors[0].InfoHash == all[0].InfoHash {
		t.Errorf("private: %+v", tors)
	}
	if !strings.Contains(private.stderr, "the image is not public") {
		t.Errorf("standard error:\n%s", private.stderr)
	}
	if r := run(t, "away", "docker-quay", at("--tracker", tracker, "example.test/app")...); !files(t, r)[0].Private || !strings.Contains(r.stderr, "does not answer") {
		t.Errorf("nothing is known: %+v", r)
	}
	// What was there is replaced, by the same bytes as before, and nothing else is left behind.
	r = run(t, "public", "docker-quay", at("-q", "example.test/app")...)
	if again, _ := os.ReadFile(strings.TrimSpace(r.stdout)); string(again) != string(first) || r.stderr != "" {
		t.Errorf("made again it differs, or says %q", r.stderr)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("in the folder: %v", left)
	}
	if tors := files(t, run(t, "ok", "docker-quay", at("--private=false", "--web-seed", "http://m.test/{digest}", "example.test/app")...)); tors[0].Private || tors[0].WebSeeds[0] != "http://m.test/"+tors[0].Layer.Digest.String() {
		t.Errorf("%+v", tors[0])
	}
	if tors := files(t, run(t, "public", "docker-quay", at("--private", "--tracker", tracker, "--web-seed", "none", "example.test/app")...)); !tors[0].Private || len(tors[0].WebSeeds) != 0 {
		t.Errorf("%+v", tors[0])
	}

	empty := t.TempDir()
	r = run(t, "public", "docker-quay", "torrent", "--magnet", "-o", filepath.Join(empty, "none"), "--tracker", tracker, "example.test/app")
	if m, err := published.ParseMagnet(strings.TrimSpace(r.stdout)); err != nil || m.InfoHash != all[0].InfoHash || m.Trackers[0] != tracker {
		t.Errorf("magnet: %+v, %v", r, err)
	}
	if left, _ := os.ReadDir(empty); len(left) != 0 {
		t.Errorf("--magnet wrote %v", left)
	}
	r = run(t, "public", "docker-quay", at("--format", "json", "--tracker", tracker, "example.test/app")...)
	var v struct {
		Digest, File, InfoHash, Magnet string
		Size, PieceLength              int64
		Trackers, WebSeeds             []string
		Private                        bool
	}
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || v.InfoHash != all[0].InfoHash.HexString() || v.File == "" || v.Magnet == "" || v.Size != all[0].Layer.Size ||
		v.PieceLength != 256<<10 || len(v.Trackers) != 1 || len(v.WebSeeds) != 1 {
		t.Errorf("json: %q, %v", r.stdout, err)
	}
}

func TestTorrentFailures(t *testing.T) {
	for _, c := range []struct {
		how  string
		args []string
		code int
		says string
	}{
		{"notfound", []string{"torrent", "example.test/none"}, 3, "cannot read the manifest"},
		{"denied", []string{"torrent", "example.test/private"}, 4, "access denied"},
		{"ok", []string{"torrent"}, 125, "requires 1 argument"},
		{"ok", []string{"torrent", "UPPER/Case"}, 125, "is not the name of an image"},
		{"ok", []string{"torrent", "example.test/app"}, 125, "name one with --tracker"},
		{"ok", []string{"torrent", "--magnet", "example.test/app"}, 125, "cannot say that a torrent is private"},
		{"public", []string{"torrent", "--magnet", "--private", "example.test/app"}, 125, "cannot say that a torrent is private"},
		{"public", []string{"torrent", "--tracker", "wss://x", "example.test/app"}, 125, "is not a URL of http, https, udp"},
		{"public", []string{"torrent", "--web-seed", "http://x/", "example.test/app"}, 125, "{digest} must be in it"},
		{"public", []string{"torrent", "-o", "/dev/null/x", "example.test/app"}, 1, "cannot make the folder"},
		{"ok", []string{"tracker", "x"}, 125, "accepts no arguments"},
		{"ok", []string{"tracker", "--listen", "nowhere"}, 125, "HOST:PORT"},
		{"ok", []string{"tracker", "--listen", "192.0.2.1:1"}, 1, "cannot listen on 192.0.2.1:1"},
		{"ok", []string{"tracker", "--token", "/nonexistent"}, 1, "token cannot be read"},
		{"ok", []string{"tracker", "--token", "/dev/null"}, 125, "holds no token"},
		{"ok", []string{"tracker", "--allow", "/proc/self/status"}, 125, "is not an infohash"},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			r := run(t, c.how, "docker-quay", c.args...)
			if r.code != c.code || !strings.Contains(r.stderr, c.says) || r.stdout != "" {
				t.Errorf("exit code %d, want %d; standard error %q, want one with %q; standard output %q", r.code, c.code, r.stderr, c.says, r.stdout)
			}
		})
	}
}

// TestTorrentRegistry: from a real registry, public and not, by the real fetcher; another program downloads from the web seed.
func TestTorrentRegistry(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	img, err := image.Random(ctx, rig.ImageDir(), 3<<20, 2)
	if err != nil {
		t.Fatal(err)
	}
	world := rig.ForTest(t)
	start := func(o rig.RegistryOptions) *rig.Registry {
		g, err := world.StartRegistry(ctx, o)
		if errors.Is(err, rig.ErrNoTool) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := img.Push(ctx, image.Target{URL: g.URL(), Username: o.Username, Password: o.Password}, "team/app", "1"); err != nil {
			t.Fatal(err)
		}
		return g
	}
	common := []string{"torrent", "--no-daemon", "--secret-file", "", "--store", t.TempDir(), "-o", t.TempDir()}

	g := start(rig.RegistryOptions{})
	tors := files(t, run(t, "real", "docker-quay", append(common, g.Ref("team/app:1"))...))
	if len(tors) != 2 {
		t.Fatalf("%d torrents", len(tors))
	}
	for _, tor := range tors {
		if tor.Private || len(tor.WebSeeds) != 1 {
			t.Fatalf("%+v", tor)
		}
		resp, err := http.Get(tor.WebSeeds[0])
		if err != nil {
			t.Fatal(err)
		}
		verifier := tor.Layer.Digest.Verifier()
		_, err = io.Copy(verifier, resp.Body)
		resp.Body.Close()
		if err != nil || !verifier.Verified() {
			t.Errorf("the web seed %s has something else: %s, %v", tor.WebSeeds[0], resp.Status, err)
		}
	}
	t.Run("aria2", func(t *testing.T) {
		aria2, err := exec.LookPath("aria2c")
		if err != nil {
			t.Skip("needs aria2")
		}
		dir := t.TempDir()
		file := filepath.Join(dir, "x.torrent")
		if err := os.WriteFile(file, tors[0].Encode(), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(ctx, aria2, "--no-conf", "--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false", "--enable-peer-exchange=false",
			"--interface=127.0.0.1", "--seed-time=0", "--bt-stop-timeout=20", "-d", dir, file).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		f, err := os.Open(filepath.Join(dir, published.LayerName(tors[0].Layer.Digest)))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		verifier := tors[0].Layer.Digest.Verifier()
		if _, err := io.Copy(verifier, f); err != nil || !verifier.Verified() {
			t.Errorf("aria2 made another file of it: %v", err)
		}
	})
	t.Run("not public", func(t *testing.T) {
		g := start(rig.RegistryOptions{Username: "u", Password: "p"})
		config := t.TempDir()
		text := `{"auths":{"` + g.Addr() + `":{"auth":"dTpw"}}}` // u:p
		if err := os.WriteFile(filepath.Join(config, "config.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		t.Setenv("DOCKER_CONFIG", config)
		if r := run(t, "real", "docker-quay", append(common, g.Ref("team/app:1"))...); r.code != 125 {
			t.Errorf("without a tracker: %+v", r)
		}
		for _, tor := range files(t, run(t, "real", "docker-quay", append(common, "--tracker", "http://t.test/announce", g.Ref("team/app:1"))...)) {
			if !tor.Private || len(tor.WebSeeds) != 0 {
				t.Errorf("%+v", tor)
			}
		}
	})
}

// TestTracker: the tracker runs, answers who may ask, and ends when it is told.
func TestTracker(t *testing.T) {
	const token, hash = "0123456789abcdef", "aaaaaaaaaaaaaaaaaaaa"
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	cmd, out := process(t, "ok", "docker-quay", "tracker", "--listen", "127.0.0.1:0",
		"--token", write("token", token+"\n"), "--allow", write("allowed", "# one\n\n"+strings.Repeat("61", 20)+"\n"))
	cmd.Stdout = nil
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	line = strings.TrimSpace(line)
	if !strings.HasSuffix(line, "/TOKEN/announce") {
		t.Errorf("it prints %q", line)
	}
	ask := func(token, hash string) string {
		t.Helper()
		q := url.Values{"info_hash": {hash}, "peer_id": {"-XX0000-123456789012"}, "port": {"6881"}, "left": {"0"}, "compact": {"1"}}
		resp, err := http.Get(strings.Replace(line, "TOKEN", token, 1) + "?" + q.Encode())
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for _, c := range []struct{ token, hash, has string }{
		{token, hash, "8:completei1e"},
		{token, strings.Repeat("b", 20), "failure reason"},
		{"wrong", hash, "failure reason"},
	} {
		if got := ask(c.token, c.hash); !strings.Contains(got, c.has) {
			t.Errorf("%s, %s: %q", c.token, c.hash, got)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if r := out(cmd.Wait()); r.code != 0 || strings.Contains(r.stderr, token) {
		t.Errorf("%+v", r)
	}
	u, _ := url.Parse(line)
	if c, err := net.Dial("tcp", u.Host); err == nil {
		c.Close()
		t.Error("it still listens")
	}
}
