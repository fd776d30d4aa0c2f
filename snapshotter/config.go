package snapshotter

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// DefaultConfigPath is where the daemon looks for its configuration. The file need not exist.
const DefaultConfigPath = "/etc/quay/config.toml"

// ErrConfig is matched by every error about what a configuration says.
var ErrConfig = errors.New("the configuration is wrong")

// Config is everything that can be set on a node. The commented sample in package
// install has the meaning of each key; its values are those of DefaultConfig.
type Config struct {
	Root        string            `toml:"root"`  // store and snapshots
	State       string            `toml:"state"` // sockets
	Snapshotter SnapshotterConfig `toml:"snapshotter"`
	Lazy        LazyConfig        `toml:"lazy"`
	Store       StoreConfig       `toml:"store"`
	Peers       PeersConfig       `toml:"peers"`
	Torrents    TorrentsConfig    `toml:"torrents"`
	Limits      LimitsConfig      `toml:"limits"`
	Origin      OriginConfig      `toml:"origin"`
	Mirror      MirrorConfig      `toml:"mirror"`
	Metrics     MetricsConfig     `toml:"metrics"`
	Log         LogConfig         `toml:"log"`
	API         APIConfig         `toml:"api"`
}

// SnapshotterConfig is [snapshotter].
type SnapshotterConfig struct {
	Socket string `toml:"socket"` // containerd's proxy plugin address
	Lazy   bool   `toml:"lazy"`   // false: every layer is unpacked
}

// LazyConfig is [lazy]: how layers are mounted.
type LazyConfig struct {
	Mount string   `toml:"mount"` // auto, erofs, loop, fuse
	Quota Size     `toml:"quota"` // of the layers; 0: no bound
	Quiet Duration `toml:"quiet"` // before a layer is completed
	// Believe says whose indexes are used before they can be checked: all, members, own.
	Believe string `toml:"believe"`
}

// StoreConfig is [store].
type StoreConfig struct {
	Quota Size `toml:"quota"` // 0: no bound
}

// PeersConfig is [peers].
type PeersConfig struct {
	SecretFile string          `toml:"secret_file"` // no such file: no peers
	Listen     string          `toml:"listen"`      // address without port
	Ports      trust.PortRange `toml:"ports"`
	Advertise  string          `toml:"advertise"` // "": found out
	Peers      []string        `toml:"peers"`     // host or host:port
	Seed       bool            `toml:"seed"`
	Zone       string          `toml:"zone"`            // "": none
	Discovery  bool            `toml:"local_discovery"` // BEP 14 on the node's networks
}

// TorrentsConfig is [torrents].
type TorrentsConfig struct {
	Use    string          `toml:"use"`    // auto, always, never
	Listen string          `toml:"listen"` // address without port
	Ports  trust.PortRange `toml:"ports"`
	DHT    bool            `toml:"dht"`
}

// LimitsConfig is [limits]. 0 is no limit.
type LimitsConfig struct {
	Upload             Rate    `toml:"upload"`
	Download           Rate    `toml:"download"`
	UploadPerBlob      Rate    `toml:"upload_per_blob"`
	DownloadPerBlob    Rate    `toml:"download_per_blob"`
	Connections        int     `toml:"connections"`
	ConnectionsPerBlob int     `toml:"connections_per_blob"`
	CPUs               float64 `toml:"cpus"`
}

// OriginConfig is [origin].
type OriginConfig struct {
	DockerConfig string   `toml:"docker_config"` // folder with config.json; "": docker's default
	HostDirs     []string `toml:"host_dirs"`
	Insecure     []string `toml:"insecure"` // host or host:port
	Reach        string   `toml:"reach"`    // direct, members
	Offline      bool     `toml:"offline"`  // containerd's pulls take what members saw
}

// MirrorConfig is [mirror].
type MirrorConfig struct {
	Listen string `toml:"listen"` // "": off
}

// MetricsConfig is [metrics].
type MetricsConfig struct {
	Listen string `toml:"listen"` // "": off
}

// LogConfig is [log].
type LogConfig struct {
	Level  string `toml:"level"`  // debug, info, warn, error
	Format string `toml:"format"` // text, json
}

// APIConfig is [api].
type APIConfig struct {
	Socket string `toml:"socket"`
	Group  string `toml:"group"` // of the socket, when it exists
}

// DefaultConfig is what holds without a file.
func DefaultConfig() Config {
	return Config{
		Root:        "/var/lib/quay",
		State:       "/run/quay",
		Snapshotter: SnapshotterConfig{Socket: "/run/quay/snapshotter.sock", Lazy: true},
		Lazy:        LazyConfig{Mount: MountAuto, Quiet: Duration(5 * time.Second), Believe: BelieveAll},
		Peers: PeersConfig{
			SecretFile: "/etc/quay/cluster.secret",
			Listen:     "0.0.0.0",
			Ports:      trust.PortRange{First: 6881, Last: 6889}, // BitTorrent's customary ports
			Peers:      []string{},
			Seed:       true,
		},
		Torrents: TorrentsConfig{
			Use: string(fetcher.TorrentsAuto), Listen: "0.0.0.0", DHT: true,
			Ports: trust.PortRange{First: 6890, Last: 6899}, // behind those of the cluster
		},
		Limits: LimitsConfig{Connections: fetcher.DefaultConnections, ConnectionsPerBlob: fetcher.DefaultConnectionsPerBlob},
		Origin: OriginConfig{
			HostDirs: []string{"/etc/quay/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d"},
			Insecure: []string{},
			Reach:    string(fetcher.Direct),
		},
		Mirror: MirrorConfig{Listen: "127.0.0.1:6880"}, // the port below those of the peers
		Log:    LogConfig{Level: "info", Format: "text"},
		API:    APIConfig{Socket: "/run/quay/quay.sock", Group: "docker"},
	}
}

// LoadConfig reads and checks the file at path; what it does not set keeps its default. When the
// file need not exist, mustExist is false. Errors name the file, and the line where there is one.
func LoadConfig(path string, mustExist bool) (Config, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) && !mustExist {
		return DefaultConfig(), nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("the configuration cannot be read: %w", err)
	}
	cfg, err := ParseConfig(text)
	if err != nil {
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	return cfg, nil
}

// ParseConfig reads and checks a configuration in TOML. Every error matches ErrConfig.
func ParseConfig(text []byte) (Config, error) {
	cfg := DefaultConfig()
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(&cfg); err != nil {
		return Config{}, configError(err)
	}
	if err := cfg.Validate(); err != nil {
		return Config{}, err
	}
	return cfg, nil
}

// configError turns the decoder's errors into "line N: key K: …", one line each.
func configError(err error) error {
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) {
		lines := make([]string, 0, len(strict.Errors))
		for _, e := range strict.Errors {
			row, _ := e.Position()
			lines = append(lines, fmt.Sprintf("line %d: there is no key %s", row, strings.Join(e.Key(), ".")))
		}
		return fmt.Errorf("%w: %s", ErrConfig, strings.Join(lines, "; "))
	}
	var at *toml.DecodeError
	if errors.As(err, &at) {
		row, _ := at.Position()
		what := strings.TrimPrefix(at.Error(), "toml: ")
		if key := strings.Join(at.Key(), "."); key != "" {
			what = key + ": " + what
		}
		return fmt.Errorf("%w: line %d: %s", ErrConfig, row, what)
	}
	return fmt.Errorf("%w: %s", ErrConfig, strings.TrimPrefix(err.Error(), "toml: "))
}

// Validate checks what the types cannot. The error names every key that is wrong, and matches ErrConfig.
func (c *Config) Validate() error {
	var bad []string
	wrong := func(key, format string, args ...any) {
		bad = append(bad, key+": "+fmt.Sprintf(format, args...))
	}
	for _, p := range []struct{ key, path string }{
		{"root", c.Root}, {"state", c.State}, {"snapshotter.socket", c.Snapshotter.Socket}, {"api.socket", c.API.Socket},
		{"peers.secret_file", c.Peers.SecretFile},
	} {
		if !filepath.IsAbs(p.path) {
			wrong(p.key, "%q is not an absolute path", p.path)
		}
	}
	for _, s := range []struct{ key, path string }{{"snapshotter.socket", c.Snapshotter.Socket}, {"api.socket", c.API.Socket}} {
		// sun_path of unix(7) has 108 bytes, the last of them zero.
		if len(s.path) > 107 {
			wrong(s.key, "%q is longer than the 107 bytes a socket's path may have", s.path)
		}
	}
	if strings.ContainsAny(c.Root, ",:\\\"") {
		wrong("root", "%q has a comma, a colon, a quote or a backslash, which overlayfs cannot take in a path", c.Root)
	}
	if c.Snapshotter.Socket == c.API.Socket {
		wrong("api.socket", "is the same as snapshotter.socket")
	}
	if !slices.Contains(mountWays, c.Lazy.Mount) {
		wrong("lazy.mount", "%q is none of %s", c.Lazy.Mount, strings.Join(mountWays, ", "))
	}
	if !slices.Contains(believers, c.Lazy.Believe) {
		wrong("lazy.believe", "%q is none of %s", c.Lazy.Believe, strings.Join(believers, ", "))
	}
	if q := time.Duration(c.Lazy.Quiet); q < leastQuiet || q > mostQuiet {
		wrong("lazy.quiet", "%q is not between %s and %s", q, leastQuiet, mostQuiet)
	}
	if net.ParseIP(c.Peers.Listen) == nil {
		wrong("peers.listen", "%q is not an IP address; the ports are set by peers.ports", c.Peers.Listen)
	}
	if _, err := netip.ParseAddrPort(c.Peers.Advertise); c.Peers.Advertise != "" && err != nil {
		wrong("peers.advertise", "%q is not an IP address and port, such as \"192.0.2.7:6881\"", c.Peers.Advertise)
	}
	if _, err := fetcher.ParseTorrentPolicy(c.Torrents.Use); err != nil || c.Torrents.Use == "" {
		wrong("torrents.use", "%q is none of %s", c.Torrents.Use, strings.Join(fetcher.TorrentPolicies(), ", "))
	}
	if net.ParseIP(c.Torrents.Listen) == nil {
		wrong("torrents.listen", "%q is not an IP address; the ports are set by torrents.ports", c.Torrents.Listen)
	}
	for _, p := range c.Peers.Peers {
		if p == "" || strings.ContainsAny(p, "/ ,") {
			wrong("peers.peers", "%q is not a host or host:port", p)
		}
	}
	if err := fetcher.CheckZone(c.Peers.Zone); err != nil {
		wrong("peers.zone", "%v", err)
	}
	if n := c.Limits.Connections; n < fetcher.LeastConnections {
		wrong("limits.connections", "%d is too few for a node to work with: %d or more", n, fetcher.LeastConnections)
	}
	if n := c.Limits.ConnectionsPerBlob; n < 1 {
		wrong("limits.connections_per_blob", "%d is not a number of connections: 1 or more", n)
	}
	if n := c.Limits.CPUs; n != 0 && !(n >= leastCPUs && n <= mostCPUs) {
		wrong("limits.cpus", "%v is not a number of CPUs: write one like 0.5 or 2, at least %v, or 0 for no limit", n, leastCPUs)
	}
	for _, h := range c.Origin.Insecure {
		if h == "" || strings.ContainsAny(h, "/ ,") {
			wrong("origin.insecure", "%q is not a host or host:port", h)
		}
	}
	if reaches := []string{string(fetcher.Direct), string(fetcher.ThroughMembers)}; !slices.Contains(reaches, c.Origin.Reach) {
		wrong("origin.reach", "%q is none of %s", c.Origin.Reach, strings.Join(reaches, ", "))
	}
	for _, d := range c.Origin.HostDirs {
		if !filepath.IsAbs(d) {
			wrong("origin.host_dirs", "%q is not an absolute path", d)
		}
	}
	if host, ok := listenHost(c.Mirror.Listen); c.Mirror.Listen != "" {
		switch {
		case !ok:
			wrong("mirror.listen", "%q is not an address and port, such as \"127.0.0.1:6880\"", c.Mirror.Listen)
		case !net.ParseIP(host).IsLoopback():
			wrong("mirror.listen", "%q is not a loopback address: the mirror asks nobody for a password", c.Mirror.Listen)
		}
	}
	if _, ok := listenHost(c.Metrics.Listen); c.Metrics.Listen != "" && !ok {
		wrong("metrics.listen", "%q is not an address and port, such as \"127.0.0.1:6870\"", c.Metrics.Listen)
	}
	if levels := []string{"debug", "info", "warn", "error"}; !slices.Contains(levels, c.Log.Level) {
		wrong("log.level", "%q is none of %s", c.Log.Level, strings.Join(levels, ", "))
	}
	if formats := []string{"text", "json"}; !slices.Contains(formats, c.Log.Format) {
		wrong("log.format", "%q is none of %s", c.Log.Format, strings.Join(formats, ", "))
	}
	if bad == nil {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrConfig, strings.Join(bad, "; "))
}

// listenHost splits an address to listen on, of an IP address and a port.
func listenHost(addr string) (host string, ok bool) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "" {
		return "", false
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return "", false
	}
	return host, net.ParseIP(host) != nil
}
