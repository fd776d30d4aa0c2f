package interop

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/test/rig"
)

// client is a BitTorrent program of others.
type client struct {
	name string
	// start has it download one torrent into dir, the folder for files that are wanted, and go on seeding. Home is a folder for
	// its own things.
	start func(t *testing.T, w *world, file, dir, home string) rig.Command
}

var clients = []client{
	{"aria2", aria2},
	{"transmission", transmission},
	{"qbittorrent", qbittorrent},
}

// run starts the client with a torrent, and returns its process and the path where the file will be.
func (c client) run(t *testing.T, w *world, p *published.Torrent) (*rig.Process, string) {
	t.Helper()
	base := t.TempDir()
	dir, home := filepath.Join(base, "files"), filepath.Join(base, "home")
	for _, d := range []string{dir, home} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(base, "layer.torrent")
	if err := os.WriteFile(file, p.Encode(), 0o644); err != nil {
		t.Fatal(err)
	}
	command := c.start(t, w, file, dir, home)
	command.Name = c.name + "-" + filepath.Base(filepath.Dir(base))
	command.Dir = home
	command.Env = append(command.Env, "HOME="+home, "XDG_CONFIG_HOME="+home, "XDG_DATA_HOME="+home, "XDG_CACHE_HOME="+home)
	process, err := w.rig.Start(t.Context(), command)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("%s: %s\n%s", command.Name, process.State(), process.Tail(40))
		}
		process.Stop()
	})
	return process, filepath.Join(dir, p.Info.Name)
}

func aria2(t *testing.T, _ *world, file, dir, _ string) rig.Command {
	addr := newAddr(t)
	return rig.Command{Path: "aria2c", Args: []string{
		"--no-conf", "--dir=" + dir, "--seed-ratio=0.0", "--file-allocation=none", "--summary-interval=1", "--console-log-level=notice",
		"--enable-dht=false", "--enable-dht6=false", "--bt-enable-lpd=false", "--enable-peer-exchange=false", "--disable-ipv6=true",
		"--interface=" + addr.String(), "--listen-port=" + strconv.Itoa(freePort(t, addr)), "--follow-torrent=mem", file,
	}}
}

func transmission(t *testing.T, _ *world, file, dir, home string) rig.Command {
	addr := newAddr(t)
	// It takes torrents that lie in the watched folder when it starts.
	watch := filepath.Join(home, "watch")
	if err := os.Mkdir(watch, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(file, filepath.Join(watch, "layer.torrent")); err != nil {
		t.Fatal(err)
	}
	settings := fmt.Sprintf(`{
		"bind-address-ipv4": %q, "bind-address-ipv6": "::1", "peer-port": %d, "port-forwarding-enabled": false,
		"dht-enabled": false, "lpd-enabled": false, "pex-enabled": false, "utp-enabled": false,
		"rpc-bind-address": "127.0.0.1", "rpc-port": %d, "rpc-whitelist-enabled": false, "rpc-authentication-required": false,
		"download-dir": %q, "incomplete-dir-enabled": false, "rename-partial-files": false, "preallocation": 0,
		"watch-dir": %q, "watch-dir-enabled": true, "watch-dir-force-generic": false, "ratio-limit-enabled": false,
		"idle-seeding-limit-enabled": false, "message-level": 2
	}`, addr, freePort(t, addr), freePort(t, serverAddr), dir, watch)
	if err := os.WriteFile(filepath.Join(home, "settings.json"), []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	return rig.Command{Path: "transmission-daemon", Args: []string{"--foreground", "--config-dir", home}}
}

func qbittorrent(t *testing.T, _ *world, file, dir, home string) rig.Command {
	addr := newAddr(t)
	config := filepath.Join(home, "qBittorrent", "config")
	if err := os.MkdirAll(config, 0o755); err != nil {
		t.Fatal(err)
	}
	settings := fmt.Sprintf(`[LegalNotice]
Accepted=true

[BitTorrent]
Session\Interface=lo
Session\InterfaceName=lo
Session\InterfaceAddress=%s
Session\Port=%d
Session\DHTEnabled=false
Session\LSDEnabled=false
Session\PeXEnabled=false
Session\DefaultSavePath=%s
Session\QueueingSystemEnabled=false
Session\BTProtocol=TCP

[Network]
PortForwardingEnabled=false

[Preferences]
WebUI\Enabled=true
WebUI\Address=127.0.0.1
WebUI\Port=%d
`, addr, freePort(t, addr), dir, freePort(t, serverAddr))
	if err := os.WriteFile(filepath.Join(config, "qBittorrent.conf"), []byte(settings), 0o644); err != nil {
		t.Fatal(err)
	}
	return rig.Command{Path: "qbittorrent-nox", Args: []string{
		"--profile=" + home, "--save-path=" + dir, "--add-paused=false", "--skip-dialog=true", file,
	}}
}
