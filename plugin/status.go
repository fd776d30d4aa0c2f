package plugin

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/docker/cli/cli/command/formatter"
	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

type statusOptions struct {
	socket  string
	format  string
	noTrunc bool
}

func newStatus(dockerCLI command.Cli) *cobra.Command {
	var opts statusOptions
	cmd := &cobra.Command{
		Use:   "status [OPTIONS]",
		Short: "Show how the node daemon does: how layers are mounted, and how much of each is here",
		Long: `Show what the node daemon has and does: how it mounts layers and why in that way, each layer and how much of
it is here, what it fetches, and what its store takes.

How layers are mounted:
  erofs    by the kernel, from files; containers outlive the daemon
  loop     the same by way of loop devices, on kernels before Linux 6.12
  fuse     by the daemon: containers on layers that are not complete need it
  unpack   not at all: containerd unpacks them

The columns of a layer:
  STATE    lazy: bytes are missing, and come when they are read; unchecked: all is here, and its index, which
           somebody published, has still to be compared with it; complete; forged: its index was false, and no
           container starts from it
  HAVE     the part of its contents that is here
  MOUNTS   its mounts, and how many of them read by way of the daemon
  READERS  mounts and running containers that read by way of the daemon

Exit codes:
    0  done
    1  any other failure
    5  no node daemon answers
  125  wrong usage
  130  interrupted`,
		Example: `  docker quay status

  # In a script
  docker quay status --format '{{.Layers.Mount}}'
  docker quay status --format 'table {{.Digest}}\t{{.State}}\t{{.Have}}'
  docker quay status --format json`,
		Args: usage(cli.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runStatus(cmd.Context(), dockerCLI, opts)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags := cmd.Flags()
	flags.StringVarP(&opts.format, "format", "f", "", `Format the output: "table" (the default), "json", "table TEMPLATE" with a Go template for each layer, or a Go template for all`)
	flags.StringVar(&opts.socket, "socket", defaultSocket, "The node daemon's `socket`")
	flags.BoolVar(&opts.noTrunc, "no-trunc", false, "Show IDs and digests in full")
	registerCompletion(cmd, "socket", completion.FileNames())
	return cmd
}

func runStatus(ctx context.Context, dockerCLI command.Cli, opts statusOptions) error {
	reporter := newReporter(dockerCLI, progress.Quiet)
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	st, err := opts.ask(ctx)
	if err == nil {
		err = opts.print(dockerCLI.Out(), st)
	}
	return status(ctx, err)
}

func (opts *statusOptions) ask(ctx context.Context) (st api.Status, err error) {
	c, _, err := api.Dial(ctx, opts.socket)
	if nobodyThere(err) {
		return st, fmt.Errorf("no node daemon answers at %s: start containerd-quay-grpc, or name its --socket: %w", opts.socket, err)
	}
	if err != nil {
		return st, err
	}
	defer closing(c, &err)
	return c.StatusOfLayers(ctx)
}

// print shows a status as --format says.
func (opts *statusOptions) print(w io.Writer, st api.Status) error {
	switch format := formatter.Format(opts.format); {
	case opts.format == "" || opts.format == formatter.TableFormatKey:
		opts.summary(w, st)
		if st.Layers == nil || len(st.Layers.List) == 0 {
			return nil
		}
		fmt.Fprintln(w)
		return opts.layerTable(w, layerFormat, st.Layers.List)
	case format.IsTable():
		var list []api.Layer
		if st.Layers != nil {
			list = st.Layers.List
		}
		return opts.layerTable(w, opts.format, list)
	default:
		return writeFormatted(w, opts.format, st)
	}
}

// summary is what a person sees of a node, a line for each part.
func (opts *statusOptions) summary(w io.Writer, st api.Status) {
	line := func(what, format string, args ...any) {
		fmt.Fprintf(w, "%-13s%s\n", what+":", printable(fmt.Sprintf(format, args...)))
	}
	line("Daemon", "%s at %s", st.Version, opts.socket)
	if st.NodeID == "" {
		line("Node", "without a cluster secret, and so without peers")
	} else {
		short := peersOptions{noTrunc: opts.noTrunc}
		line("Node", "%s at %s, %s", short.id(st.NodeID), orUnknown(st.Addr), count(len(st.Peers), "other node"))
	}
	line("Snapshotter", "%s", orOff(st.Snapshotter))
	line("Mirror", "%s", orOff(st.Mirror))
	switch l := st.Layers; {
	case l == nil:
		line("Mounted by", "not known yet: the daemon is starting")
	case l.Mount == "unpack" || l.Mount == "fuse":
		line("Mounted by", "%s: %s", l.Mount, l.Why)
		line("Mounts", "%d", l.Mounts)
	default:
		line("Mounted by", "%s: %s", l.Mount, l.Why)
		line("Mounts", "%d, %d of them by way of the daemon", l.Mounts, l.Mounts-l.Direct)
		line("Layers", "%d, %d of them complete, %s", l.Stored, l.Complete, ofQuota(l.Bytes, l.Quota))
		line("Reads", "%d answered by the daemon, %d failed, %d waiting", l.Reads, l.ReadErrors, l.ReadsWaiting)
	}
	line("Store", "%s, %s", count(st.Store.Blobs, "blob"), ofQuota(st.Store.Bytes+st.Store.Reserved, st.Store.Quota))
	f := st.Fetcher
	line("Fetcher", "%s on the way here, %d shared%s", count(f.Fetches, "blob"), f.Shared, trouble(f))
	line("Received", "%s from registries, %s from other nodes; %s were here", size(f.FromOrigin), size(f.FromPeers), size(f.FromCache))
	line("Given", "%s to other nodes", size(f.Uploaded))
}

// trouble is what is wrong with a fetcher; "" when nothing is.
func trouble(f api.Fetching) string {
	var parts []string
	if f.FailedReads > 0 {
		parts = append(parts, fmt.Sprintf("%d reads failed", f.FailedReads))
	}
	if f.RegistriesPaused > 0 {
		parts = append(parts, count(f.RegistriesPaused, "registry", "registries")+" left alone for now, as asked")
	}
	if parts == nil {
		return ""
	}
	return "; " + strings.Join(parts, ", ")
}

func ofQuota(bytes, quota int64) string {
	if quota == 0 {
		return size(bytes) + " on disk, no quota"
	}
	return fmt.Sprintf("%s on disk of a quota of %s", size(bytes), size(quota))
}

// count is a number of things, in words: their plural has an s unless it is given.
func count(n int, one string, many ...string) string {
	switch {
	case n == 1:
		return "1 " + one
	case len(many) > 0:
		return fmt.Sprintf("%d %s", n, many[0])
	}
	return fmt.Sprintf("%d %ss", n, one)
}

func size(n int64) string { return units.HumanSize(float64(n)) }

func orOff(s string) string {
	if s == "" {
		return "off"
	}
	return s
}

// layerFormat are the columns for a person.
const layerFormat = `table {{.Digest}}\t{{.State}}\t{{.Size}}\t{{.Have}}\t{{.Mounts}}\t{{.Readers}}\t{{.Image}}`

// layerTable writes a row for each layer.
func (opts *statusOptions) layerTable(w io.Writer, format string, layers []api.Layer) error {
	head := &layerContext{}
	head.Header = formatter.SubHeaderContext{
		"Digest": "LAYER", "State": "STATE", "Size": "SIZE", "Have": "HAVE", "Disk": "DISK", "Mounts": "MOUNTS", "Readers": "READERS",
		"Image": "IMAGE", "Why": "WHY",
	}
	c := formatter.Context{Output: w, Format: formatter.Format(format)}
	err := c.Write(head, func(add func(formatter.SubContext) error) error {
		for i := range layers {
			if err := add(&layerContext{o: opts, l: &layers[i]}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return usageError{fmt.Errorf("--format: %w", err)}
	}
	return nil
}

// layerContext is a layer as templates for a table see it.
type layerContext struct {
	formatter.HeaderContext
	o *statusOptions
	l *api.Layer
}

func (c *layerContext) Digest() string {
	return (&peersOptions{noTrunc: c.o.noTrunc}).digest(c.l.Digest)
}

func (c *layerContext) State() string { return printable(c.l.State) }

func (c *layerContext) Image() string { return orNone(printable(c.l.Image)) }

// Why is why it is not complete.
func (c *layerContext) Why() string { return orNone(printable(c.l.Why)) }

func (c *layerContext) Disk() string { return size(c.l.Bytes) }

// Size is that of the files' contents.
func (c *layerContext) Size() string {
	if !c.known() {
		return "-"
	}
	return size(c.l.Size)
}

// Have is the part of that that is here.
func (c *layerContext) Have() string {
	switch {
	case !c.known():
		return "-"
	case c.l.Size == 0:
		return percent(1)
	}
	return percent(float64(c.l.Present) / float64(c.l.Size))
}

// known tells whether the way to mount knows how much is here.
func (c *layerContext) known() bool { return c.l.Bytes > 0 }

// Mounts are all, and those that need the daemon.
func (c *layerContext) Mounts() string {
	if by := c.l.Mounts - c.l.Direct; by > 0 && c.known() {
		return fmt.Sprintf("%d (%d by the daemon)", c.l.Mounts, by)
	}
	return fmt.Sprint(c.l.Mounts)
}

func (c *layerContext) Readers() int { return c.l.Readers }
