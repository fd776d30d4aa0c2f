package plugin_test

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// serveStatus is a node's API that tells what it is given, and no more.
func serveStatus(t *testing.T, st api.Status, layers ...api.Layer) (socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "status") // short: it holds a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "quay.sock")
	server := api.NewServer(api.ServerOptions{
		Status: func() api.Status {
			now := st
			if st.Layers != nil {
				l := *st.Layers
				now.Layers = &l
			}
			return now
		},
		Layers: func() []api.Layer { return layers },
	})
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		server.Close()
	})
	return socket
}

// TestStatus: what a person and a script see of a node that mounts layers.
func TestStatus(t *testing.T) {
	lazy, whole := digest.FromString("lazy"), digest.FromString("whole")
	st := api.Status{
		Version: "1.2.3", NodeID: "0123456789abcdef", Addr: "10.0.0.7:6881", Peers: []cluster.Member{{}},
		Snapshotter: "/run/quay/snapshotter.sock", Mirror: "127.0.0.1:6880",
		Store:   store.Usage{Bytes: 2_000_000, Quota: 10_000_000, Blobs: 3},
		Fetcher: api.Fetching{Fetches: 1, Shared: 2, FromOrigin: 1000, FromPeers: 2000, FromCache: 3000, Uploaded: 4000, FailedReads: 5, RegistriesPaused: 1},
		Layers: &api.Layers{
			Mount: "loop", Why: "file-backed EROFS does not work:\x1b[31m here", Mounts: 3, Direct: 1, Stored: 2, Complete: 1, Bytes: 1_500_000,
			Reads: 7, ReadErrors: 1, ReadsWaiting: 2,
		},
	}
	list := []api.Layer{
		{Digest: lazy, Image: "quay.io/team/app:1", State: "lazy", Size: 1_000_000, Present: 250_000, Bytes: 300_000, Mounts: 2, Readers: 4, Why: "it is being decoded"},
		{Digest: whole, State: "complete", Size: 1_000_000, Present: 1_000_000, Bytes: 1_200_000, Mounts: 1, Direct: 1},
	}
	socket := serveStatus(t, st, list...)
	show := func(args ...string) result {
		t.Helper()
		return run(t, "ok", "docker-quay", append([]string{"status", "--socket", socket}, args...)...)
	}
	r := show()
	if r.code != 0 || r.stderr != "" {
		t.Errorf("exit code %d, standard error %q", r.code, r.stderr)
	}
	noControl(t, r.stdout)
	golden(t, "status", strings.ReplaceAll(r.stdout, socket, "SOCKET"))

	var got api.Status
	if r := show("--format", "json"); json.Unmarshal([]byte(r.stdout), &got) != nil || got.Layers == nil || len(got.Layers.List) != 2 ||
		got.Layers.List[0] != list[0] || got.Fetcher != st.Fetcher || got.Store != st.Store || got.Layers.Why != st.Layers.Why {
		t.Errorf("as JSON: %+v", r)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--format", "{{.Layers.Mount}} {{len .Layers.List}}"}, 0, "loop 2\n"},
		{[]string{"--no-trunc", "--format", `table {{.Digest}}\t{{.Have}}`}, 0,
			"LAYER" + strings.Repeat(" ", 69) + "HAVE\n" + lazy.String() + "   25%\n" + whole.String() + "   100%\n"},
		{[]string{"--format", "{{.Nothing}}"}, 125, ""},
		{[]string{"--format", "table {{.Nothing}}"}, 125, ""},
	} {
		if r := show(c.args...); r.code != c.code || r.stdout != c.want {
			t.Errorf("%q: exit code %d, %q, want %d, %q; %s", c.args, r.code, r.stdout, c.code, c.want, r.stderr)
		}
	}
}

// TestStatusOfOthers: nodes that are just starting, mount otherwise or have no cluster.
func TestStatusOfOthers(t *testing.T) {
	for name, c := range map[string]struct {
		st     api.Status
		layers []api.Layer
		has    []string
	}{
		"starting": {api.Status{Version: "1"}, nil, []string{"not known yet", "without a cluster secret", "Mirror:      off"}},
		"fuse": {api.Status{Layers: &api.Layers{Mount: "fuse", Why: "lazy.mount says so", Mounts: 1}},
			[]api.Layer{{Digest: digest.FromString("a"), Image: "app", State: "lazy", Mounts: 1}},
			[]string{"fuse: lazy.mount says so", "Mounts:      1\n", "lazy      -         -         1"}},
		"unpack": {api.Status{Layers: &api.Layers{Mount: "unpack", Why: "snapshotter.lazy is off"}}, nil, []string{"unpack: snapshotter.lazy is off"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := run(t, "ok", "docker-quay", "status", "--socket", serveStatus(t, c.st, c.layers...))
			if r.code != 0 {
				t.Errorf("%+v", r)
			}
			for _, want := range c.has {
				if !strings.Contains(r.stdout, want) {
					t.Errorf("it lacks %q:\n%s", want, r.stdout)
				}
			}
		})
	}
}
