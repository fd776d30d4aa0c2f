package plugin

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/docker/cli/cli/config"
	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

// sourceOptions are the flags about where an image comes from; pull and seed share them.
type sourceOptions struct {
	platform     string
	insecure     bool
	skipWebSeed  bool
	offline      bool
	peers        []string
	secretFile   string
	ports        portsValue
	uploadRate   rateValue
	downloadRate rateValue
	zone         string
	discovery    bool
	connections  int
	storeDir     string
	socket       string
	noDaemon     bool
	duration     time.Duration

	quiet    bool
	progress modeValue
}

// defaultSocket is where the node daemon listens.
const defaultSocket = "/run/quay/quay.sock"

func (o *sourceOptions) install(flags *pflag.FlagSet, torrent bool) {
	o.ports.PortRange = trust.PortRange{First: 6881, Last: 6889} // BitTorrent's by custom, quayctl's by default
	o.progress.Mode = progress.Auto
	flags.StringVar(&o.platform, "platform", "", "Choose the image of this platform (`os/arch[/variant]`; default: the engine's)")
	flags.BoolVar(&o.insecure, "insecure", false, "Allow the registry plain HTTP and a certificate that cannot be verified")
	flags.BoolVar(&o.skipWebSeed, "skip-web-seed", false, "Take layers from peers only, never from the registry")
	flags.BoolVar(&o.offline, "offline", false, "When no node of the cluster reaches the registry, take the newest digest that one saw under this name")
	flags.StringSliceVar(&o.peers, "peer", nil, "Another node, as `host:port`; one is enough to find the others (repeatable)")
	flags.StringVar(&o.secretFile, "secret-file", "", "The `file` with the cluster's secret, without which there are no peers (default "+secretPlaces+", if it is there)")
	flags.Var(&o.ports, "ports", "Ports to listen on for peers: the first free one of a `range`, 0 for any")
	flags.Var(&o.uploadRate, "upload-rate", "Limit what peers get, a second: 10MiB, 500kB; a bare number is kB (default: no limit)")
	flags.Var(&o.downloadRate, "download-rate", "Limit what is fetched, a second (default: no limit)")
	flags.StringVar(&o.zone, "zone", "", "Where this node stands, such as eu-1/a: nodes of the same `zone` are asked first")
	flags.BoolVar(&o.discovery, "local-discovery", false, "Find nodes of the cluster on this machine's networks by multicast")
	flags.IntVar(&o.connections, "max-connections", fetcher.DefaultConnections, "Most connections with other nodes, at least "+strconv.Itoa(fetcher.LeastConnections))
	flags.StringVar(&o.storeDir, "store", "", "Keep blobs in this `directory` when no node daemon runs (default ~/.cache/quay)")
	flags.StringVar(&o.socket, "socket", defaultSocket, "The node daemon's `socket`")
	flags.BoolVar(&o.noDaemon, "no-daemon", false, "Fetch in this process even if the node daemon runs")
	flags.BoolVarP(&o.quiet, "quiet", "q", false, "Print nothing but the image's name")
	flags.Var(&o.progress, "progress", "How to show progress: auto, tty, plain, json, quiet")

	// quayctl's names.
	flags.Var(portValue{&o.ports.First, &o.ports.Last, true}, "lower-port", "")
	flags.Var(portValue{&o.ports.Last, &o.ports.First, false}, "upper-port", "")
	hide(flags, "lower-port", "upper-port")
	if torrent {
		flags.Int("connections-per-second", 0, "")
		flags.Int("encryption-mode", 0, "")
		flags.Bool("debug", false, "")
		for name, why := range map[string]string{
			"connections-per-second": "it is not limited",
			"encryption-mode":        "connections are always encrypted",
			"debug":                  "use --progress plain",
		} {
			_ = flags.MarkDeprecated(name, why)
		}
	}
}

func hide(flags *pflag.FlagSet, names ...string) {
	for _, n := range names {
		if err := flags.MarkHidden(n); err != nil {
			panic(err) // a flag that was not installed
		}
	}
}

func (o *sourceOptions) complete(cmd *cobra.Command) {
	var modes []string
	for _, m := range progress.Modes() {
		modes = append(modes, string(m))
	}
	registerCompletion(cmd, "progress", completion.FromList(modes...))
	registerCompletion(cmd, "platform", completion.Platforms())
	for _, f := range []string{"secret-file", "socket"} {
		registerCompletion(cmd, f, completion.FileNames())
	}
	registerCompletion(cmd, "store", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	})
}

func registerCompletion(cmd *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err) // a flag that was not installed, or twice
	}
}

// request checks the flags. Its errors are of usage.
func (o *sourceOptions) request(dockerCLI command.Cli, image string) (Request, error) {
	ref, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return Request{}, usageError{fmt.Errorf("%q is not the name of an image: %w", image, err)}
	}
	r := Request{
		Ref: reference.TagNameOnly(ref), Insecure: o.insecure, SkipWebSeed: o.skipWebSeed, Offline: o.offline,
		Peers: o.peers, SecretFile: o.secretFile, Ports: o.ports.PortRange,
		UploadRate: int64(o.uploadRate), DownloadRate: int64(o.downloadRate),
		Zone: o.zone, LocalDiscovery: o.discovery, MaxConnections: o.connections,
		StoreDir: o.storeDir, Socket: o.socket, NoDaemon: o.noDaemon,
		DockerConfigDir: config.Dir(), Log: slog.New(slog.DiscardHandler),
	}
	if f := dockerCLI.ConfigFile(); f != nil && f.Filename != "" {
		r.DockerConfigDir = dirOf(f.Filename)
	}
	if r.StoreDir == "" {
		r.StoreDir = defaultStore()
	}
	if o.platform != "" {
		p, err := platforms.Parse(o.platform)
		if err != nil {
			return Request{}, usageError{fmt.Errorf("--platform %q: %w", o.platform, err)}
		}
		r.Platform = &p
	}
	if r.Ports.Last < r.Ports.First {
		return Request{}, usageError{fmt.Errorf("the ports end at %d before they begin at %d", r.Ports.Last, r.Ports.First)}
	}
	if err := fetcher.CheckZone(r.Zone); err != nil {
		return Request{}, usageError{fmt.Errorf("--zone: %w", err)}
	}
	if r.MaxConnections < fetcher.LeastConnections {
		return Request{}, usageError{fmt.Errorf("--max-connections %d is too few for a node to work with: %d or more", r.MaxConnections, fetcher.LeastConnections)}
	}
	for _, p := range r.Peers {
		if host, port, ok := cutPort(p); !ok || host == "" || port == 0 {
			return Request{}, usageError{fmt.Errorf("--peer %q is not of the form HOST:PORT", p)}
		}
	}
	if r.SecretFile == "" {
		f := defaultSecretFile()
		switch _, err := os.Stat(f); {
		case err == nil:
			r.SecretFile = f
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission):
			return Request{}, err
		}
	}
	return r, nil
}

// mode is what -q and --progress say together.
func (o *sourceOptions) mode() progress.Mode {
	if o.quiet {
		return progress.Quiet
	}
	return o.progress.Mode
}

func cutPort(s string) (host string, port uint16, ok bool) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", 0, false
	}
	n, err := strconv.ParseUint(s[i+1:], 10, 16)
	return s[:i], uint16(n), err == nil
}

// engine gives a platform to a request that has none: a remote engine's may not be this machine's.
func (r *Request) engine(p *ocispec.Platform) {
	if r.Platform == nil {
		r.Platform = p
	}
}

type modeValue struct{ progress.Mode }

func (v *modeValue) Set(s string) (err error) { v.Mode, err = progress.ParseMode(s); return err }
func (v *modeValue) String() string           { return string(v.Mode) }
func (v *modeValue) Type() string             { return "string" }

type portsValue struct{ trust.PortRange }

func (v *portsValue) Set(s string) (err error) {
	v.PortRange, err = trust.ParsePortRange(s)
	return err
}
func (v *portsValue) Type() string { return "range" }

// portValue sets one end of the range. The other end follows when the range would be empty, so that either flag may be
// given alone.
type portValue struct {
	end, other *uint16
	lower      bool
}

func (v portValue) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return errors.New("a port is a number from 0 to 65535")
	}
	*v.end = uint16(n)
	if v.lower && *v.other < *v.end || !v.lower && *v.other > *v.end {
		*v.other = *v.end
	}
	return nil
}

func (v portValue) String() string { return "" }
func (v portValue) Type() string   { return "port" }

// rateValue is bytes a second, 0 for no limit.
type rateValue int64

// Set reads "10MiB", "500kB", "10MiB/s"; a bare number is kB, as it was for quayctl.
func (v *rateValue) Set(s string) error {
	amount := strings.TrimSuffix(strings.TrimSpace(s), "/s")
	bad := fmt.Errorf("%q is not a rate: write one like 10MiB or 500kB, for bytes a second", s)
	if n, err := strconv.ParseUint(amount, 10, 40); err == nil {
		*v = rateValue(n) * 1000
		return nil
	} else if errors.Is(err, strconv.ErrRange) {
		return bad
	}
	parse := units.FromHumanSize
	if strings.Contains(strings.ToLower(amount), "i") {
		parse = units.RAMInBytes
	}
	n, err := parse(amount)
	if err != nil || n < 0 {
		return bad
	}
	*v = rateValue(n)
	return nil
}

func (v *rateValue) String() string {
	if *v == 0 {
		return ""
	}
	return units.HumanSize(float64(*v))
}

func (v *rateValue) Type() string { return "bytes" }
