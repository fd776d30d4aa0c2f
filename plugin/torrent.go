package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

// newQuayctl is quayctl's command of old: `torrent pull` and `torrent seed` with its flags, so that its users' lines go on working.
func newQuayctl(dockerCLI command.Cli, o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:   torrentName,
		Short: "Pull and seed images, with the lines of quayctl",
		Args:  usage(cli.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPull(dockerCLI, o, true), newSeed(dockerCLI, o, true))
	return cmd
}

type torrentOptions struct {
	sourceOptions
	output   string
	trackers []string
	webSeeds []string
	magnet   bool
	private  bool
	chosen   bool // private was given
	format   string
}

// noWebSeed is the --web-seed that stands for none at all.
const noWebSeed = "none"

// newTorrent is the verb `torrent IMAGE`. quayctl's two commands are below it, hidden.
func newTorrent(dockerCLI command.Cli, o Options) *cobra.Command {
	var opts torrentOptions
	cmd := &cobra.Command{
		Use:   torrentName + " [OPTIONS] IMAGE",
		Short: "Write .torrent files of an image's layers, for any BitTorrent client",
		Long: `Write a .torrent file for each layer of an image, and print its name. Any BitTorrent client can
download, check and seed a layer with it; the file that it downloads is named by the layer's digest.

What the store lacks of the image is fetched first. The same layer gives the same infohash on every
machine. The files are named by the first digits of the digest; what is there under such a name is
replaced.

Clients find each other by the trackers that you name, and, for a public image, by the DHT. Layers of an
image that a stranger may not pull become private torrents: no DHT, no peer exchange, no local
discovery, and no tracker but yours. --private and --private=false decide otherwise.

A web seed is a URL of the layer itself, which clients use beside their peers. The default is the
registry's own, where it gives the layer to anybody without a token; most public registries do not.
{digest} in a --web-seed stands for the layer's digest, --web-seed none for no web seed.

` + exitHelp,
		Example: `  # Into this folder
  docker quay torrent quay.io/team/app:1.4

  # With a tracker and a mirror of your own
  docker quay torrent --tracker http://tracker.example:6969/announce \
    --web-seed https://mirror.example/v2/team/app/blobs/{digest} -o torrents quay.io/team/app:1.4

  # Links instead of files
  docker quay torrent --magnet quay.io/team/app:1.4

  # The infohashes, for "docker quay tracker --allow"
  docker quay torrent --format "{{.InfoHash}}" quay.io/team/app:1.4 >allowed`,
		Args: usage(cli.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.chosen = cmd.Flags().Changed("private")
			return runTorrent(cmd.Context(), dockerCLI, o, opts, args[0])
		},
		ValidArgsFunction: completion.ImageNames(dockerCLI, 1),
	}
	flags := cmd.Flags()
	opts.install(flags, false)
	flags.Lookup("quiet").Usage = "Print nothing but the files, or the links"
	flags.StringVarP(&opts.output, "output", "o", ".", "Write the files into this `directory`")
	flags.StringArrayVar(&opts.trackers, "tracker", nil, "A tracker's announce `URL` (http, https, udp; repeatable, asked in this order)")
	flags.StringArrayVar(&opts.webSeeds, "web-seed", nil, "A `URL` of the layer itself, with {digest} in it, or \"none\" (repeatable)")
	flags.BoolVar(&opts.magnet, "magnet", false, "Print magnet links and write no files")
	flags.BoolVar(&opts.private, "private", false, "Keep clients to the trackers (default: for images that are not public)")
	flags.StringVarP(&opts.format, "format", "f", "", "Format each layer by a Go `template`, or \"json\"; {{.Digest}}, {{.Size}}, {{.File}}, {{.InfoHash}}, {{.Magnet}}, {{.PieceLength}}, {{.Trackers}}, {{.WebSeeds}}, {{.Private}}")
	opts.complete(cmd)
	registerCompletion(cmd, "output", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	})

	old := newQuayctl(dockerCLI, o).Commands()
	for _, c := range old {
		c.Hidden = true
	}
	cmd.AddCommand(old...)
	return cmd
}

// usageOf shows help as docker does, but a command with nothing visible below it as the plain command that it is: docker's template
// would list it among those that manage something, and show it as having no arguments.
func usageOf(c *cobra.Command) error {
	for _, sub := range append(slices.Clone(c.Commands()), c) {
		below := sub.Commands()
		if len(below) > 0 && !sub.HasAvailableSubCommands() {
			sub.RemoveCommand(below...)
			defer sub.AddCommand(below...)
		}
	}
	return new(cobra.Command).UsageFunc()(c) // cobra's own, with docker's template
}

func runTorrent(ctx context.Context, dockerCLI command.Cli, o Options, opts torrentOptions, image string) error {
	req, err := opts.request(dockerCLI, image)
	if err != nil {
		return status(ctx, err)
	}
	if opts.magnet && opts.private {
		return status(ctx, errPrivateMagnet)
	}
	reporter := newReporter(dockerCLI, opts.mode())
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	return status(ctx, torrents(ctx, dockerCLI, o, opts, req, reporter))
}

var errPrivateMagnet = usageError{errors.New("a magnet link cannot say that a torrent is private, and clients would ask the DHT for it: write files instead, or use --private=false")}

func torrents(ctx context.Context, dockerCLI command.Cli, o Options, opts torrentOptions, req Request, reporter *progress.Reporter) (err error) {
	src, err := o.Open(ctx, req)
	if err != nil {
		return err
	}
	defer closing(src, &err)
	reporter.Say("Making torrents of %s, fetched by %s", src.Ref(), src.Via())
	for _, n := range src.Notes() {
		reporter.Say("Note: %s", n)
	}
	layers, err := opts.prepare(ctx, o, req, src, reporter)
	if err != nil {
		return err
	}
	if !opts.magnet {
		if err := os.MkdirAll(opts.output, 0o755); err != nil {
			return fmt.Errorf("cannot make the folder for the torrents: %w", err)
		}
	}
	reporter.Start(src.Progress)
	err = src.Fetch(ctx)
	reporter.Stop()
	if err != nil {
		return err
	}
	names := map[string]digest.Digest{}
	for _, l := range layers {
		t, err := opts.make(ctx, src, l, false)
		if err != nil {
			return err
		}
		file := ""
		if !opts.magnet {
			if file, err = writeTorrent(opts.output, t, names); err != nil {
				return err
			}
		}
		if err := opts.print(dockerCLI, t, file); err != nil {
			return err
		}
	}
	return nil
}

// prepare finds out, before anything is fetched, for whom the torrents are, and what is wrong with the flags. It returns the layers that
// torrents are made of.
func (opts *torrentOptions) prepare(ctx context.Context, o Options, req Request, src Source, reporter *progress.Reporter) ([]ocispec.Descriptor, error) {
	layers := distinct(src.Layers(), reporter)
	if len(layers) == 0 {
		return nil, fmt.Errorf("%s has no layers: %w", src.Ref(), fetcher.ErrUnsupported)
	}
	if err := opts.decide(ctx, o, req, src, layers, reporter); err != nil {
		return nil, err
	}
	if _, err := opts.make(ctx, src, layers[0], true); err != nil {
		return nil, usageError{err}
	}
	return layers, nil
}

// distinct are the layers that a torrent can be of, each once.
func distinct(layers []ocispec.Descriptor, reporter *progress.Reporter) []ocispec.Descriptor {
	seen := map[digest.Digest]bool{}
	var out []ocispec.Descriptor
	for _, l := range layers {
		switch {
		case seen[l.Digest]:
		case l.Size == 0:
			reporter.Say("Note: the layer %s is empty and has no torrent", l.Digest)
		default:
			out = append(out, l)
		}
		seen[l.Digest] = true
	}
	return out
}

// decide fills what the user left open, private and web seeds, with what a stranger gets of the image.
func (opts *torrentOptions) decide(ctx context.Context, o Options, req Request, src Source, layers []ocispec.Descriptor, reporter *progress.Reporter) error {
	var s Stranger
	err := errors.New("it was not asked")
	if o.Stranger != nil {
		s, err = o.Stranger(ctx, req, src.Manifest().Digest, layers[0].Digest)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if !opts.chosen {
		opts.private = !s.Public
		switch {
		case err != nil:
			reporter.Say("Note: it is not known whether the image is public, so the torrents are private: %v", err)
		case opts.private:
			reporter.Say("Note: the image is not public, so the torrents are private")
		}
	}
	switch {
	case len(opts.webSeeds) == 0 && s.Public && s.WebSeed != "":
		opts.webSeeds = []string{s.WebSeed}
	case len(opts.webSeeds) == 1 && opts.webSeeds[0] == noWebSeed:
		opts.webSeeds = nil
	}
	switch {
	case opts.private && opts.magnet:
		return errPrivateMagnet
	case opts.private && len(opts.trackers) == 0 && len(opts.webSeeds) == 0:
		return usageError{errors.New("clients of a private torrent find each other by its trackers alone: name one with --tracker, such as your own (see \"docker quay tracker\")")}
	case len(opts.trackers) == 0:
		reporter.Say("Note: without a --tracker clients find each other by the DHT alone, which takes minutes")
	}
	return nil
}

// digestPlace in a --web-seed is where the layer's digest goes.
const digestPlace = "{digest}"

// make makes the torrent of a layer; with try it only checks the options.
func (opts *torrentOptions) make(ctx context.Context, src Source, l ocispec.Descriptor, try bool) (*published.Torrent, error) {
	o := published.MakeOptions{
		Layer: l, Trackers: opts.trackers, Private: opts.private, CreatedBy: "docker-quay/" + fetcher.Version,
		Open: func(ctx context.Context) (io.ReadCloser, error) { return src.Open(ctx, l) },
	}
	for _, u := range opts.webSeeds {
		if !strings.Contains(u, digestPlace) {
			return nil, usageError{fmt.Errorf("--web-seed %s: %s must be in it, each layer has a URL of its own", u, digestPlace)}
		}
		o.WebSeeds = append(o.WebSeeds, strings.ReplaceAll(u, digestPlace, l.Digest.String()))
	}
	if try {
		return nil, o.Check()
	}
	return published.Make(ctx, o)
}

// writeTorrent writes the file at once or not at all, and returns its name. names are those that are taken, by whom.
func writeTorrent(dir string, t *published.Torrent, names map[string]digest.Digest) (string, error) {
	const short = 12 // as docker shows digests
	name := t.Layer.Digest.Encoded()[:short]
	if _, taken := names[name]; taken {
		name = published.LayerName(t.Layer.Digest)
	}
	names[name] = t.Layer.Digest
	file := filepath.Join(dir, name+".torrent")
	fail := func(err error) (string, error) { return "", fmt.Errorf("cannot write the torrent %s: %w", file, err) }
	f, err := os.CreateTemp(dir, "."+name+".*")
	if err != nil {
		return fail(err)
	}
	defer os.Remove(f.Name()) // nothing is there under this name once it is renamed
	_, err = f.Write(t.Encode())
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return fail(err)
	}
	return file, nil
}

// torrentResult is what --format can show.
type torrentResult struct {
	Digest      digest.Digest
	Size        int64  // of the layer, in bytes
	File        string // "" with --magnet
	InfoHash    string // 40 hex digits
	Magnet      string // "" of a private torrent
	PieceLength int64  // in bytes
	Trackers    []string
	WebSeeds    []string
	Private     bool
}

func (opts *torrentOptions) print(dockerCLI command.Cli, t *published.Torrent, file string) error {
	r := torrentResult{
		Digest: t.Layer.Digest, Size: t.Layer.Size, File: file, InfoHash: t.InfoHash.HexString(), PieceLength: t.Info.PieceLength,
		Trackers: opts.trackers, WebSeeds: t.WebSeeds, Private: t.Private,
	}
	if !t.Private {
		r.Magnet = t.Magnet()
	}
	format := opts.format
	switch {
	case format != "":
	case opts.magnet:
		format = "{{.Magnet}}"
	default:
		format = "{{.File}}"
	}
	if opts.format == "" && !opts.quiet {
		fmt.Fprintf(dockerCLI.Err(), "%s: %s, infohash %s\n", r.Digest, units.HumanSize(float64(r.Size)), r.InfoHash)
	}
	return printFormatted(dockerCLI, format, r)
}
