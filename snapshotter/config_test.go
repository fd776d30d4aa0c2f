package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"

	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/install"
)

// TestSample: the commented sample has every key, each with its default.
func TestSample(t *testing.T) {
	got, err := ParseConfig([]byte(install.Config))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(DefaultConfig(), got); d != "" {
		t.Error("the sample differs from the defaults:", d)
	}
	var have map[string]any
	if err := toml.Unmarshal([]byte(install.Config), &have); err != nil {
		t.Fatal(err)
	}
	var walk func(at string, typ reflect.Type, have map[string]any)
	walk = func(at string, typ reflect.Type, have map[string]any) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			key := f.Tag.Get("toml")
			v, ok := have[key]
			if !ok {
				t.Errorf("the sample lacks %s%s", at, key)
				continue
			}
			if table, ok := v.(map[string]any); ok {
				walk(at+key+".", f.Type, table)
			}
		}
	}
	walk("", reflect.TypeFor[Config](), have)
}

// TestConfigRoundTrip: what `config check` prints is a configuration.
func TestConfigRoundTrip(t *testing.T) {
	want := DefaultConfig()
	want.Store.Quota = 50 << 30
	want.Limits.Upload = 1500 * 1000
	want.Limits.DownloadPerBlob, want.Limits.Connections, want.Limits.ConnectionsPerBlob, want.Limits.CPUs = 3<<20, 100, 10, 0.5
	want.Peers.Zone, want.Peers.Discovery = "eu-1/a", true
	want.Peers.Ports = trust.PortRange{First: 7000, Last: 7000}
	text, err := toml.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseConfig(text)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestConfigErrors(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"unknown key", "root = \"/a\"\n\n[store]\nqouta = \"1GiB\"\n", "line 4: there is no key store.qouta"},
		{"unknown table", "[stor]\nquota = \"1GiB\"\n", "line 1: there is no key stor"},
		{"two unknown keys", "a = 1\nb = 2\n", "line 1: there is no key a; line 2: there is no key b"},
		{"no TOML", "root = \"/a\"\nroot /b\n", "line 2: expected '=' after key"},
		{"wrong type", "[snapshotter]\nlazy = \"yes\"\n", "line 2: snapshotter.lazy: cannot decode TOML string into struct field snapshotter.SnapshotterConfig.Lazy of type bool"},
		{"size without unit", "[store]\nquota = \"50\"\n", `line 2: store.quota: "50" is no size: write a number and a unit, such as "50GiB" or "500MB", or "0"`},
		{"rate", "[limits]\nupload = \"fast\"\n", `line 2: limits.upload: "fast" is no rate: write bytes per second with a unit, such as "100MiB", or "0" for no limit`},
		{"ports", "[peers]\nports = \"9-1\"\n", `line 2: peers.ports: "9-1" is not a port range: it ends before it begins; write one like 6881-6889, 6881, or 0 for any port`},
		{"relative root", "root = \"quay\"\n", `root: "quay" is not an absolute path`},
		{"root with a comma", "root = \"/a,b\"\n", `root: "/a,b" has a comma, a colon, a quote or a backslash, which overlayfs cannot take in a path`},
		{"open mirror", "[mirror]\nlisten = \"0.0.0.0:80\"\n", `mirror.listen: "0.0.0.0:80" is not a loopback address: the mirror asks nobody for a password`},
		{"mirror without port", "[mirror]\nlisten = \"127.0.0.1\"\n", `mirror.listen: "127.0.0.1" is not an address and port, such as "127.0.0.1:6880"`},
		{"listen with port", "[peers]\nlisten = \"0.0.0.0:6881\"\n", `peers.listen: "0.0.0.0:6881" is not an IP address; the ports are set by peers.ports`},
		{"advertise without port", "[peers]\nadvertise = \"192.0.2.7\"\n", `peers.advertise: "192.0.2.7" is not an IP address and port, such as "192.0.2.7:6881"`},
		{"peer with a path", "[peers]\npeers = [\"https://a\"]\n", `peers.peers: "https://a" is not a host or host:port`},
		{"torrents", "[torrents]\nuse = \"sometimes\"\n", `torrents.use: "sometimes" is none of auto, always, never`},
		{"torrents listen", "[torrents]\nlisten = \"\"\n", `torrents.listen: "" is not an IP address; the ports are set by torrents.ports`},
		{"zone", "[peers]\nzone = \"rack 4\"\n", `peers.zone: zone "rack 4": only letters, digits and ._-/: may be in it`},
		{"rate of a blob", "[limits]\nupload_per_blob = \"5\"\n", `line 2: limits.upload_per_blob: "5" is no rate: write bytes per second with a unit, such as "100MiB", or "0" for no limit`},
		{"few connections", "[limits]\nconnections = 4\nconnections_per_blob = 0\n", `limits.connections: 4 is too few for a node to work with: 16 or more; limits.connections_per_blob: 0 is not a number of connections: 1 or more`},
		{"CPUs below 0", "[limits]\ncpus = -1\n", `limits.cpus: -1 is not a number of CPUs: write one like 0.5 or 2, at least 0.1, or 0 for no limit`},
		{"hardly a CPU", "[limits]\ncpus = 0.01\n", `limits.cpus: 0.01 is not a number of CPUs: write one like 0.5 or 2, at least 0.1, or 0 for no limit`},
		{"CPUs in words", "[limits]\ncpus = nan\n", `limits.cpus: NaN is not a number of CPUs: write one like 0.5 or 2, at least 0.1, or 0 for no limit`},
		{"log", "[log]\nlevel = \"loud\"\nformat = \"xml\"\n", `log.level: "loud" is none of debug, info, warn, error; log.format: "xml" is none of text, json`},
		{"reach", "[origin]\nreach = \"bastion\"\n", `origin.reach: "bastion" is none of direct, members`},
		{"lazy", "[lazy]\nmount = \"kernel\"\nquiet = \"1ms\"\n", `lazy.mount: "kernel" is none of auto, erofs, loop, fuse; lazy.quiet: "1ms" is not between 100ms and 24h0m0s`},
		{"believe", "[lazy]\nbelieve = \"anybody\"\n", `lazy.believe: "anybody" is none of all, members, own`},
		{"quiet without unit", "[lazy]\nquiet = \"2\"\n", `line 2: lazy.quiet: "2" is no time: write a number and a unit, such as "2s"`},
		{"one socket twice", "[api]\nsocket = \"/run/quay/snapshotter.sock\"\n", "api.socket: is the same as snapshotter.socket"},
		{"long socket", "[api]\nsocket = \"/" + strings.Repeat("a", 107) + "\"\n", `api.socket: "/` + strings.Repeat("a", 107) + `" is longer than the 107 bytes a socket's path may have`},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := ParseConfig([]byte(c.text))
			if !errors.Is(err, ErrConfig) {
				t.Fatalf("got %v, want ErrConfig", err)
			}
			if got := strings.TrimPrefix(err.Error(), "the configuration is wrong: "); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

// TestCPUs: whole numbers need no point.
func TestCPUs(t *testing.T) {
	for text, want := range map[string]float64{"2": 2, "0.5": 0.5, "0": 0, "1.5": 1.5} {
		cfg, err := ParseConfig([]byte("[limits]\ncpus = " + text + "\n"))
		if err != nil || cfg.Limits.CPUs != want {
			t.Errorf("cpus = %s: %v, %v", text, cfg.Limits.CPUs, err)
		}
	}
}

func TestLoadConfig(t *testing.T) {
	none := filepath.Join(t.TempDir(), "config.toml")
	if cfg, err := LoadConfig(none, false); err != nil || !cmp.Equal(cfg, DefaultConfig()) {
		t.Error("a missing default file:", err)
	}
	if _, err := LoadConfig(none, true); !errors.Is(err, os.ErrNotExist) {
		t.Error("a missing file that was asked for:", err)
	}
	if err := os.WriteFile(none, []byte("x = 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(none, true); err == nil || err.Error() != none+": the configuration is wrong: line 1: there is no key x" {
		t.Error(err)
	}
}

func TestUnits(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1B": 1, "1KiB": 1024, "1.5 GiB": 3 << 29, "50GiB": 50 << 30, "2TB": 2e12, "500MB": 5e8, "10kB": 1e4,
	} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || int64(s) != want {
			t.Errorf("%q: %d, %v, want %d", text, s, err, want)
		}
	}
	for _, text := range []string{"", "1", "GiB", "-1GiB", "1e30TiB", "1 gig", "NaNB", "0x10B B"} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is taken for %d", text, s)
		}
	}
	var r Rate
	if err := r.UnmarshalText([]byte("100MiB/s")); err != nil || r != 100<<20 {
		t.Error(r, err)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte(install.Config))
	f.Add([]byte("[store]\nquota = \"1.5GiB\""))
	f.Fuzz(func(t *testing.T, text []byte) {
		cfg, err := ParseConfig(text)
		if err == nil {
			err = cfg.Validate()
		} else if errors.Is(err, ErrConfig) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}
