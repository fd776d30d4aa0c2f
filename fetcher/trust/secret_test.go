package trust

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// fixed is a secret that never changes, for golden values.
func fixed() Secret {
	var s Secret
	for i := range s.b {
		s.b[i] = byte(i)
	}
	return s
}

// fixedText is fixed as a secret file spells it.
func fixedText() string {
	s := fixed()
	return base64.StdEncoding.EncodeToString(s.b[:])
}

func TestSecretSaveLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	s := NewSecret()
	if err := s.Save(path); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if got := fi.Mode().Perm(); got != 0o600 {
		t.Errorf("mode %o, want 600", got)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != s {
		t.Error("loaded another secret than was saved")
	}
	if err := NewSecret().Save(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Save over an existing file: %v, want fs.ErrExist", err)
	}
	if again, _ := Load(path); again != s {
		t.Error("the refused Save changed the file")
	}
	link := path + ".link"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(link); err != nil {
		t.Errorf("through a symbolic link: %v", err)
	}
}

func TestLoadRefuses(t *testing.T) {
	dir := t.TempDir()
	good := fixedText()
	for _, c := range []struct {
		name    string
		content string
		mode    fs.FileMode
		want    error
		says    string
	}{
		{"group readable", good, 0o640, ErrSecretExposed, "chmod 600"},
		{"world readable", good, 0o604, ErrSecretExposed, "chmod 600"},
		{"empty", "", 0o600, ErrSecretMalformed, "docker quay node secret"},
		{"comment only", "# nothing\n", 0o600, ErrSecretMalformed, "docker quay node secret"},
		{"short", base64.StdEncoding.EncodeToString(make([]byte, 31)), 0o600, ErrSecretMalformed, "31 bytes"},
		{"long", base64.StdEncoding.EncodeToString(make([]byte, 33)), 0o600, ErrSecretMalformed, "33 bytes"},
		{"zeros", base64.StdEncoding.EncodeToString(make([]byte, 32)), 0o600, ErrSecretMalformed, "guess"},
		{"not base64", "hello, world", 0o600, ErrSecretMalformed, "base64"},
		{"two secrets", good + "\n" + good + "\n", 0o600, ErrSecretMalformed, "one line"},
		{"two comments", "# a\n# b\n" + good, 0o600, ErrSecretMalformed, "one comment"},
		{"huge", "#" + strings.Repeat("x", maxSecretFile) + "\n" + good, 0o600, ErrSecretMalformed, "larger"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, strings.ReplaceAll(c.name, " ", "-"))
			if err := os.WriteFile(path, []byte(c.content), c.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil { // whatever the umask
				t.Fatal(err)
			}
			_, err := Load(path)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v; want %q, the path, and %q", err, c.want, c.says)
			}
		})
	}
	if _, err := Load(dir); !errors.Is(err, ErrSecretMalformed) {
		t.Errorf("directory: %v", err)
	}
	if _, err := Load(filepath.Join(dir, "absent")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "docker quay node secret") {
		t.Errorf("absent: %v", err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(fifo); !errors.Is(err, ErrSecretMalformed) {
		t.Errorf("fifo: %v", err)
	}
}

func TestLoadAccepts(t *testing.T) {
	good := fixedText()
	for name, content := range map[string]string{
		"bare":           good,
		"newline":        good + "\n",
		"comment":        "# mine\n" + good + "\n",
		"empty line":     "\n" + good + "\n",
		"windows":        "# mine\r\n" + good + "\r\n",
		"spaces around":  "  " + good + "  \n",
		"as Save writes": secretComment + good + "\n",
	} {
		if s, err := parseSecret([]byte(content)); err != nil || s != fixed() {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzParseSecret(f *testing.F) {
	f.Add([]byte(secretComment + fixedText() + "\n"))
	f.Add([]byte("#\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseSecret(b)
		if (err == nil) == (s == Secret{}) {
			t.Errorf("secret set: %v, error: %v", s != Secret{}, err)
		}
	})
}

func TestSecretNeverPrints(t *testing.T) {
	s := fixed()
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "secret", s)
	for _, out := range []string{fmt.Sprint(s), fmt.Sprintf("%v %+v %#v %x %d %s", s, s, s, s, s, &s), log.String()} {
		if strings.Contains(out, "1f") || strings.Contains(out, "30 31") || !strings.Contains(out, redacted) {
			t.Errorf("printed %q", out)
		}
	}
}

// The derivations are a protocol between nodes of different versions: these values never change.
func TestKeyGolden(t *testing.T) {
	if got := hex.EncodeToString(fixed().Key("gossip", 32)); got != goldenGossipKey {
		t.Errorf("key %s, want %s", got, goldenGossipKey)
	}
	if got := hex.EncodeToString(fixed().GossipKey()); got != goldenGossipKey {
		t.Errorf("gossip key %s, want %s", got, goldenGossipKey)
	}
	if bytes.Equal(fixed().Key("a", 32), fixed().Key("b", 32)) {
		t.Error("two labels give one key")
	}
}
