package layerfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/snapshotter/blobfs"
	"github.com/docker-quay/docker-quay/snapshotter/keeper"
)

const (
	// restoreWithin is how long reads of the former daemon's files wait for Restore, which takes
	// tens of milliseconds.
	restoreWithin = time.Minute
	// lookEvery is how often it is made sure that the keeper lives. Its death does no harm as long as
	// this process lives.
	lookEvery = 5 * time.Second
	// linkTimeout bounds what is asked of the keeper at the start and the end.
	linkTimeout = 20 * time.Second
)

// link is the daemon's part in blobfs: the connection, its server, and the keeper.
type link struct {
	point  string // the mountpoint
	socket string
	keeper []string
	log    *slog.Logger

	kept   keeper.Store
	own    bool // kept is a process of ours
	dev    *os.File
	taken  bool
	server *blobfs.Server
	cancel context.CancelFunc
	done   chan struct{}
	err    error // of the server; set before done is closed
}

// newLink takes over the connection of a former daemon, or makes one.
func newLink(ctx context.Context, o Options) (*link, error) {
	return newLinkBy(ctx, o, (*blobfs.Server).Resend)
}

// newLinkBy is newLink with what has the kernel send again what the former daemon did not answer.
func newLinkBy(ctx context.Context, o Options, resend func(*blobfs.Server) error) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkTimeout)
	defer cancel()
	l := &link{point: blobsOf(o.State), socket: o.Socket, keeper: o.Keeper, log: o.Log}
	if err := l.open(ctx, o.Beside); err != nil {
		return nil, err
	}
	if err := l.begin(ctx); err != nil {
		return nil, errors.Join(err, l.kept.Close())
	}
	if !l.taken {
		return l, nil
	}
	if err := resend(l.server); err != nil {
		// What the former daemon had read and not answered is lost: its readers would wait for ever.
		o.Log.Error("the former daemon's connection cannot be gone on with, so all layers are mounted anew: containers on layers that are not complete get errors, and have to be started again", "error", err)
		l.cancel()
		<-l.done
		if err := errors.Join(abort(l.point), l.server.Close(), l.dev.Close()); err != nil {
			return nil, errors.Join(err, l.kept.Close())
		}
		if err := l.begin(ctx); err != nil {
			return nil, errors.Join(err, l.kept.Close())
		}
	}
	return l, nil
}

// open finds or starts who keeps the connection.
func (l *link) open(ctx context.Context, beside keeper.Store) error {
	err := keeper.Start(ctx, l.socket, l.keeper)
	var own *keeper.Client
	if err == nil {
		own, err = keeper.Dial(ctx, l.socket)
	}
	switch {
	case err == nil && beside == nil:
		l.own, l.kept = true, own
	case err == nil:
		l.own, l.kept = true, keeper.NewBoth(own, beside, func(err error) {
			l.log.Warn("systemd does not keep the connection of layers: if the keeper is killed along with the daemon, containers on layers that are not complete get errors", "error", err)
		})
	case beside != nil:
		l.log.Warn("there is no keeper, so systemd alone keeps the connection of layers", "error", err)
		l.kept = beside
	default:
		return err
	}
	return nil
}

// begin has the connection served: the former daemon's where there is one.
func (l *link) begin(ctx context.Context) (err error) {
	if l.dev, l.taken, err = blobfs.Connect(ctx, l.kept, l.point); err != nil {
		return err
	}
	restore := time.Duration(0)
	if l.taken {
		restore = restoreWithin
		// Whoever keeps it may have been started since.
		if err := blobfs.Keep(ctx, l.kept, l.point, l.dev); err != nil {
			return errors.Join(err, l.dev.Close())
		}
	}
	l.server = blobfs.New(l.dev, blobfs.Options{Restore: restore, Log: l.log})
	sctx, stop := context.WithCancel(context.Background())
	l.cancel, l.done = stop, make(chan struct{})
	go func() {
		defer close(l.done)
		l.err = l.server.Run(sctx)
	}()
	return nil
}

func blobsOf(state string) string { return filepath.Join(state, "blobs") }

// path is that of a file in blobfs.
func (l *link) path(name string) string { return filepath.Join(l.point, name) }

// watch starts a keeper again that was lost, until ctx ends.
func (l *link) watch(ctx context.Context) {
	for l.own && sleep(ctx, lookEvery) == nil {
		if _, err := keeper.Dial(ctx, l.socket); err == nil || ctx.Err() != nil {
			continue
		}
		err := keeper.Start(ctx, l.socket, l.keeper)
		if err == nil {
			err = blobfs.Keep(ctx, l.kept, l.point, l.dev)
		}
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			l.log.Error("the keeper ended and cannot be started again: if the daemon is killed now, containers on layers that are not complete get errors", "error", err)
			continue
		}
		l.log.Warn("the keeper had ended and was started again")
	}
}

// stop ends the server; what it has not answered waits for the next one.
func (l *link) stop() error {
	l.cancel()
	<-l.done
	return l.err
}

// close lets go of the connection, which the keeper keeps.
func (l *link) close() error {
	return errors.Join(l.server.Close(), l.dev.Close(), l.kept.Close())
}

// destroy ends server, connection, mount and keeper, for good.
func (l *link) destroy() error {
	l.cancel()
	<-l.done
	ctx, cancel := context.WithTimeout(context.Background(), linkTimeout)
	defer cancel()
	errs := []error{abort(l.point)}
	names, err := l.kept.List(ctx)
	errs = append(errs, err)
	for _, n := range names {
		if err := l.kept.Drop(ctx, n); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, l.close())
	if l.own {
		errs = append(errs, keeper.End(ctx, l.socket))
	}
	return errors.Join(errs...)
}

// abort ends the connection of a blobfs that has no server: reads that wait fail. Nothing
// is asked of it that would have to be answered.
func abort(point string) error {
	for range mountsBelow {
		_ = unix.Unmount(point, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW) // aborts also when it is busy
		err := unix.Unmount(point, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil
		default:
			return fmt.Errorf("%s cannot be unmounted: %w", point, err)
		}
	}
	return nil
}

// Abandon ends what a daemon that runs no more has left for the next one: its connection, so that no
// mount waits for it, and its keeper. The mounts of layers are the caller's.
func Abandon(ctx context.Context, state, socket string) error {
	if err := abort(blobsOf(state)); err != nil {
		return err
	}
	return keeper.End(ctx, socket)
}
