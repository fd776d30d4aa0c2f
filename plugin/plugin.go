// Package plugin is the command line: `docker quay …`, also `docker-quay …` alone.
//
// One file is one verb: an options struct, its flags, and one function that runs it. A verb looks for the engine
// (package target), opens the image (a Source, from the node daemon or from a fetcher in this process), lets the engine
// take it and shows how it arrives (package progress). What comes of it goes to standard output, everything else to
// standard error.
//
// Errors keep their identity up to here, where exitCode makes of each one of the codes that the help lists.
package plugin

import (
	"context"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/log"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli-plugins/metadata"
	"github.com/docker/cli/cli/command"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/plugin/target"
	indexes "github.com/docker-quay/docker-quay/snapshotter/index/published"
)

// Options are what main gives.
type Options struct {
	Version string
	// Open opens an image from wherever its bytes can be had.
	Open func(ctx context.Context, r Request) (Source, error)
	// NodeVersion asks the daemon at a socket for its version; "" when none answers. Nil: not asked.
	NodeVersion func(ctx context.Context, socket string) string
	// Stranger asks an image's registry what somebody without a login gets of it. Nil: not asked, the image counts as not public.
	Stranger func(ctx context.Context, r Request, manifest, layer digest.Digest) (Stranger, error)
	// Publish puts the torrents of an image's layers into its registry, beside subject, the image's manifest.
	Publish func(ctx context.Context, r Request, subject ocispec.Descriptor, torrents []*published.Torrent) error
	// Manifests asks an image's registry which manifests its name stands for: one, or one for each platform.
	Manifests func(ctx context.Context, r Request) ([]ocispec.Descriptor, error)
	// PublishIndexes puts the indexes of an image's layers into its registry, beside subject, the image's manifest. It tells what they
	// are in, and whether that had to be pushed. Without layers it only finds out whether it may.
	PublishIndexes func(ctx context.Context, r Request, subject ocispec.Descriptor, layers []indexes.Layer) (referrer digest.Digest, pushed bool, err error)
}

// Source is an opened image. Its blobs are given to peers for as long as it is open.
type Source interface {
	target.Image
	// Via says who fetches, for the user: "this process", "the node daemon at /run/quay/quay.sock".
	Via() string
	// Notes are what the user should know, such as that the registry did not answer and a cached tag was used.
	Notes() []string
	// Publish gives layers, which must have been fetched, to the open swarms of torrents of them.
	Publish(ctx context.Context, torrents []*published.Torrent) error
}

// Request is what the flags say about an image and the way to it.
type Request struct {
	Ref         reference.Named // normalized, with a tag or a digest
	Platform    *ocispec.Platform
	Insecure    bool // plain HTTP and unverified TLS allowed
	SkipWebSeed bool // blobs from peers only
	Offline     bool // what nodes of the cluster saw will do when none reaches the registry
	Seed        bool // the image is opened to be given to others
	NoSeed      bool // nothing is given to others

	Torrents fetcher.TorrentPolicy // whether published torrents are used
	Trackers []string              // instead of theirs

	Peers        []string // HOST:PORT
	SecretFile   string   // "" = no peers
	Ports        trust.PortRange
	UploadRate   int64 // bytes a second, 0 = unlimited
	DownloadRate int64 // bytes a second, 0 = unlimited

	Zone           string // "" = none
	LocalDiscovery bool
	MaxConnections int // with other nodes

	StoreDir string // of the embedded fetcher
	Socket   string // of the node daemon
	NoDaemon bool

	DockerConfigDir string
	Log             *slog.Logger
}

const (
	pluginName  = "quay"
	torrentName = "torrent" // quayctl's command; the binary answers to it as docker-torrent
	vendor      = "docker quay"
	short       = "Pull images from the nearest place that has them: this node, a peer, the registry"
	homepage    = "https://github.com/docker-quay/docker-quay"
)

// Metadata is what the docker CLI asks for. arg0 is how this binary was called: as docker-torrent, which exists for the
// sake of quayctl's users, it is not listed in `docker help`.
func Metadata(arg0, version string) metadata.Metadata {
	return metadata.Metadata{
		SchemaVersion: "0.1.0", Vendor: vendor, Version: version, ShortDescription: short, URL: homepage,
		Hidden: calledAs(arg0) == torrentName,
	}
}

func calledAs(arg0 string) string {
	base := strings.TrimSuffix(filepath.Base(arg0), ".exe")
	if strings.TrimPrefix(base, metadata.NamePrefix) == torrentName {
		return torrentName
	}
	return pluginName
}

// New makes the command tree of the binary called arg0.
func New(dockerCLI command.Cli, arg0 string, o Options) *cobra.Command {
	quietLibraries()
	if calledAs(arg0) == torrentName {
		return newQuayctl(dockerCLI, o)
	}
	cmd := &cobra.Command{
		Use:   pluginName,
		Short: short,
		Long: short + `.

Images come over BitTorrent from the other nodes of your cluster, from the registry, or from
both at once, and go into Docker or containerd. Nothing about an image or its digest changes.`,
		Args: usage(cli.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		newPull(dockerCLI, o, false),
		newSeed(dockerCLI, o, false),
		newIndex(dockerCLI, o),
		newNode(dockerCLI),
		newStatus(dockerCLI),
		newVersion(dockerCLI, o),
		newTorrent(dockerCLI, o),
		newTracker(dockerCLI),
		newPeers(dockerCLI),
	)
	cmd.SetUsageFunc(usageOf)
	return cmd
}

// quietLibraries keeps containerd's client from logging into the middle of our progress: what matters of it comes back
// as errors.
func quietLibraries() { log.L.Logger.SetOutput(io.Discard) }

// StandaloneArgs makes of the arguments of `docker-quay …` those of `docker quay …`: the name goes behind the global
// flags (--context, -H, …), before the first argument.
func StandaloneArgs(args []string) []string {
	if len(args) == 0 {
		return args
	}
	name := calledAs(args[0])
	rest := args[1:]
	i := 0
	for i < len(rest) && strings.HasPrefix(rest[i], "-") {
		flag, _, hasValue := strings.Cut(rest[i], "=")
		if !slices.Contains(globalFlags, flag) {
			break
		}
		i++
		if !hasValue && !slices.Contains(globalSwitches, flag) {
			i++
		}
	}
	i = min(i, len(rest))
	if i < len(rest) && (rest[i] == name || strings.HasPrefix(rest[i], cobra.ShellCompRequestCmd)) {
		return args
	}
	out := append([]string{args[0]}, rest[:i]...)
	return append(append(out, name), rest[i:]...)
}

// The global flags of the docker CLI (docker/cli, cli/flags), and those of them that take no value.
var (
	globalFlags = []string{
		"--config", "-c", "--context", "-D", "--debug", "-H", "--host", "-l", "--log-level",
		"--tls", "--tlscacert", "--tlscert", "--tlskey", "--tlsverify",
	}
	globalSwitches = []string{"-D", "--debug", "--tls", "--tlsverify"}
)

// defaultStore is where the embedded fetcher keeps blobs: $XDG_CACHE_HOME/quay.
func defaultStore() string {
	dir, err := os.UserCacheDir()
	if err != nil {
		dir = os.TempDir()
	}
	return filepath.Join(dir, "quay")
}

// secretPlaces is defaultSecretFile for help, the same whoever reads it.
const secretPlaces = "/etc/quay/cluster.secret, or ~/.config/quay/cluster.secret unless root"

// defaultSecretFile is where `node secret` writes and where pull and seed look: the node's for root, else a person's
// own.
func defaultSecretFile() string {
	if dir, err := os.UserConfigDir(); err == nil && os.Getuid() != 0 {
		return filepath.Join(dir, "quay", "cluster.secret")
	}
	return "/etc/quay/cluster.secret"
}
