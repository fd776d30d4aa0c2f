package main

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// systemd tells the service manager how the daemon does (sd_notify(3)). Without one
// (NOTIFY_SOCKET not set) nothing happens.
type systemd struct {
	log    *slog.Logger
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// ready says READY=1 and, when the unit has WatchdogSec, starts to say that the
// daemon is alive as long as healthy agrees.
func (s *systemd) ready(healthy func(context.Context) error) {
	s.notify(daemon.SdNotifyReady)
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		s.log.Warn("the systemd watchdog's settings cannot be read", "error", err)
	}
	if interval <= 0 {
		return
	}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(func() {
		// Half the interval, as sd_watchdog_enabled(3) advises.
		t := time.NewTicker(interval / 2)
		defer t.Stop()
		for {
			hctx, cancel := context.WithTimeout(ctx, interval/4)
			err := healthy(hctx)
			cancel()
			if err == nil {
				s.notify(daemon.SdNotifyWatchdog)
			} else if ctx.Err() == nil {
				s.log.Error("not well; systemd will start the daemon again if this lasts", "error", err)
			}
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
	})
}

// stopping says STOPPING=1. The watchdog stays fed until stop.
func (s *systemd) stopping() { s.notify(daemon.SdNotifyStopping) }

// stop ends the watchdog's feeding.
func (s *systemd) stop() {
	if s.cancel != nil {
		s.cancel()
	}
	s.wg.Wait()
}

func (s *systemd) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("systemd cannot be notified", "state", state, "error", err)
	}
}
