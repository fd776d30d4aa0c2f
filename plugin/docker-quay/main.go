// Command docker-quay is the Docker CLI plugin `docker quay`. It also runs alone, and, under the name docker-torrent, as
// `docker torrent` for the users of quayctl.
package main

import (
	"os"

	dockerplugin "github.com/docker/cli/cli-plugins/plugin"
	"github.com/docker/cli/cli/command"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/plugin"
)

func main() {
	if dockerplugin.RunningStandalone() {
		os.Args = plugin.StandaloneArgs(os.Args)
	}
	dockerplugin.Run(func(dockerCLI command.Cli) *cobra.Command {
		return plugin.New(dockerCLI, os.Args[0], plugin.Options{
			Version: fetcher.Version, Open: plugin.OpenImage, NodeVersion: plugin.NodeVersion, Stranger: plugin.AskAsStranger,
			Publish: plugin.StoreTorrents, Manifests: plugin.ImageManifests, PublishIndexes: plugin.StoreIndexes,
		})
	}, plugin.Metadata(os.Args[0], fetcher.Version))
}
