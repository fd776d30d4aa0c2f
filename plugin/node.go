package plugin

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/templates"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher/trust"
)

func newNode(dockerCLI command.Cli) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Set up this node",
		Args:  usage(cli.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newNodeSecret(dockerCLI))
	return cmd
}

type secretOptions struct {
	format string
}

// secretResult is what --format can show. The secret itself is not among it.
type secretResult struct {
	File string
}

func newNodeSecret(dockerCLI command.Cli) *cobra.Command {
	var opts secretOptions
	cmd := &cobra.Command{
		Use:   "secret [OPTIONS] [FILE]",
		Short: "Make a cluster secret",
		Long: `Make a new cluster secret and write it to FILE, which only its owner can read.
The default is ` + secretPlaces + `.

Nodes with the same secret trust each other: each proves that it knows the secret before it gets
a byte of any image, and all that passes between them is encrypted. Make it on one node and copy
the file to the others, as carefully as a private key. A file that is there is never overwritten.`,
		Example: `  docker quay node secret
  docker quay node secret ./secret
  scp /etc/quay/cluster.secret node2:/etc/quay/cluster.secret`,
		Args: usage(cli.RequiresMaxArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			file := defaultSecretFile()
			if len(args) == 1 {
				file = args[0]
			}
			return status(cmd.Context(), runSecret(dockerCLI, opts, file))
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
	}
	cmd.Flags().StringVarP(&opts.format, "format", "f", "", "Format the result by a Go `template`, or \"json\"; {{.File}}")
	return cmd
}

func runSecret(dockerCLI command.Cli, opts secretOptions, file string) error {
	// The folder is another's to make unless it is the default's.
	if file == defaultSecretFile() {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot make the folder of the cluster secret: %w", err)
		}
	}
	if err := trust.NewSecret().Save(file); err != nil {
		return err
	}
	if opts.format == "" {
		fmt.Fprintln(dockerCLI.Err(), "Cluster secret written. Copy it to every node of the cluster, and nowhere else:")
		opts.format = "{{.File}}"
	}
	return printFormatted(dockerCLI, opts.format, secretResult{File: file})
}

// printFormatted shows v as docker's --format does: a template, or "json".
func printFormatted(dockerCLI command.Cli, format string, v any) error {
	return writeFormatted(dockerCLI.Out(), format, v)
}

func writeFormatted(w io.Writer, format string, v any) error {
	if format == "json" {
		format = "{{json .}}"
	}
	t, err := templates.Parse(format)
	if err != nil {
		return usageError{fmt.Errorf("--format: %w", err)}
	}
	if err := t.Execute(w, v); err != nil {
		return usageError{fmt.Errorf("--format: %w", err)}
	}
	_, err = fmt.Fprintln(w)
	return err
}
