// Command containerd-quay-grpc is the node daemon of docker quay: it fetches images from
// registries and peers, serves containerd's snapshots API with lazily mounted layers, a
// registry mirror on loopback, and the API that docker-quay talks to.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/install"
	"github.com/docker-quay/docker-quay/snapshotter"
	"github.com/docker-quay/docker-quay/snapshotter/keeper"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
)

// Exit codes, as the help lists them.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2 // wrong flags or configuration: starting again does not help
	exitInUse  = 3 // another daemon has the folder or a socket
	exitRoot   = 4 // not root
)

var (
	errUsage = errors.New("usage")
	errRoot  = errors.New("containerd-quay-grpc mounts file systems and must run as root")
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(os.Stdout).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "containerd-quay-grpc:", err)
	}
	os.Exit(exitCode(err))
}

func exitCode(err error) int {
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errUsage), errors.Is(err, snapshotter.ErrConfig):
		return exitUsage
	case errors.Is(err, snapshotter.ErrInUse):
		return exitInUse
	case errors.Is(err, errRoot):
		return exitRoot
	default:
		return exitFailed
	}
}

// flags of the command line; "" is "as the configuration says".
type flags struct {
	config   string
	root     string
	logLevel string
}

func command(out io.Writer) *cobra.Command {
	var f flags
	cmd := &cobra.Command{
		Use:   "containerd-quay-grpc",
		Short: "Node daemon of docker quay: lazy snapshotter, registry mirror, peer",
		Long: `containerd-quay-grpc fetches images from registries and from other nodes, and
serves them to containerd: as a snapshotter that mounts layers before they are there, or
unpacks them side by side, and as a registry mirror on loopback.

It ends in order on SIGINT and SIGTERM; a second signal ends it at once.

Exit codes:
  0  ended in order
  1  failed while running; the last line says why
  2  the command line or the configuration is wrong
  3  another daemon works on the same folder or socket
  4  not root`,
		Example: `  containerd-quay-grpc
  containerd-quay-grpc --config /etc/quay/test.toml --log-level debug
  containerd-quay-grpc config check`,
		Args:          usageArgs(cobra.NoArgs),
		Version:       fetcher.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return run(cmd.Context(), cmd, f)
		},
	}
	cmd.SetOut(out)
	cmd.CompletionOptions.DisableDefaultCmd = true
	cmd.SetVersionTemplate("containerd-quay-grpc {{.Version}}\n")
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fmt.Errorf("%w: %w", errUsage, err)
	})
	pf := cmd.PersistentFlags()
	pf.StringVar(&f.config, "config", snapshotter.DefaultConfigPath, "configuration file; the default one need not exist")
	pf.StringVar(&f.root, "root", "", "folder of the store and the snapshots, instead of the configuration's `root`")
	pf.StringVar(&f.logLevel, "log-level", "", "debug, info, warn or error, instead of the configuration's")
	cmd.AddCommand(configCommand(&f), releaseCommand(&f), keeperCommand(), mounterCommand())
	return cmd
}

func releaseCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "release",
		Short: "Unmount all layers and end the keeper, once the daemon is stopped for good",
		Long: `release unmounts all layers that a stopped daemon left mounted, and ends the process that keeps its
connection with the kernel. Containers that still run on them get errors from layers that are not complete.
Without it both stay for the next start of the daemon.`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd, *f)
			if err != nil {
				return err
			}
			if os.Geteuid() != 0 {
				return errRoot
			}
			return snapshotter.Release(cmd.Context(), cfg, newLogger(os.Stderr, cfg.Log))
		},
	}
}

// keeperCommand is the process that holds /dev/fuse; the daemon starts it.
func keeperCommand() *cobra.Command {
	return &cobra.Command{
		Use: snapshotter.KeeperCommand, Hidden: true, Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return keeper.Run(cmd.Context(), args[0]) },
	}
}

// mounterCommand is the process that mounts layers for the daemon.
func mounterCommand() *cobra.Command {
	return &cobra.Command{
		Use: snapshotter.MounterCommand, Hidden: true, Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error { return layerfs.RunMounter(os.Stdin, os.Stdout) },
	}
}

func configCommand(f *flags) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print a commented sample, or check the configuration",
		Args:  usageArgs(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		&cobra.Command{
			Use:   "default",
			Short: "Print the commented sample: every key, its meaning and its default",
			Args:  usageArgs(cobra.NoArgs),
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := io.WriteString(cmd.OutOrStdout(), install.Config)
				return err
			},
		},
		&cobra.Command{
			Use:   "check",
			Short: "Check the configuration, and print what holds",
			Args:  usageArgs(cobra.NoArgs),
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := load(cmd, *f)
				if err != nil {
					return err
				}
				return toml.NewEncoder(cmd.OutOrStdout()).Encode(cfg)
			},
		},
	)
	return cmd
}

// usageArgs makes an argument check answer with exit code 2.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return fmt.Errorf("%w: %w", errUsage, err)
		}
		return nil
	}
}

// load reads the configuration and puts the flags over it.
func load(cmd *cobra.Command, f flags) (snapshotter.Config, error) {
	cfg, err := snapshotter.LoadConfig(f.config, cmd.Flags().Changed("config"))
	if err != nil {
		return cfg, err
	}
	if f.root != "" {
		cfg.Root = f.root
	}
	if f.logLevel != "" {
		cfg.Log.Level = f.logLevel
	}
	return cfg, cfg.Validate()
}

func run(ctx context.Context, cmd *cobra.Command, f flags) error {
	cfg, err := load(cmd, f)
	if err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errRoot
	}
	log := newLogger(os.Stderr, cfg.Log)
	slog.SetDefault(log)
	// After the first signal the next one has its ordinary effect: it ends the process.
	context.AfterFunc(ctx, func() { signal.Reset(os.Interrupt, syscall.SIGTERM) })
	sd := &systemd{log: log}
	defer sd.stop()
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("the daemon does not find its own program, which it needs for helpers: %w", err)
	}
	return snapshotter.Run(ctx, cfg, snapshotter.Options{
		Version: fetcher.Version, Self: self, Log: log, Ready: sd.ready, Stopping: sd.stopping,
	})
}

// newLogger makes the logger of a valid configuration.
func newLogger(w io.Writer, c snapshotter.LogConfig) *slog.Logger {
	var level slog.Level
	level.UnmarshalText([]byte(c.Level)) // Validate knows only levels that slog knows
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
