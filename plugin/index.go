package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

type indexOptions struct {
	sourceOptions
	all    bool
	output string
	format string
}

func newIndex(dockerCLI command.Cli, o Options) *cobra.Command {
	var opts indexOptions
	cmd := &cobra.Command{
		Use:   "index [OPTIONS] IMAGE",
		Short: "Publish indexes of an image's layers, so that it starts before it is there",
		Long: `Make an index of each layer of an image, and put the indexes beside the image in its registry, with your
login, as an OCI referrer. The image and its digest stay as they are.

An index says what files a layer has, and where in it they are. With it a node whose snapshotter is "quay"
starts containers of an image in plain gzip, zstd or tar before its layers are there, from the very first
pull on. Nodes find it by themselves; who may pull the image may read it.

An index can also say what containers read first, and then has places to begin reading there. It does when a node daemon
fetches for this command, all of the image is on that node, and a container of it has run there.

What the store lacks of the image is fetched first, for all its platforms or for that of --platform. Run
it after each push, as the last step of a build. Indexes that are published already are not pushed
again. A layer that brings a table of contents along (eStargz, zstd:chunked) is left out, because nodes use
that; --all does not. A layer that cannot be indexed is left out, too, and said.

` + exitHelp,
		Example: `  # After a push
  docker push quay.io/team/app:1.4
  docker quay index quay.io/team/app:1.4

  # One platform of several
  docker quay index --platform linux/arm64 quay.io/team/app:1.4

  # See how large they are, and publish nothing
  docker quay index -o indexes quay.io/team/app:1.4

  # In a script
  docker quay index -q quay.io/team/app:1.4
  docker quay index --format "{{.Digest}} {{.IndexSize}}" quay.io/team/app:1.4`,
		Args: usage(cli.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runIndex(cmd.Context(), dockerCLI, o, opts, args[0])
		},
		ValidArgsFunction: completion.ImageNames(dockerCLI, 1),
	}
	flags := cmd.Flags()
	opts.install(flags, false)
	flags.Lookup("platform").Usage = "Index the image of this platform only (`os/arch[/variant]`; default: of all)"
	flags.Lookup("quiet").Usage = "Print nothing but the references of what is published, or the files"
	flags.BoolVar(&opts.all, "all", false, "Index also layers that bring a table of contents along")
	flags.StringVarP(&opts.output, "output", "o", "", "Write the indexes into this `directory`, and publish nothing")
	flags.StringVarP(&opts.format, "format", "f", "", `Format each layer by a Go `+"`template`"+`, or "json"; {{.Platform}}, {{.Manifest}}, {{.Digest}}, {{.Size}}, {{.DiffID}}, {{.Kind}}, {{.Index}}, {{.IndexSize}}, {{.Entries}}, {{.Referrer}}, {{.Pushed}}, {{.File}}, {{.Note}}`)
	opts.complete(cmd)
	registerCompletion(cmd, "output", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	})
	return cmd
}

func runIndex(ctx context.Context, dockerCLI command.Cli, o Options, opts indexOptions, image string) error {
	req, err := opts.request(dockerCLI, image)
	if err != nil {
		return status(ctx, err)
	}
	req.Torrents = fetcher.TorrentsNever
	reporter := newReporter(dockerCLI, opts.mode())
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	ix := &indexer{o: o, opts: opts, reporter: reporter, made: map[digest.Digest]*madeIndex{}}
	err = ix.images(ctx, req)
	reporter.Stop()
	// What was published before something failed is published.
	if perr := ix.print(dockerCLI, req.Ref); err == nil {
		err = perr
	}
	return status(ctx, err)
}

// indexResult is what --format can show of a layer.
type indexResult struct {
	Platform string        // of the image, as its configuration has it
	Manifest digest.Digest // of the image for the platform: what the indexes are published beside
	Digest   digest.Digest
	Size     int64  // of the layer, in bytes
	Kind     string // tar, gzip, zstd, eStargz, zstd:chunked; "" when it could not be found out
	DiffID   digest.Digest

	Index     digest.Digest // "" when there is none
	IndexSize int64         // in bytes
	Entries   int           // files, directories, links
	Note      string        // why there is no index, or what else is in it

	Referrer digest.Digest // "" when nothing is published
	Pushed   bool          // not when it was there
	File     string        // with --output
}

// print shows all results: a table for a person.
func (ix *indexer) print(dockerCLI command.Cli, ref reference.Named) error {
	format := ix.opts.format
	if format == "" && ix.reporter.Mode() == progress.JSON {
		format = "json"
	}
	switch {
	case format != "":
		for _, r := range ix.results {
			if err := printFormatted(dockerCLI, format, r); err != nil {
				return err
			}
		}
		return nil
	case ix.opts.quiet:
		said := map[string]bool{"": true}
		for _, r := range ix.results {
			name := r.File
			if r.Referrer != "" {
				name = reference.TrimNamed(ref).String() + "@" + r.Referrer.String()
			}
			if !said[name] {
				said[name] = true
				fmt.Fprintln(dockerCLI.Out(), name)
			}
		}
		return nil
	case len(ix.results) == 0:
		return nil
	}
	rows := make([][]string, len(ix.results))
	for i, r := range ix.results {
		rows[i] = []string{printable(r.Platform), r.Digest.Encoded()[:shortID], orNone(r.Kind), units.HumanSize(float64(r.Size)), "-", "-", "-", orNone(printable(r.Note))}
		if r.Index != "" {
			rows[i][4] = units.HumanSize(float64(r.IndexSize))
			rows[i][5] = fmt.Sprintf("%.2f%%", 100*float64(r.IndexSize)/float64(r.Size))
			rows[i][6] = fmt.Sprint(r.Entries)
		}
	}
	return table(dockerCLI.Out(), []string{"PLATFORM", "LAYER", "KIND", "SIZE", "INDEX", "SHARE", "ENTRIES", "NOTE"}, rows)
}

// indexer makes and publishes the indexes of an image, platform by platform.
type indexer struct {
	o        Options
	opts     indexOptions
	reporter *progress.Reporter
	made     map[digest.Digest]*madeIndex // by layer: platforms share layers
	results  []indexResult
	may      bool // push to the repository
	refused  int  // layers that cannot be indexed
	useful   int  // layers that nodes can read before they are there
}

// images indexes what a name stands for: an image, or one for each platform.
func (ix *indexer) images(ctx context.Context, req Request) error {
	if ix.opts.format != "" {
		// What is wrong with it is said before anything is fetched.
		if err := writeFormatted(io.Discard, ix.opts.format, indexResult{}); err != nil {
			return err
		}
	}
	if req.Platform != nil {
		if err := ix.image(ctx, req); err != nil {
			return err
		}
		return ix.judge(req)
	}
	manifests, err := ix.o.Manifests(ctx, req)
	if err != nil {
		return err
	}
	var unfit error
	for _, m := range manifests {
		one := req
		if one.Ref, err = reference.WithDigest(reference.TrimNamed(req.Ref), m.Digest); err != nil {
			return fmt.Errorf("%s names a manifest %q: %w", req.Ref, m.Digest, err)
		}
		err := ix.image(ctx, one)
		switch {
		case errors.Is(err, fetcher.ErrUnsupported) && len(manifests) > 1:
			// Other artifacts may be listed among the platforms.
			ix.reporter.Say("Note: %v", err)
			unfit = err
		case err != nil:
			return err
		}
	}
	if len(ix.results) == 0 {
		if unfit == nil {
			unfit = fmt.Errorf("%s has no image for any platform: %w", req.Ref, fetcher.ErrUnsupported)
		}
		return unfit
	}
	return ix.judge(req)
}

// judge makes a failure of it when no layer has become of any use.
func (ix *indexer) judge(req Request) error {
	if ix.refused > 0 && ix.useful == 0 {
		return fmt.Errorf("no layer of %s can be indexed: %w", req.Ref, fetcher.ErrUnsupported)
	}
	return nil
}
