package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker-quay/docker-quay/install"
	"github.com/docker-quay/docker-quay/snapshotter"
)

// TestMain has the test binary be the daemon's helper processes, too: the daemon starts its own program.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == snapshotter.KeeperCommand || os.Args[1] == snapshotter.MounterCommand) {
		main()
		return
	}
	os.Exit(m.Run())
}

func call(args ...string) (string, error) {
	var out bytes.Buffer
	cmd := command(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(context.Background())
	return out.String(), err
}

func TestCommandLine(t *testing.T) {
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("\nrot = \"/x\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(t.TempDir(), "good.toml")
	if err := os.WriteFile(good, []byte("[store]\nquota = \"5GiB\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args string
		code int
		out  string // part of the output, or of the error
	}{
		{"--version", exitOK, "containerd-quay-grpc dev\n"},
		{"--help", exitOK, "Exit codes:"},
		{"config default", exitOK, install.Config},
		{"config check --config " + good, exitOK, "quota = '5GiB'"},
		{"config check --root /elsewhere --log-level debug --config " + good, exitOK, "root = '/elsewhere'"},
		{"config check --config " + bad, exitUsage, bad + ": the configuration is wrong: line 2: there is no key rot"},
		{"config check --log-level loud --config " + good, exitUsage, `log.level: "loud"`},
		{"config check --config /nowhere/quay.toml", exitFailed, "the configuration cannot be read"},
		{"--no-such-flag", exitUsage, "unknown flag: --no-such-flag"},
		{"serve", exitUsage, `unknown command "serve"`},
	} {
		t.Run(c.args, func(t *testing.T) {
			out, err := call(strings.Fields(c.args)...)
			if got := exitCode(err); got != c.code {
				t.Errorf("exit code %d (%v), want %d", got, err, c.code)
			}
			if text := out + fmt.Sprint(err); !strings.Contains(text, c.out) {
				t.Errorf("got %q, want it to have %q", text, c.out)
			}
		})
	}
	for err, want := range map[error]int{errRoot: exitRoot, fmt.Errorf("x: %w", snapshotter.ErrInUse): exitInUse, errors.New("x"): exitFailed} {
		if got := exitCode(err); got != want {
			t.Errorf("%v: exit code %d, want %d", err, got, want)
		}
	}
}

// TestNotify plays systemd: the daemon says READY, feeds the watchdog, says STOPPING. What it wants to have kept comes before and after, with
// barriers.
func TestNotify(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: the daemon refuses to run otherwise")
	}
	dir, err := os.MkdirTemp("", "quay")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	sock := filepath.Join(dir, "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: sock, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", sock)
	t.Setenv("WATCHDOG_USEC", "100000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	cfg := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("state = %q\n[snapshotter]\nsocket = %q\n[api]\nsocket = %q\ngroup = \"\"\n[mirror]\nlisten = \"\"\n[peers]\nsecret_file = %q\n[log]\nlevel = \"error\"\n",
		dir+"/run", dir+"/run/s", dir+"/run/a", dir+"/none")
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		cmd := command(new(bytes.Buffer))
		cmd.SetArgs([]string{"--config", cfg, "--root", dir + "/root"})
		done <- cmd.ExecuteContext(ctx)
	}()
	said := make(chan string, 100)
	go func() {
		defer close(said)
		buf := make([]byte, 1000)
		for {
			// The files that come along are closed: a barrier is over then.
			n, err := l.Read(buf)
			if err != nil {
				return
			}
			said <- string(buf[:n])
		}
	}()
	var kept []string
	want := []string{"READY=1", "WATCHDOG=1", "WATCHDOG=1", "STOPPING=1"}
	for i, w := range want {
		if i == len(want)-1 {
			cancel()
		}
		for {
			var got string
			select {
			case got = <-said:
			case <-time.After(10 * time.Second):
				t.Fatal("waiting for", w)
			}
			if got == w {
				break
			}
			if strings.HasPrefix(got, "FDSTORE") {
				kept = append(kept, got)
			} else if got != "WATCHDOG=1" && got != "BARRIER=1" {
				t.Fatalf("got %s, want %s", got, w)
			}
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	l.Close()
	for got := range said {
		if strings.HasPrefix(got, "FDSTORE") {
			kept = append(kept, got)
		}
	}
	// Where layers are not mounted as EROFS there is nothing to keep. Here nothing was mounted when the daemon ended.
	for i, head := range []string{"FDSTORE=1\nFDPOLL=0\nFDNAME=quay.blobfs-", "FDSTOREREMOVE=1\nFDNAME=quay.blobfs-"} {
		if len(kept) != 0 && (len(kept) != 2 || !strings.HasPrefix(kept[i], head)) {
			t.Errorf("what systemd is to keep: %q", kept)
		}
	}
	t.Logf("%q", kept)
}
