package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/plugin/target"
)

func TestExitCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("anything"), 1},
		{origin.ErrNotFound, 3},
		{fetcher.ErrNoPlatform, 3},
		{&origin.Error{Err: origin.ErrDenied}, 4},
		{trust.ErrForeign, 4},
		{origin.ErrUnavailable, 5},
		{origin.ErrTLS, 5},
		{origin.ErrRateLimited, 5},
		{fetcher.ErrNoSource, 5},
		{&net.OpError{Op: "dial", Err: errors.New("refused")}, 5},
		{store.ErrMismatch, 6},
		{fetcher.ErrMismatch, 6},
		{origin.ErrMismatch, 6},
		{target.ErrNoTarget, 7},
		{target.ErrRefused, 7},
		{store.ErrQuota, 8},
		{usageError{errors.New("wrong")}, 125},
		{context.Canceled, 130},
		// Of several reasons the one that the user can do something about counts.
		{errors.Join(origin.ErrUnavailable, origin.ErrDenied), 4},
		{fmt.Errorf("%w: %w", target.ErrRefused, origin.ErrNotFound), 3},
		{fmt.Errorf("%w: %w", target.ErrNoTarget, fs.ErrPermission), 7},
	} {
		wrapped := c.err
		if wrapped != nil {
			wrapped = fmt.Errorf("pull example.test/app: %w", c.err)
		}
		if got := exitCode(wrapped); got != c.want {
			t.Errorf("%v: exit code %d, want %d", wrapped, got, c.want)
		}
	}
	for _, c := range codes {
		if !strings.Contains(exitHelp, fmt.Sprintf("%3d  ", c.code)) {
			t.Errorf("the help lacks exit code %d of %v", c.code, c.err)
		}
	}
}

func TestRate(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "10MiB": 10 << 20, "10MiB/s": 10 << 20, "500kB": 500_000, "1.5m": 1_500_000, "500": 500_000, "2g": 2_000_000_000,
	} {
		var v rateValue
		if err := v.Set(in); err != nil || int64(v) != want {
			t.Errorf("%q: %d, %v, want %d", in, v, err, want)
		}
	}
	for _, in := range []string{"", "fast", "-1", "10Mbit", "9999999999999"} {
		var v rateValue
		if err := v.Set(in); err == nil {
			t.Errorf("%q was read as %d", in, v)
		}
	}
}

func TestPorts(t *testing.T) {
	for _, c := range []struct {
		args        []string
		first, last uint16
	}{
		{nil, 6881, 6889},
		{[]string{"--ports", "0"}, 0, 0},
		{[]string{"--ports", "7000-7010"}, 7000, 7010},
		{[]string{"--lower-port", "7000"}, 7000, 7000},
		{[]string{"--lower-port", "7000", "--upper-port", "7010"}, 7000, 7010},
		{[]string{"--upper-port", "7010", "--lower-port", "7000"}, 7000, 7010},
		{[]string{"--upper-port", "80"}, 80, 80},
	} {
		var o sourceOptions
		flags := pflag.NewFlagSet("pull", pflag.ContinueOnError)
		o.install(flags, false)
		if err := flags.Parse(c.args); err != nil || o.ports.First != c.first || o.ports.Last != c.last {
			t.Errorf("%v: %v, %v, want %d-%d", c.args, o.ports, err, c.first, c.last)
		}
	}
}

func TestStandaloneArgs(t *testing.T) {
	for in, want := range map[string]string{
		"docker-quay":                             "docker-quay quay",
		"docker-quay pull x":                      "docker-quay quay pull x",
		"/usr/bin/docker-torrent pull x":          "/usr/bin/docker-torrent torrent pull x",
		"docker-quay quay pull x":                 "docker-quay quay pull x",
		"docker-quay --context far pull x":        "docker-quay --context far quay pull x",
		"docker-quay -D --host=tcp://h pull -q x": "docker-quay -D --host=tcp://h quay pull -q x",
		"docker-quay --help":                      "docker-quay quay --help",
		"docker-quay --host":                      "docker-quay --host quay",
		"docker-quay __complete quay pull":        "docker-quay __complete quay pull",
	} {
		if got := StandaloneArgs(strings.Fields(in)); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestMetadata(t *testing.T) {
	m := Metadata("/x/cli-plugins/docker-quay", "1.0.0")
	if m.SchemaVersion != "0.1.0" || m.Vendor == "" || m.Version != "1.0.0" || m.Hidden || m.ShortDescription == "" || m.URL == "" {
		t.Errorf("%+v", m)
	}
	if !Metadata("docker-torrent", "1.0.0").Hidden {
		t.Error("docker torrent is listed")
	}
}
