package plugin

import (
	"runtime"

	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/spf13/cobra"
)

type versionOptions struct {
	format string
	socket string
}

// versionResult is what --format can show.
type versionResult struct {
	Version   string
	GoVersion string
	OS        string
	Arch      string
	Node      string `json:",omitempty"` // the daemon's version, "" when none answers
}

const versionTemplate = `docker quay
 Version:  {{.Version}}
 Go:       {{.GoVersion}}
 OS/Arch:  {{.OS}}/{{.Arch}}
 Node:     {{if .Node}}{{.Node}}{{else}}no daemon{{end}}`

func newVersion(dockerCLI command.Cli, o Options) *cobra.Command {
	var opts versionOptions
	cmd := &cobra.Command{
		Use:     "version [OPTIONS]",
		Short:   "Show the versions of this command and of the node daemon",
		Example: `  docker quay version --format '{{.Version}}'`,
		Args:    usage(cli.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			res := versionResult{Version: o.Version, GoVersion: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
			if o.NodeVersion != nil {
				res.Node = o.NodeVersion(cmd.Context(), opts.socket)
			}
			if opts.format == "" {
				opts.format = versionTemplate
			}
			return status(cmd.Context(), printFormatted(dockerCLI, opts.format, res))
		},
	}
	cmd.Flags().StringVarP(&opts.format, "format", "f", "", "Format the result by a Go `template`, or \"json\"")
	cmd.Flags().StringVar(&opts.socket, "socket", defaultSocket, "The node daemon's `socket`")
	return cmd
}
