package trust

import (
	"bytes"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"syscall"
)

const (
	// secretSize is the length of a secret in bytes: the security level of everything derived from it (256 bits).
	secretSize = 32

	// maxSecretFile bounds what Load reads. A secret file has about 150 bytes; the rest is room for a longer comment.
	maxSecretFile = 4096

	secretComment = "# docker quay cluster secret: the same file on every node, readable by its owner only.\n"

	// Labels of what is derived from a secret. They are part of the protocol between nodes: changing one splits the
	// cluster into old and new nodes.
	labelCA  = "docker-quay trust v1: certificate authority"
	labelKey = "docker-quay trust v1: key: "

	// labelGossip is the label that GossipKey gives to Key.
	labelGossip = "gossip"
)

var (
	// ErrSecretExposed is the error of Load for a file that others than its owner may read.
	ErrSecretExposed = errors.New("the cluster secret can be read by other users")
	// ErrSecretMalformed is the error of Load for a file that holds no secret.
	ErrSecretMalformed = errors.New("not a cluster secret")
)

// Secret is what makes nodes one cluster. It is a value; the zero Secret is invalid. It never prints itself.
type Secret struct {
	b [secretSize]byte
}

var (
	_ fmt.Formatter  = Secret{}
	_ slog.LogValuer = Secret{}
)

// NewSecret makes a secret from the system's random source.
func NewSecret() Secret {
	var s Secret
	rand.Read(s.b[:]) // never fails: crypto/rand ends the process instead
	return s
}

// Load reads a secret file as Save writes it: at most one line that is empty or begins with '#', and one line with 32
// bytes in base64. The file must be a regular one (a symbolic link to one will do) that only its owner can read.
// The error is a sentence that names the file and says what to do; it wraps fs.ErrNotExist, ErrSecretExposed or
// ErrSecretMalformed.
func Load(path string) (Secret, error) {
	// Not blocking, so that a FIFO in the place of the file is refused below and does not hang here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Secret{}, fmt.Errorf("there is no cluster secret at %s: make one with `docker quay node secret` "+
			"and copy it to every node: %w", path, err)
	case errors.Is(err, fs.ErrPermission):
		return Secret{}, fmt.Errorf("this user may not read the cluster secret %s: run as its owner, or give it to this user: %w",
			path, err)
	case err != nil:
		return Secret{}, fmt.Errorf("cannot open the cluster secret: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return Secret{}, fmt.Errorf("cannot open the cluster secret: %w", err)
	}
	if !fi.Mode().IsRegular() {
		return Secret{}, fmt.Errorf("%s is not a regular file (%s): give the file that `docker quay node secret` wrote: %w",
			path, fi.Mode().Type(), ErrSecretMalformed)
	}
	if perm := fi.Mode().Perm(); perm&0o077 != 0 {
		return Secret{}, fmt.Errorf("%w: %s has mode %04o; run `chmod 600 %s`, and if others may have read it, "+
			"make a new one with `docker quay node secret`", ErrSecretExposed, path, perm, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return Secret{}, fmt.Errorf("cannot read the cluster secret: %w", err)
	}
	s, err := parseSecret(data)
	if err != nil {
		return Secret{}, fmt.Errorf("%s is %w; make one with `docker quay node secret`", path, err)
	}
	return s, nil
}

// parseSecret reads the text of a secret file. The error wraps ErrSecretMalformed.
func parseSecret(data []byte) (Secret, error) {
	if len(data) > maxSecretFile {
		return Secret{}, fmt.Errorf("%w (larger than %d bytes)", ErrSecretMalformed, maxSecretFile)
	}
	text := strings.TrimSuffix(strings.ReplaceAll(string(data), "\r\n", "\n"), "\n")
	if first, rest, more := strings.Cut(text, "\n"); more && (first == "" || strings.HasPrefix(first, "#")) {
		text = rest
	}
	// Strict: padding bits must be zero, so that one secret has one spelling.
	raw, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(text))
	if err != nil || strings.Contains(strings.TrimSpace(text), "\n") {
		return Secret{}, fmt.Errorf("%w (expected one line of base64 after at most one comment line)", ErrSecretMalformed)
	}
	if len(raw) != secretSize {
		return Secret{}, fmt.Errorf("%w (%d bytes of base64 data, expected %d)", ErrSecretMalformed, len(raw), secretSize)
	}
	if bytes.Count(raw, raw[:1]) == secretSize {
		return Secret{}, fmt.Errorf("%w (all its bytes are the same, so anyone can guess it)", ErrSecretMalformed)
	}
	var s Secret
	copy(s.b[:], raw)
	return s, nil
}

// Save writes the secret to a new file that only its owner can read (mode 0600) and syncs it to disk. It never
// overwrites: when path exists the error wraps fs.ErrExist.
func (s Secret) Save(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists and is not overwritten, because the nodes that use it would lose each other: "+
			"choose another name or remove it first: %w", path, fs.ErrExist)
	}
	if err != nil {
		return fmt.Errorf("cannot write the cluster secret: %w", err)
	}
	_, err = f.WriteString(secretComment + base64.StdEncoding.EncodeToString(s.b[:]) + "\n")
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		os.Remove(path) // a half-written secret would only be refused later
		return fmt.Errorf("cannot write the cluster secret: %w", err)
	}
	return nil
}

// Key derives n bytes (1 to 8160) for one purpose, named by label; equal on every node that holds the secret. Keys of
// different labels tell nothing about each other or the secret (HKDF-SHA256, RFC 5869).
func (s Secret) Key(label string, n int) []byte {
	return s.derive(labelKey+label, n)
}

// GossipKey is the key (32 bytes) that members seal their membership packets with.
func (s Secret) GossipKey() []byte { return s.Key(labelGossip, 32) }

func (s Secret) derive(info string, n int) []byte {
	if s == (Secret{}) {
		panic("trust: use of the zero Secret")
	}
	key, err := hkdf.Key(sha256.New, s.b[:], nil, info, n)
	if err != nil { // only for an n out of range: a mistake of the caller
		panic(fmt.Sprintf("trust: cannot derive %d bytes: %v", n, err))
	}
	return key
}

// Format prints a placeholder, whatever the verb: a secret must not reach a log by accident.
func (s Secret) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// LogValue is the placeholder, too.
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

const redacted = "[cluster secret]"
