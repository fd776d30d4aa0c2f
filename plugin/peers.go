package plugin

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

type peersOptions struct {
	socket   string
	format   string
	platform string
	insecure bool
	noTrunc  bool
	watch    bool
}

const (
	// watchEvery is how often --watch asks: rates are over whole seconds.
	watchEvery = time.Second
	// shortID is how many digits of an ID are shown, as docker does.
	shortID = 12
)

func newPeers(dockerCLI command.Cli) *cobra.Command {
	var opts peersOptions
	cmd := &cobra.Command{
		Use:   "peers [OPTIONS] [IMAGE|DIGEST]",
		Short: "Show the other nodes, and what passes between them",
		Long: `Show what the node daemon knows of the other nodes of its cluster, and of the blobs that it fetches and
shares: how much is here, who else holds it, how fast it comes and goes, and who gets which part of it
from the registry.

With an IMAGE or the DIGEST of a layer only those blobs are shown, also when they merely lie in the node's
store. What an image's layers are is asked of its registry, as in a pull.

The columns of a blob:
  HOLDERS   nodes that have all of it + nodes that are getting it, as its keeper knows
  DOWN, UP  bytes a second over the last five seconds
  PEERS     the part of it that came to this node from peers
  LENT      segments (4 MiB) that nodes got from the registry: in all, and of these this node now
  SAVED     how many times it did not have to come from the registry, in the whole cluster
  KEEPER    the node that keeps the list of who has it

Exit codes:
    0  done, or interrupted with --watch
    1  any other failure
    3  the registry has no such image, or not for this platform
    4  no access to the image: log in with "docker login"
    5  no node daemon answers, or the registry does not
  125  wrong usage
  130  interrupted`,
		Example: `  docker quay peers
  docker quay peers --watch quay.io/team/app:1.4

  # In a script
  docker quay peers --format '{{len .Members}}'
  docker quay peers --format 'table {{.Digest}}\t{{.Rates}}'
  docker quay peers --format json`,
		Args: usage(cli.RequiresMaxArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPeers(cmd.Context(), dockerCLI, opts, args)
		},
		ValidArgsFunction: completion.ImageNames(dockerCLI, 1),
	}
	flags := cmd.Flags()
	flags.StringVarP(&opts.format, "format", "f", "", `Format the output: "table" (the default), "json", "table TEMPLATE" with a Go template for each blob, or a Go template for all`)
	flags.StringVar(&opts.socket, "socket", defaultSocket, "The node daemon's `socket`")
	flags.StringVar(&opts.platform, "platform", "", "Choose the image of this platform (`os/arch[/variant]`; default: the node's)")
	flags.BoolVar(&opts.insecure, "insecure", false, "Allow the registry plain HTTP and a certificate that cannot be verified")
	flags.BoolVar(&opts.noTrunc, "no-trunc", false, "Show IDs and digests in full")
	flags.BoolVar(&opts.watch, "watch", false, "Show it again each second, until interrupted")
	registerCompletion(cmd, "socket", completion.FileNames())
	registerCompletion(cmd, "platform", completion.Platforms())
	return cmd
}

func runPeers(ctx context.Context, dockerCLI command.Cli, opts peersOptions, args []string) error {
	reporter := newReporter(dockerCLI, progress.Quiet)
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	err := peers(ctx, dockerCLI, opts, args)
	if opts.watch && ctx.Err() != nil {
		return nil // the ordinary end
	}
	return status(ctx, err)
}

func peers(ctx context.Context, dockerCLI command.Cli, opts peersOptions, args []string) (err error) {
	c, _, err := api.Dial(ctx, opts.socket)
	if nobodyThere(err) {
		return fmt.Errorf("no node daemon answers at %s, and only one that runs has peers: start containerd-quay-grpc, or name its --socket: %w", opts.socket, err)
	}
	if err != nil {
		return err
	}
	defer closing(c, &err)
	var blobs []digest.Digest
	if len(args) == 1 {
		if blobs, err = opts.blobs(ctx, dockerCLI, c, args[0]); err != nil {
			return err
		}
	}
	for {
		r, err := c.Peers(ctx, blobs...)
		if err != nil {
			return err
		}
		var out bytes.Buffer
		if err := opts.print(&out, r, len(args) == 1); err != nil {
			return err
		}
		if opts.watch && dockerCLI.Out().IsTerminal() {
			fmt.Fprint(dockerCLI.Out(), "\x1b[H\x1b[J") // home, and erase what is below (ECMA-48)
		}
		if _, err := out.WriteTo(dockerCLI.Out()); err != nil || !opts.watch {
			return err
		}
		t := time.NewTimer(watchEvery)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
}

// blobs are the layers that the argument means.
func (opts *peersOptions) blobs(ctx context.Context, dockerCLI command.Cli, c *api.Client, arg string) ([]digest.Digest, error) {
	if d, err := digest.Parse(arg); err == nil {
		return []digest.Digest{d}, nil
	}
	ref, err := reference.ParseNormalizedNamed(arg)
	if err != nil {
		return nil, usageError{fmt.Errorf("%q is neither the name of an image nor a digest: %w", arg, err)}
	}
	ref = reference.TagNameOnly(ref)
	req := api.ImageRequest{Ref: ref.String(), Insecure: opts.insecure, Offline: true}
	if opts.platform != "" {
		if req.Platform, err = platforms.Parse(opts.platform); err != nil {
			return nil, usageError{fmt.Errorf("--platform %q: %w", opts.platform, err)}
		}
	}
	dir := ""
	if f := dockerCLI.ConfigFile(); f != nil && f.Filename != "" {
		dir = dirOf(f.Filename)
	}
	login, err := loginOf(dir, reference.Domain(ref))
	if err != nil {
		return nil, err
	}
	if login != (api.Credential{}) {
		req.Credentials = map[string]api.Credential{reference.Domain(ref): login}
	}
	s, err := c.Image(ctx, req)
	if err != nil {
		return nil, err
	}
	_ = s.Close()
	var blobs []digest.Digest
	for _, l := range s.Image.Layers {
		if len(blobs) < fetcher.MaxReportDigests {
			blobs = append(blobs, l.Digest)
		}
	}
	if len(blobs) == 0 {
		return nil, fmt.Errorf("%s has no layers: %w", ref, fetcher.ErrUnsupported)
	}
	return blobs, nil
}

// print shows a report as --format says; named tells that blobs were asked for.
func (opts *peersOptions) print(w io.Writer, r fetcher.Report, named bool) error {
	switch format := formatter.Format(opts.format); {
	case opts.format == "" || opts.format == formatter.TableFormatKey:
		return opts.tables(w, r, named)
	case format.IsTable():
		return opts.blobTable(w, opts.format, r)
	default:
		return writeFormatted(w, opts.format, r)
	}
}

// tables shows all of a report to a person.
func (opts *peersOptions) tables(w io.Writer, r fetcher.Report, named bool) error {
	if !named {
		if r.Node.ID == "" {
			fmt.Fprintln(w, "This node has no cluster secret, and so no peers: make one with \"docker quay node secret\".")
		} else {
			fmt.Fprintf(w, "Node %s at %s%s\n", opts.id(r.Node.ID), orUnknown(r.Node.Addr), inZone(r.Node.Zone))
		}
		if err := opts.memberTables(w, r); err != nil {
			return err
		}
	}
	switch {
	case len(r.Blobs) > 0:
		if !named {
			fmt.Fprintln(w)
		}
		if err := opts.blobTable(w, blobFormat, r); err != nil {
			return err
		}
	case named:
		fmt.Fprintln(w, "This node has nothing of it.")
	}
	if r.BlobsLeft > 0 {
		fmt.Fprintf(w, "and %d more, less active\n", r.BlobsLeft)
	}
	return opts.faultTable(w, r)
}

func (opts *peersOptions) memberTables(w io.Writer, r fetcher.Report) error {
	if len(r.Members) > 0 {
		fmt.Fprintln(w)
		rows := make([][]string, len(r.Members))
		for i, m := range r.Members {
			rows[i] = []string{opts.id(m.ID), m.Addr, orNone(m.Zone), roles(m)}
		}
		if err := table(w, []string{"MEMBER", "ADDRESS", "ZONE", "ROLES"}, rows); err != nil {
			return err
		}
	}
	if r.MembersLeft > 0 {
		fmt.Fprintf(w, "and %d more\n", r.MembersLeft)
	}
	if len(r.Silent) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	rows := make([][]string, len(r.Silent))
	for i, s := range r.Silent {
		why := s.Reason
		if s.Foreign {
			why = "it has another cluster secret"
		}
		rows[i] = []string{printable(s.Peer), printable(why)}
	}
	return table(w, []string{"SILENT PEER", "REASON"}, rows)
}

// faultTable shows whom the node keeps away from, and what it waits for.
func (opts *peersOptions) faultTable(w io.Writer, r fetcher.Report) error {
	var rows [][]string
	for _, b := range r.Blobs {
		d := opts.digest(b.Digest)
		for _, p := range b.Banned {
			rows = append(rows, []string{d, opts.id(p.ID), "banned: " + banText(p.Reason)})
		}
		for _, id := range b.Doubted {
			rows = append(rows, []string{d, opts.id(id), "doubted: it does not deliver what it claims to hold"})
		}
		if b.Note != "" {
			rows = append(rows, []string{d, "-", printable(b.Note)})
		}
	}
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	return table(w, []string{"BLOB", "PEER", "TROUBLE"}, rows)
}

func banText(why fetcher.BanReason) string {
	switch why {
	case fetcher.WrongBytes:
		return "it sent wrong bytes"
	case fetcher.FalseTable:
		return "it signed for content that is not so"
	case fetcher.Disputed:
		return "what it sends is not what others signed"
	}
	return printable(string(why))
}

func roles(m fetcher.NodeReport) string {
	var rs []string
	if m.Registry {
		rs = append(rs, "registry")
	}
	if m.Passing {
		rs = append(rs, "passing")
	}
	return orNone(strings.Join(rs, ","))
}

func (opts *peersOptions) id(s string) string {
	if opts.noTrunc || len(s) <= shortID {
		return s
	}
	return s[:shortID]
}

func (opts *peersOptions) digest(d digest.Digest) string {
	if opts.noTrunc {
		return d.String()
	}
	return opts.id(d.Encoded())
}

func orNone(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func orUnknown(s string) string {
	if s == "" {
		return "an address that is not known yet"
	}
	return s
}

func inZone(z string) string {
	if z == "" {
		return ""
	}
	return ", zone " + z
}

// printable drops what a terminal would act on: these words may be another machine's.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

// table writes rows of text below their heads.
func table(w io.Writer, heads []string, rows [][]string) error {
	header := formatter.SubHeaderContext{}
	format := "table"
	for i, h := range heads {
		key := fmt.Sprintf("C%d", i)
		header[key] = h
		if i == 0 {
			format += " "
		} else {
			format += `\t`
		}
		format += "{{." + key + "}}"
	}
	c := formatter.Context{Output: w, Format: formatter.Format(format)}
	return c.Write(&formatter.HeaderContext{Header: header}, func(add func(formatter.SubContext) error) error {
		for _, r := range rows {
			row := rowContext{}
			for i, cell := range r {
				row[fmt.Sprintf("C%d", i)] = cell
			}
			if err := add(row); err != nil {
				return err
			}
		}
		return nil
	})
}

type rowContext map[string]string

// FullHeader implements formatter.SubContext.
func (rowContext) FullHeader() any { return nil }

func rate(n int64) string {
	if n == 0 {
		return "-"
	}
	return units.HumanSize(float64(n)) + "/s"
}

func percent(part float64) string { return fmt.Sprintf("%d%%", int(min(part, 1)*100)) }
