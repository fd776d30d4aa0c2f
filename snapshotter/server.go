package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/snapshotter/layerfs"
	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// Deps are what a Server needs from the rest of the node.
type Deps struct {
	Layers LayerSource  // nil: every layer is unpacked
	Self   string       // this program's file, which has the commands KeeperCommand and MounterCommand; "": no EROFS
	Log    *slog.Logger // nil: slog.Default()
}

// LayerSource is where layers come from, for each way to mount them.
type LayerSource interface {
	lazy.Layers
	layerfs.Source
}

// Server serves containerd's snapshots API on the unix socket of Config.Snapshotter.
type Server struct {
	sn  *Snapshots
	how chosen
	rpc *grpc.Server
	l   net.Listener
}

var _ Service = (*Server)(nil)

// New opens the snapshotter and its socket. ErrInUse when another daemon has either.
func New(ctx context.Context, cfg Config, deps Deps) (*Server, error) {
	if deps.Log == nil {
		deps.Log = slog.Default()
	}
	m, how, err := mounting(cfg, deps)
	if err != nil {
		return nil, err
	}
	deps.Log.Info("layers are mounted", "way", how.way, "why", how.why)
	sn, err := OpenSnapshots(ctx, filepath.Join(cfg.Root, "snapshotter"), m, deps.Log)
	if err != nil {
		return nil, err
	}
	// 0600: who may prepare snapshots is root on this machine, and containerd is root.
	l, err := Listen(cfg.Snapshotter.Socket, 0o600, "")
	if err != nil {
		sn.Close()
		return nil, err
	}
	rpc := grpc.NewServer(
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
	)
	snapshotsapi.RegisterSnapshotsServer(rpc, snapshotservice.FromSnapshotter(sn))
	return &Server{sn: sn, how: how, rpc: rpc, l: l}, nil
}

// Name implements Service.
func (s *Server) Name() string { return "snapshotter on " + s.l.Addr().String() }

// Serve answers until Shutdown, and then returns nil; or until the data of layers cannot be served.
func (s *Server) Serve() error {
	f := s.sn.layers
	if f == nil {
		return s.rpc.Serve(s.l)
	}
	served := make(chan error, 1)
	go func() { served <- s.rpc.Serve(s.l) }()
	select {
	case err := <-served:
		return err
	case <-f.Failed():
		if err := f.Err(); err != nil {
			return fmt.Errorf("the data of layers cannot be served any more: %w", err)
		}
		return <-served
	}
}

// Shutdown lets calls in progress end until ctx does, then cuts them, and closes the snapshotter.
func (s *Server) Shutdown(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.rpc.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.rpc.Stop()
		<-done
	}
	s.l.Close() // when Serve was never called
	return s.sn.Close()
}

// Layers says how layers are mounted, for the node's status.
func (s *Server) Layers() *api.Layers {
	st := &api.Layers{Mount: s.how.way, Why: s.how.why}
	if s.sn.layers == nil {
		st.Mounts = len(s.eachLayer())
		return st
	}
	now := s.sn.layers.Status()
	st.Mounts, st.Direct, st.Quota = now.Mounts, now.Data, now.Quota
	st.Stored, st.Complete, st.Bytes = now.Layers.Layers, now.Layers.Complete, now.Layers.Bytes
	st.Reads, st.ReadErrors, st.ReadsWaiting = now.Reads, now.Errors, now.InFlight
	return st
}

// eachLayer is the list of the layers of the way in which they are mounted.
func (s *Server) eachLayer() (list []api.Layer) {
	switch {
	case s.sn.layers != nil:
		for _, l := range s.sn.layers.Layers() {
			list = append(list, api.Layer{
				Digest: l.Blob, Image: l.Image, State: string(l.State), Size: l.Size, Present: l.Present, Bytes: l.OnDisk,
				Mounts: l.Mounts, Direct: l.Data, Readers: l.Opens, Why: l.Why,
			})
		}
	case s.sn.trees != nil:
		for _, t := range s.sn.trees.Mounted() {
			list = append(list, api.Layer{Digest: t.Layer, Image: t.Ref, State: string(layerfs.Lazy), Mounts: 1})
		}
	}
	return list
}

// Tell says what this node knows of a layer, for other nodes: see layerfs.FileSystem.Tell.
func (s *Server) Tell(ctx context.Context, d digest.Digest) ([]byte, error) {
	if s.sn.layers == nil {
		return nil, errors.New("layers are not kept with an index here")
	}
	return s.sn.layers.Tell(ctx, d)
}

// Healthy tells whether the snapshotter's database answers, for a watchdog.
func (s *Server) Healthy(ctx context.Context) error {
	answer := make(chan error, 1)
	go func() {
		_, err := s.sn.Stat(ctx, "health")
		answer <- err
	}()
	select {
	case err := <-answer:
		if err == nil || errdefs.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("the snapshotter's database does not answer: %w", err)
	case <-ctx.Done():
		return fmt.Errorf("the snapshotter's database does not answer: %w", ctx.Err())
	}
}
