package plugin

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

type seedOptions struct {
	sourceOptions
	publish  bool
	trackers []string
	webSeeds []string
}

// uploadEvery is how often it is told what was uploaded, if that changed: one line a minute is what a log can bear.
const uploadEvery = time.Minute

func newSeed(dockerCLI command.Cli, o Options, torrent bool) *cobra.Command {
	var opts seedOptions
	cmd := &cobra.Command{
		Use:   "seed [OPTIONS] IMAGE",
		Short: "Give an image to peers",
		Long: `Give the layers of an image to the other nodes of the cluster, until --duration has passed or
the command is interrupted.

What the store lacks of the image is fetched first. No engine is needed, and none gets the
image. Being interrupted while seeding is the ordinary end and no failure.

With --publish the layers become torrents as "docker quay torrent" makes them, with your --tracker and
--web-seed. They are stored beside the image in its registry, with your login, where "docker quay pull"
finds them, and the layers are given to anybody's BitTorrent clients, too, not only to nodes with the
cluster's secret. Layers of an image that a stranger may not pull stay with the trackers that you name.

` + exitHelp,
		Example: `  # Until Ctrl-C
  docker quay seed quay.io/team/app:1.4

  # For an hour, with at most 10 MiB a second
  docker quay seed --duration 1h --upload-rate 10MiB quay.io/team/app:1.4

  # For everybody who may read the image in its registry
  docker quay seed --publish --tracker http://tracker.example:6969/announce quay.io/team/app:1.4`,
		Args: usage(cli.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runSeed(cmd.Context(), dockerCLI, o, opts, args[0])
		},
		ValidArgsFunction: completion.ImageNames(dockerCLI, 1),
	}
	opts.install(cmd.Flags(), torrent)
	cmd.Flags().DurationVar(&opts.duration, "duration", 0, "Seed for this long once all is here (default: until interrupted)")
	cmd.Flags().BoolVar(&opts.publish, "publish", false, "Store torrents of the layers beside the image and give them to anybody")
	cmd.Flags().StringArrayVar(&opts.trackers, "tracker", nil, "With --publish, a tracker's announce `URL` (http, https, udp; repeatable, asked in this order)")
	cmd.Flags().StringArrayVar(&opts.webSeeds, "web-seed", nil, "With --publish, a `URL` of the layer itself, with {digest} in it, or \"none\" (repeatable)")
	opts.complete(cmd)
	return cmd
}

func runSeed(ctx context.Context, dockerCLI command.Cli, o Options, opts seedOptions, image string) error {
	req, err := opts.request(dockerCLI, image)
	if err != nil {
		return status(ctx, err)
	}
	if !opts.publish && (len(opts.trackers) > 0 || len(opts.webSeeds) > 0) {
		return status(ctx, usageError{errors.New("--tracker and --web-seed are of torrents: they need --publish")})
	}
	req.Seed, req.Torrents = true, fetcher.TorrentsNever
	reporter := newReporter(dockerCLI, opts.mode())
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	return status(ctx, seed(ctx, o, opts, req, reporter))
}

func seed(ctx context.Context, o Options, opts seedOptions, req Request, reporter *progress.Reporter) (err error) {
	start := time.Now()
	src, err := o.Open(ctx, req)
	if err != nil {
		return err
	}
	defer closing(src, &err)
	reporter.Say("Seeding %s by %s", src.Ref(), src.Via())
	for _, n := range src.Notes() {
		reporter.Say("Note: %s", n)
	}
	t := torrentOptions{trackers: opts.trackers, webSeeds: opts.webSeeds}
	var layers []ocispec.Descriptor
	if opts.publish {
		if layers, err = t.prepare(ctx, o, req, src, reporter); err != nil {
			return err
		}
	}
	reporter.Start(src.Progress)
	err = src.Fetch(ctx)
	reporter.Stop()
	if err != nil {
		return err
	}
	if opts.publish {
		if err := t.publish(ctx, o, req, src, layers, reporter); err != nil {
			return err
		}
	}
	seedFor(ctx, src, opts.duration, reporter)
	return reporter.Finish(progress.Summary{
		Reference: src.Ref().String(), Digest: src.Target().Digest, Duration: time.Since(start),
		Total: progress.Sum(src.Progress()), Layers: len(src.Layers()), Seeded: true,
	})
}

// seedFor keeps src open for d, or until ctx ends when d is 0, and tells what was uploaded. That ctx ended is no error
// here: what could be done was done.
func seedFor(ctx context.Context, src Source, d time.Duration, reporter *progress.Reporter) {
	until := "until interrupted"
	var over <-chan time.Time
	if d > 0 {
		until = fmt.Sprintf("for %s", d)
		t := time.NewTimer(d)
		defer t.Stop()
		over = t.C
	}
	reporter.Say("All of %s is here: giving it to peers %s", src.Ref(), until)
	tell := time.NewTicker(uploadEvery)
	defer tell.Stop()
	var told int64
	for {
		select {
		case <-ctx.Done():
			return
		case <-over:
			return
		case <-tell.C:
			if sum := progress.Sum(src.Progress()); sum.Uploaded != told {
				told = sum.Uploaded
				reporter.Say("Uploaded %s, %d peers", units.HumanSize(float64(told)), sum.Peers)
			}
		}
	}
}
