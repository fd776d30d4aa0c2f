package snapshotter

import (
	"context"
	"io"
	"log/slog"

	containerdlog "github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// captureLibraryLog sends what containerd's and stargz-snapshotter's packages log to log. They use
// logrus, and a process-wide logger; the last call counts.
//
// What they say at warning and info is said again, better, by our own lines (a
// layer that is unpacked as it should be makes them warn), so that it becomes
// debug; errors stay errors.
func captureLibraryLog(log *slog.Logger) {
	l := containerdlog.L.Logger
	l.SetOutput(io.Discard)
	l.SetFormatter(&logrus.TextFormatter{DisableColors: true})
	l.ReplaceHooks(logrus.LevelHooks{})
	l.AddHook(libraryHook{log})
	l.SetLevel(logrus.InfoLevel)
	if log.Enabled(context.Background(), slog.LevelDebug) {
		l.SetLevel(logrus.DebugLevel)
	}
}

// libraryHook is a logrus hook that hands lines on.
type libraryHook struct{ log *slog.Logger }

func (libraryHook) Levels() []logrus.Level { return logrus.AllLevels }

func (h libraryHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	if e.Level <= logrus.ErrorLevel {
		level = slog.LevelError
	}
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	attrs := make([]slog.Attr, 0, len(e.Data))
	for k, v := range e.Data {
		attrs = append(attrs, slog.Any(k, v))
	}
	msg := e.Message
	if msg == "statFile error" { // how stargz reports a read that failed, also of a chunk that is not what it should be
		msg = "a file of a lazy layer could not be read"
	}
	h.log.LogAttrs(ctx, level, msg, attrs...)
	return nil
}
