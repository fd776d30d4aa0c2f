package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
)

// shutdownTimeout bounds the end of everything after a signal. systemd waits 90 s
// before it kills; containerd's calls take milliseconds, or up to mountTimeout of package lazy.
const shutdownTimeout = 20 * time.Second

// Service is one thing the daemon serves. It listens already when it is made.
type Service interface {
	Name() string                       // for the log: what, and where it listens
	Serve() error                       // until Shutdown (nil) or a failure
	Shutdown(ctx context.Context) error // bounded by ctx; also when Serve was never called
}

// Options are how Run is told about the process it runs in. The functions may be nil.
type Options struct {
	Version  string
	Self     string // see Deps
	Log      *slog.Logger
	Ready    func(healthy func(context.Context) error) // everything is served from now on
	Stopping func()                                    // the end has begun
}

// Run runs the node until ctx ends, which is an orderly end and no error, or until
// one of its services fails.
func Run(ctx context.Context, cfg Config, o Options) (err error) {
	captureLibraryLog(o.Log)
	defer limitCPUs(cfg.Limits.CPUs, ownCgroup(), o.Log)()
	for _, dir := range []struct {
		path string
		mode os.FileMode
	}{
		{cfg.Root, 0o711},  // containerd's children stat snapshots in it; what is inside has its own modes
		{cfg.State, 0o755}, // the API socket's group looks in here
	} {
		if err := os.MkdirAll(dir.path, dir.mode); err != nil {
			return fmt.Errorf("a folder of the daemon cannot be made: %w", err)
		}
	}
	node, err := NewNode(ctx, cfg, o.Version, o.Log)
	if err != nil {
		return err
	}
	stop := func(fn func(context.Context) error) {
		if fn == nil {
			return
		}
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		err = errors.Join(err, fn(sctx))
	}
	defer func() { stop(node.Close) }()
	services := node.Services
	layers := new(layerMetrics)
	if l := cfg.Metrics.Listen; l != "" {
		m, merr := newMetrics(l, node.Metrics, layers)
		if merr != nil {
			stop(shutdownAll(services))
			return merr
		}
		services = append(services, m)
	}
	sn, serr := New(ctx, cfg, Deps{Layers: node.Layers, Self: o.Self, Log: o.Log})
	if serr != nil {
		stop(shutdownAll(services))
		return serr
	}
	services = append(services, sn)
	node.Mounts(sn)
	layers.serve(sn.sn.layers)
	node.Tell(sn.Tell)

	g, gctx := errgroup.WithContext(ctx)
	for _, s := range services {
		o.Log.Info("serving", "service", s.Name())
		g.Go(func() error {
			if err := s.Serve(); err != nil {
				return fmt.Errorf("%s failed: %w", s.Name(), err)
			}
			return nil
		})
	}
	o.Log.Info("ready", "version", o.Version, "root", cfg.Root, "lazy", cfg.Snapshotter.Lazy && node.Layers != nil)
	if o.Ready != nil {
		o.Ready(sn.Healthy)
	}
	<-gctx.Done()
	o.Log.Info("stopping")
	if o.Stopping != nil {
		o.Stopping()
	}
	stop(shutdownAll(services))
	return errors.Join(g.Wait(), err)
}

// shutdownAll shuts services down side by side.
func shutdownAll(services []Service) func(context.Context) error {
	return func(ctx context.Context) error {
		var g errgroup.Group
		for _, s := range services {
			g.Go(func() error {
				if err := s.Shutdown(ctx); err != nil {
					return fmt.Errorf("%s did not shut down in order: %w", s.Name(), err)
				}
				return nil
			})
		}
		return g.Wait()
	}
}
