package install

import (
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

// TestFiles: the examples are TOML, and name the places that the sample configuration has.
func TestFiles(t *testing.T) {
	var cfg struct {
		Snapshotter struct{ Socket string }
		Mirror      struct{ Listen string }
		Root        string
	}
	if err := toml.Unmarshal([]byte(Config), &cfg); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, text string
		has        []string
	}{
		{"containerd 2", Containerd2, []string{"version = 3", `"` + cfg.Snapshotter.Socket + `"`, `"` + cfg.Root + `"`, `enable_remote_snapshot_annotations = "true"`}},
		{"containerd 1.7", Containerd17, []string{"version = 2", `"` + cfg.Snapshotter.Socket + `"`, "disable_snapshot_annotations = false"}},
		{"hosts.toml", Hosts, []string{"http://" + cfg.Mirror.Listen + `"`}},
	} {
		var any map[string]any
		if err := toml.Unmarshal([]byte(c.text), &any); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, h := range c.has {
			if !strings.Contains(c.text, h) {
				t.Errorf("%s lacks %s", c.name, h)
			}
		}
	}
}

// TestUnit: what must be there for mounts to be seen and containers to survive, and
// what must not.
func TestUnit(t *testing.T) {
	keys := map[string]string{}
	for line := range strings.Lines(Unit) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok && !strings.HasPrefix(k, "#") {
			keys[k] = v
		}
	}
	for k, want := range map[string]string{
		"Type": "notify", "Restart": "always", "KillMode": "process", "RuntimeDirectoryPreserve": "yes", "Before": "containerd.service",
		"NotifyAccess": "main", "FileDescriptorStoreMax": "16", "FileDescriptorStorePreserve": "yes",
	} {
		if keys[k] != want {
			t.Errorf("%s=%s, want %s", k, keys[k], want)
		}
	}
	for _, k := range []string{
		"PrivateTmp", "PrivateMounts", "PrivateDevices", "ProtectSystem", "ProtectHome", "ProtectKernelTunables", "ProtectKernelModules",
		"ProtectKernelLogs", "ProtectControlGroups", "ReadWritePaths", "ReadOnlyPaths", "InaccessiblePaths", "TemporaryFileSystem", "MountFlags", "DynamicUser",
	} {
		if _, ok := keys[k]; ok {
			t.Errorf("%s gives the daemon a mount namespace of its own: containers would not see its mounts", k)
		}
	}
}
