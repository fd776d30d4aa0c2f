package plugin

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/plugin/progress"
	"github.com/docker-quay/docker-quay/plugin/target"
)

type pullOptions struct {
	sourceOptions
	to                string
	lazy              string
	containerdAddress string
	snapshotter       string
	noSeed            bool
	torrents          string
	trackers          []string
}

func newPull(dockerCLI command.Cli, o Options, torrent bool) *cobra.Command {
	var opts pullOptions
	cmd := &cobra.Command{
		Use:   "pull [OPTIONS] IMAGE",
		Short: "Pull an image from peers and its registry into Docker or containerd",
		Long: `Pull an image from the nearest places that have it, and put it where containers can be
started from it.

The registry is asked what IMAGE is and whether you may have it. Its layers then come from the
cache of this node, from peers, and from the registry, all at once, each byte from one of them.
Peers are other nodes with the same cluster secret (see "docker quay node secret"); without a
secret the registry alone is asked. A pull that was interrupted goes on where it ended.

The image goes where --to says. By default that is looked for and shown:
  docker            the Docker Engine of the current context, in the best way it has
  classic, load     the same, by a mirror on loopback, or by streaming an archive to it
  containerd[:NS]   a containerd namespace, default k8s.io when there is one
  store             nowhere: the image is only fetched, checked, and kept to be given to others

Layers that were published as torrents (see "docker quay seed --publish") come from anybody's BitTorrent
clients, too, checked by their digest. --torrents says when those are looked for: "auto" without a
cluster's secret only, "always", "never". --tracker replaces the trackers that they name. To
others the layers are given for as long as the pull lasts.

When the engine's snapshotter is "quay", containers can be started before the layers are
there. --lazy says what then becomes of them: "auto" completes them in the end, so that the image
can be pushed and saved; "keep" does not; "never" fetches all of them first.

` + exitHelp,
		Example: `  # Pull from the registry and from whoever has it
  docker quay pull --peer node1:6881 quay.io/team/app:1.4

  # On a node that must not, or cannot, reach the registry's storage
  docker quay pull --skip-web-seed --peer node1:6881 quay.io/team/app:1.4

  # On a node behind others that reach the registry, or while it is away: what they saw last
  docker quay pull --offline --peer node1:6881 quay.io/team/app:1.4

  # For Kubernetes
  docker quay pull --to containerd:k8s.io quay.io/team/app:1.4

  # In a script
  docker run "$(docker quay pull -q quay.io/team/app:1.4)"`,
		Args: usage(cli.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPull(cmd.Context(), dockerCLI, o, opts, args[0])
		},
		ValidArgsFunction: completion.ImageNames(dockerCLI, 1),
	}
	flags := cmd.Flags()
	opts.install(flags, torrent)
	flags.DurationVar(&opts.duration, "duration", 0, "Go on giving the image to peers for this long after the pull")
	flags.BoolVar(&opts.noSeed, "no-seed", false, "Give nothing to peers, not even while pulling")
	flags.StringVar(&opts.torrents, "torrents", string(fetcher.TorrentsAuto), "When published torrents are used: "+strings.Join(fetcher.TorrentPolicies(), ", "))
	flags.StringArrayVar(&opts.trackers, "tracker", nil, "Ask this tracker, by its announce `URL`, instead of those of published torrents (repeatable)")
	flags.StringVar(&opts.to, "to", "auto", "Where the image goes: auto, docker, classic, load, containerd[:namespace], store")
	flags.StringVar(&opts.lazy, "lazy", string(target.AutoLazy), "What becomes of lazily mounted layers: auto, keep, never")
	flags.StringVar(&opts.containerdAddress, "containerd-address", "", "The `socket` of containerd (default: looked for)")
	flags.StringVar(&opts.snapshotter, "snapshotter", "", "The snapshotter to unpack into, with --to containerd (default: the namespace's)")
	opts.complete(cmd)
	registerCompletion(cmd, "torrents", completion.FromList(fetcher.TorrentPolicies()...))
	registerCompletion(cmd, "to", completion.FromList(target.Kinds()...))
	registerCompletion(cmd, "lazy", completion.FromList(string(target.AutoLazy), string(target.KeepLazy), string(target.NeverLazy)))
	registerCompletion(cmd, "containerd-address", completion.FileNames())
	return cmd
}

func runPull(ctx context.Context, dockerCLI command.Cli, o Options, opts pullOptions, image string) error {
	req, err := opts.request(dockerCLI, image)
	if err != nil {
		return status(ctx, err)
	}
	if opts.noSeed && opts.duration > 0 {
		return status(ctx, usageError{errors.New("--no-seed and --duration exclude each other")})
	}
	req.NoSeed = opts.noSeed
	if req.Torrents, err = fetcher.ParseTorrentPolicy(opts.torrents); err != nil {
		return status(ctx, usageError{fmt.Errorf("--torrents: %w", err)})
	}
	if err := fetcher.CheckTrackers(opts.trackers); err != nil {
		return status(ctx, usageError{fmt.Errorf("--tracker: %w", err)})
	}
	req.Trackers = opts.trackers
	switch target.Lazy(opts.lazy) {
	case target.AutoLazy, target.KeepLazy, target.NeverLazy:
	default:
		return status(ctx, usageError{fmt.Errorf("--lazy %q is not one of auto, keep, never", opts.lazy)})
	}
	reporter := newReporter(dockerCLI, opts.mode())
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	return status(ctx, pull(ctx, dockerCLI, o, opts, req, reporter))
}

func pull(ctx context.Context, dockerCLI command.Cli, o Options, opts pullOptions, req Request, reporter *progress.Reporter) (err error) {
	start := time.Now()
	tgt, err := target.Find(ctx, target.Options{
		To: opts.to, ContainerdAddress: opts.containerdAddress, Snapshotter: opts.snapshotter,
		Lazy: target.Lazy(opts.lazy), StoreDir: req.StoreDir, Say: reporter.Say,
		Docker: func() (target.DockerAPI, error) { return dockerCLI.Client(), nil },
	})
	if err != nil {
		return err
	}
	defer closing(tgt, &err)
	req.engine(tgt.Platform())

	src, err := o.Open(ctx, req)
	if err != nil {
		return err
	}
	defer closing(src, &err)
	reporter.Say("Pulling %s into %s, fetched by %s", src.Ref(), tgt, src.Via())
	for _, n := range src.Notes() {
		reporter.Say("Note: %s", n)
	}
	reporter.Start(src.Progress)
	res, err := tgt.Pull(ctx, src)
	reporter.Stop()
	if err != nil {
		return err
	}
	sum := progress.Summary{
		Reference: res.Reference, Digest: src.Target().Digest, Target: tgt.String(), UpToDate: res.UpToDate,
		Duration: time.Since(start), Layers: len(src.Layers()), Lazy: len(res.Lazy), Notes: res.Notes,
	}
	if opts.duration > 0 {
		seedFor(ctx, src, opts.duration, reporter)
	}
	sum.Total = progress.Sum(src.Progress())
	return reporter.Finish(sum)
}

func newReporter(dockerCLI command.Cli, mode progress.Mode) *progress.Reporter {
	return progress.New(progress.Options{
		Mode: mode, Out: dockerCLI.Err(), Data: dockerCLI.Out(), Size: progress.TerminalSize(dockerCLI.Err()),
	})
}

// closing closes c at the end of a function that returns *err; that something failed to close matters only when nothing
// else did.
func closing(c interface{ Close() error }, err *error) {
	if cerr := c.Close(); *err == nil {
		*err = cerr
	}
}
