package plugin

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/docker/cli/cli"
	"github.com/spf13/cobra"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/plugin/progress"
	"github.com/docker-quay/docker-quay/plugin/target"
)

// Exit codes. 125 and 130 are the docker CLI's own; exitHelp is the list as users read it.
const (
	exitOK          = 0
	exitFailure     = 1
	exitNotFound    = 3
	exitDenied      = 4
	exitUnreachable = 5
	exitMismatch    = 6
	exitNoTarget    = 7
	exitNoRoom      = 8
	exitUsage       = 125
	exitInterrupted = 130
)

const exitHelp = `Exit codes:
    0  done
    1  any other failure
    3  the registry has no such image, or not for this platform
    4  no access: log in with "docker login", or the cluster's secret is another one
    5  neither the registry nor peers could be reached, or have all of the image
    6  the bytes do not have the digest they should have
    7  no engine to pull into was found, or it refused the image
    8  no room in the store
  125  wrong usage
  130  interrupted; what was fetched is kept, and the same command goes on from there`

// codes maps errors to exit codes. The first that matches counts: what the user can do something about goes first.
var codes = []struct {
	err  error
	code int
}{
	{origin.ErrDenied, exitDenied},
	{trust.ErrForeign, exitDenied},
	{trust.ErrSecretExposed, exitDenied},
	{origin.ErrNotFound, exitNotFound},
	{fetcher.ErrNoPlatform, exitNotFound},
	{origin.ErrMismatch, exitMismatch},
	{store.ErrMismatch, exitMismatch},
	{fetcher.ErrMismatch, exitMismatch},
	{published.ErrMismatch, exitMismatch},
	{store.ErrQuota, exitNoRoom},
	{store.ErrNoSpace, exitNoRoom},
	{origin.ErrTLS, exitUnreachable},
	{origin.ErrRateLimited, exitUnreachable},
	{origin.ErrUnavailable, exitUnreachable},
	{fetcher.ErrNoSource, exitUnreachable},
	{target.ErrNoTarget, exitNoTarget},
	{target.ErrRefused, exitNoTarget},
	{target.ErrUnknown, exitUsage},
	{context.Canceled, exitInterrupted},
	{context.DeadlineExceeded, exitUnreachable},
}

// exitCode is the code of a verb that ended with err.
func exitCode(err error) int {
	var usage usageError
	var network *net.OpError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	}
	for _, c := range codes {
		if errors.Is(err, c.err) {
			return c.code
		}
	}
	if errors.As(err, &network) && !errors.Is(err, fs.ErrPermission) { // not a socket that is not ours to use
		return exitUnreachable
	}
	return exitFailure
}

// status makes the error with which the docker CLI exits.
func status(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	code := exitCode(err)
	if ctx.Err() != nil {
		code = exitInterrupted
	}
	if code == exitInterrupted {
		return cli.StatusError{Cause: err, Status: "interrupted: what was fetched is kept, and the same command goes on from there", StatusCode: code}
	}
	return cli.StatusError{Cause: err, Status: pluginName + ": " + err.Error(), StatusCode: code}
}

// usageError is an error in the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// usage gives a check of arguments the exit code of wrong usage.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return cli.StatusError{Cause: usageError{err}, Status: err.Error(), StatusCode: exitUsage}
		}
		return nil
	}
}

// interruptible ends the context at SIGINT and SIGTERM. A second signal means that ending cleanly takes too long: the
// terminal is put right and the process exits.
//
// On a terminal the kernel signals us as it does the docker CLI; off one the CLI closes a socket and the context that
// it gave us ends.
func interruptible(parent context.Context, r *progress.Reporter) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case <-signals:
			cancel()
		case <-done:
			return
		}
		select {
		case <-signals:
			r.Close()
			os.Exit(exitInterrupted)
		case <-done:
		}
	}()
	stopped := false
	return ctx, func() {
		if !stopped {
			stopped = true
			signal.Stop(signals)
			close(done)
			cancel()
		}
	}
}

func dirOf(file string) string { return filepath.Dir(file) }
