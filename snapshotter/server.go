package snapshotter

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"

	"github.com/docker-quay/docker-quay/snapshotter/lazy"
)

// Deps are what a Server needs from the rest of the node.
type Deps struct {
	Layers lazy.Layers  // nil: every layer is unpacked
	Log    *slog.Logger // nil: slog.Default()
}

// Server serves containerd's snapshots API on the unix socket of Config.Snapshotter.
type Server struct {
	sn  *Snapshots
	rpc *grpc.Server
	l   net.Listener
}

var _ Service = (*Server)(nil)

// New opens the snapshotter and its socket. ErrInUse when another daemon has either.
func New(ctx context.Context, cfg Config, deps Deps) (*Server, error) {
	if deps.Log == nil {
		deps.Log = slog.Default()
	}
	if !cfg.Snapshotter.Lazy {
		deps.Layers = nil
	}
	sn, err := OpenSnapshots(ctx, filepath.Join(cfg.Root, "snapshotter"), deps.Layers, deps.Log)
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
	return &Server{sn: sn, rpc: rpc, l: l}, nil
}

// Name implements Service.
func (s *Server) Name() string { return "snapshotter on " + s.l.Addr().String() }

// Serve answers until Shutdown, and then returns nil.
func (s *Server) Serve() error { return s.rpc.Serve(s.l) }

// Shutdown lets calls in progress end until ctx does, then cuts them, and unmounts all
// lazy layers.
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
