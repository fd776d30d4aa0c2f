package e2e

import (
	"bufio"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/docker-quay/docker-quay/test/rig"
)

// TestDockerCLI: the real docker CLI lists and runs the plugin, without any engine.
func TestDockerCLI(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	u := w.user(w.network.Node(1))
	u.installs(filepath.Join(u.home, ".docker"))

	listed := false
	for _, line := range strings.Split(u.run("docker", "help").stdout, "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "quay*" {
			listed = true
			t.Log(line)
		}
	}
	if !listed {
		t.Error("docker help does not list quay")
	}
	help := u.run("docker", "quay", "pull", "--help")
	for _, part := range []string{"Usage:  docker quay pull", "Examples:", "Exit codes:", "130"} {
		if !strings.Contains(help.stdout, part) {
			t.Errorf("docker quay pull --help lacks %q: %s", part, help)
		}
	}
	if o := u.run("docker", "quay", "pull"); o.code != 125 {
		t.Errorf("without an image, want exit 125: %s", o)
	}
	if o := u.run("docker", "quay", "pull", "--no-daemon", "--to", "store", w.registry.Ref("none:1")); o.code != 3 {
		t.Errorf("an image that is not there, want exit 3 through the docker CLI: %s", o)
	}
	img := w.small()
	ref := w.push(img, "team/app", "1")
	if o := u.run("docker", "quay", "pull", "--no-daemon", "--to", "docker", ref); o.code != 7 {
		t.Errorf("without an engine, want exit 7: %s", o)
	}
}

// TestNoControlCharacters: off a terminal a log can take whatever a pull writes, in every mode.
func TestNoControlCharacters(t *testing.T) {
	w := newWorld(t, 1, private)
	ref := w.push(w.random(8*mib, 3), "random", "1")
	u := w.user(w.network.Node(1))
	for _, login := range []bool{false, true} {
		if login {
			u.login()
		}
		for _, mode := range [][]string{nil, {"--progress", "plain"}, {"--progress", "json"}, {"--quiet"}} {
			o := u.quay("pull", append(mode, "--to", "store", ref)...)
			if (o.code == 0) != login {
				t.Error(o)
			}
			for _, text := range []string{o.stdout, o.stderr} {
				if i := strings.IndexFunc(text, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }); i >= 0 {
					t.Errorf("%v: a control character at byte %d of %q", mode, i, text)
				}
			}
			if login && len(mode) == 0 && o.stdout != ref+"\n" {
				t.Errorf("standard output is %q, want the image's name", o.stdout)
			}
			if len(mode) == 1 && login && (o.stdout != ref+"\n" || o.stderr != "") {
				t.Errorf("--quiet: %s", o)
			}
		}
	}
}

// TestProgressJSON: each line of --progress json is an object with a type and a time; the blobs add up to the image.
func TestProgressJSON(t *testing.T) {
	w := newWorld(t, 1, rig.RegistryOptions{})
	img := w.random(16*mib, 3)
	ref := w.push(img, "random", "1")
	o := w.user(w.network.Node(1)).quay("pull", "--progress", "json", "--to", "store", "--download-rate", "32MiB", ref)
	types, have := map[string]int{}, map[string]int64{}
	for lines := bufio.NewScanner(strings.NewReader(o.stderr)); lines.Scan(); {
		var line struct {
			Type   string    `json:"type"`
			Time   time.Time `json:"time"`
			Digest string    `json:"digest"`
			Size   int64     `json:"size"`
			Have   int64     `json:"have"`
			State  string    `json:"state"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil || line.Time.IsZero() {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		types[line.Type]++
		if line.Type == "blob" {
			if line.Have < have[line.Digest] || line.Have > line.Size {
				t.Errorf("a blob of %d bytes went from %d to %d", line.Size, have[line.Digest], line.Have)
			}
			have[line.Digest] = line.Have
		}
	}
	for _, want := range []string{"message", "blob", "total"} {
		if types[want] == 0 {
			t.Errorf("no line of type %s: %v", want, types)
		}
	}
	for _, l := range img.Layers {
		if have[l.Digest.String()] != l.Size {
			t.Errorf("layer %s ended with %d of %d bytes", l.Digest, have[l.Digest.String()], l.Size)
		}
	}
	var s summary
	if err := json.Unmarshal([]byte(o.stdout), &s); err != nil || s.Digest != img.Manifest.Digest || s.FromOrigin != s.Size {
		t.Errorf("the summary is %+v, %v: %s", s, err, o)
	}
}
