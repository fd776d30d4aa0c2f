package plugin

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/docker/cli/cli"
	"github.com/docker/cli/cli/command"
	"github.com/docker/cli/cli/command/completion"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher/tracker"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

type trackerOptions struct {
	listen  string
	token   string
	allow   string
	proxied bool
	quiet   bool
}

const (
	// defaultTracker is where trackers listen by custom, on loopback.
	defaultTracker = "127.0.0.1:6969"
	// minToken is how many characters a token must have: 16 of base 64 cannot be guessed.
	minToken = 16
	// maxToken keeps the announce URL within what clients take.
	maxToken = 128
	// maxAllowed bounds the infohashes of --allow: the layers of ten thousand images, in 4 MB.
	maxAllowed = 100_000
)

func newTracker(dockerCLI command.Cli) *cobra.Command {
	var opts trackerOptions
	cmd := &cobra.Command{
		Use:   "tracker [OPTIONS]",
		Short: "Run a BitTorrent tracker",
		Long: `Run a BitTorrent tracker over HTTP until interrupted, and print its announce URL, for "docker quay
torrent --tracker" and for any other client. Being interrupted is the ordinary end and no failure.

A tracker tells clients of one torrent each other's addresses: that of the connection, and no other.
It keeps nothing on disk; after a restart clients are back within minutes. Nodes of one cluster need
none among themselves.

With --token only who knows the token is answered: it is a part of the announce URL, printed here
as TOKEN. Whoever gets a .torrent file with it has it. Without one everybody who reaches the address
may use the tracker, for any torrent unless --allow says which.

The connection is not encrypted. Across networks that you do not trust put a proxy with TLS in front,
on this machine, and use --proxied.

Exit codes:
    0  interrupted, the ordinary end
    1  the address cannot be listened on, or another failure
  125  wrong usage`,
		Example: `  # On this machine alone
  docker quay tracker

  # For a private swarm
  openssl rand -hex 16 >token
  docker quay tracker --listen :6969 --token token
  docker quay torrent --tracker "http://tracker.example:6969/$(cat token)/announce" quay.io/team/app:1.4

  # For the layers of one image
  docker quay torrent --format "{{.InfoHash}}" quay.io/team/app:1.4 >allowed
  docker quay tracker --listen :6969 --allow allowed`,
		Args:              usage(cli.NoArgs),
		RunE:              func(cmd *cobra.Command, _ []string) error { return runTracker(cmd.Context(), dockerCLI, opts) },
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	flags := cmd.Flags()
	flags.StringVar(&opts.listen, "listen", defaultTracker, "Listen on this `address`: host:port, or :port for all addresses")
	flags.StringVar(&opts.token, "token", "", "Answer only who knows the token in this `file`")
	flags.StringVar(&opts.allow, "allow", "", "Answer only for the torrents in this `file`: an infohash of 40 hex digits a line")
	flags.BoolVar(&opts.proxied, "proxied", false, "Believe a proxy on this machine in what it says of its clients' addresses (X-Forwarded-For)")
	flags.BoolVarP(&opts.quiet, "quiet", "q", false, "Print nothing but the announce URL")
	for _, f := range []string{"token", "allow"} {
		registerCompletion(cmd, f, completion.FileNames())
	}
	return cmd
}

func runTracker(ctx context.Context, dockerCLI command.Cli, opts trackerOptions) error {
	mode := progress.Plain
	if opts.quiet {
		mode = progress.Quiet
	}
	reporter := newReporter(dockerCLI, mode)
	defer reporter.Close()
	ctx, stop := interruptible(ctx, reporter)
	defer stop()
	err := track(ctx, dockerCLI, opts, reporter)
	if err != nil && ctx.Err() == nil {
		return status(ctx, err)
	}
	return nil
}

func track(ctx context.Context, dockerCLI command.Cli, opts trackerOptions, reporter *progress.Reporter) error {
	o := tracker.Options{Proxied: opts.proxied}
	var err error
	if opts.token != "" {
		if o.Token, err = readToken(opts.token, reporter); err != nil {
			return err
		}
	}
	if opts.allow != "" {
		if o.Allowed, err = readAllowed(opts.allow); err != nil {
			return err
		}
	}
	if _, _, err := net.SplitHostPort(opts.listen); err != nil {
		return usageError{fmt.Errorf("--listen %q is not of the form HOST:PORT", opts.listen)}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", opts.listen)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err // the rest is said already, and it is no registry that cannot be reached
		}
		return fmt.Errorf("the tracker cannot listen on %s: %w", opts.listen, err)
	}
	path := "/announce"
	if o.Token != "" {
		path = "/TOKEN" + path
	}
	addr := l.Addr().(*net.TCPAddr)
	switch {
	case addr.IP.IsLoopback():
		reporter.Say("Clients on this machine may announce themselves; --listen :%d is for others too", addr.Port)
	case o.Token == "":
		reporter.Say("Everybody who reaches this address may use the tracker; --token restricts it")
	}
	if _, err := fmt.Fprintf(dockerCLI.Out(), "http://%s%s\n", reachable(addr), path); err != nil {
		_ = l.Close()
		return err
	}
	return tracker.New(o).Serve(ctx, l)
}

// reachable is an address as others may know it: by this machine's name when it is all of its addresses.
func reachable(a *net.TCPAddr) string {
	if a.IP.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			return net.JoinHostPort(name, fmt.Sprint(a.Port))
		}
	}
	return a.String()
}

// readToken reads a token: one line of letters, digits, "-", "_", ".", "~", which a URL takes as they are.
func readToken(file string, reporter *progress.Reporter) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("the token cannot be read: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxToken+2)) // with a line's end, and one more to see that there is more
	if err != nil {
		return "", fmt.Errorf("the token in %s cannot be read: %w", file, err)
	}
	token := strings.TrimSpace(string(text))
	if len(token) < minToken || len(token) > maxToken || strings.ContainsFunc(token, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.~", r)
	}) {
		return "", usageError{fmt.Errorf("%s holds no token: it must be %d to %d letters, digits, \"-\", \"_\", \".\", \"~\"; make one with `openssl rand -hex 16`", file, minToken, maxToken)}
	}
	if fi, err := f.Stat(); err == nil && fi.Mode().Perm()&0o007 != 0 {
		reporter.Say("Note: every user of this machine can read the token: run `chmod 600 %s`", file)
	}
	return token, nil
}

// readAllowed reads infohashes, one a line; lines that begin with "#" say something to people.
func readAllowed(file string) ([]metainfo.Hash, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("the list of torrents cannot be read: %w", err)
	}
	defer f.Close()
	allowed := []metainfo.Hash{}
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		b, err := hex.DecodeString(line)
		if err != nil || len(b) != metainfo.HashSize {
			return nil, usageError{fmt.Errorf("%s:%d: %.60q is not an infohash of 40 hex digits", file, n, line)}
		}
		if allowed = append(allowed, metainfo.Hash(b)); len(allowed) > maxAllowed {
			return nil, usageError{fmt.Errorf("%s lists more than %d torrents", file, maxAllowed)}
		}
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return nil, usageError{fmt.Errorf("%s is no list of infohashes", file)}
	} else if err != nil {
		return nil, fmt.Errorf("the list of torrents cannot be read: %w", err)
	}
	return allowed, nil
}
