package plugin

import (
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/spf13/cobra"
)

// newTorrent is quayctl's command of old: `torrent pull` and `torrent seed` with its flags, hidden, so that its users'
// lines go on working.
func newTorrent(dockerCLI command.Cli, o Options) *cobra.Command {
	cmd := &cobra.Command{
		Use:    torrentName,
		Short:  "Pull and seed images, with the lines of quayctl",
		Hidden: true,
		Args:   usage(cli.NoArgs),
		RunE:   func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newPull(dockerCLI, o, true), newSeed(dockerCLI, o, true))
	return cmd
}
