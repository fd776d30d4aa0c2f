package blobfs

import (
	"log/slog"
	"testing"
	"time"
)

// message is a request as the kernel sends it.
func message(op uint32, node uint64, arg []byte) []byte {
	b := make([]byte, inHeaderSize, inHeaderSize+len(arg))
	native.PutUint32(b, uint32(inHeaderSize+len(arg)))
	native.PutUint32(b[4:], op)
	native.PutUint64(b[8:], 1234)
	native.PutUint64(b[16:], node)
	return append(b, arg...)
}

// Whatever bytes come: no panic, an answer that is well formed and not longer than
// asked for, and nothing kept beyond one record.
func FuzzRequests(f *testing.F) {
	read := make([]byte, 40)
	native.PutUint32(read[16:], 128<<10)
	for op := uint32(0); op < 52; op++ {
		f.Add(message(op, 1, read), false)
		f.Add(message(op, 2, append([]byte("a"), 0)), true)
	}
	huge := make([]byte, 40)
	native.PutUint64(huge[8:], 1<<63-1)
	native.PutUint32(huge[16:], 1<<32-1)
	f.Add(message(opRead, 2, huge), false)
	f.Add(message(opReaddir, 1, huge), false)
	f.Fuzz(func(t *testing.T, b []byte, restoring bool) {
		o := Options{Log: slog.New(slog.DiscardHandler), ReadTimeout: time.Second}
		if restoring {
			o.Restore = time.Minute
		}
		s := newServer(o)
		defer s.stop()
		s.Add(2, "a", &pattern{seed: 2, size: 300 << 10, now: true})
		s.Add(3, "b", &pattern{seed: 3, size: 10})
		w := newWorker(s)
		w.handle(b)
		w.handle(b)
		if m := w.out.msg; m != nil && (len(m) < outHeaderSize || int(native.Uint32(m)) != len(m)) {
			t.Fatalf("an answer of %d bytes says %d", len(m), native.Uint32(m))
		}
		if n := s.Stats().Waiting; n > 2 {
			t.Fatalf("%d requests wait", n)
		}
	})
}

func TestDeadly(t *testing.T) {
	for name, c := range map[string]struct {
		status string
		want   bool
	}{
		"none":           {"SigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\nSigCgt:\t0\n", false},
		"SIGKILL":        {"SigPnd:\t0000000000000100\nSigCgt:\tffffffffffffffff\n", true},
		"SIGTERM":        {"ShdPnd:\t0000000000004000\nSigBlk:\t0\nSigIgn:\t0\nSigCgt:\t0\n", true},
		"SIGTERM caught": {"ShdPnd:\t0000000000004000\nSigCgt:\t0000000000004000\n", false},
		"SIGURG":         {"SigPnd:\t0000000000400000\nSigCgt:\t0\n", false},
		"nonsense":       {"SigPnd:\tzz\n", false},
	} {
		if got := deadly(c.status); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{`/a`: "/a", `/a\040b`: "/a b", `\134`: `\`, `/a\`: `/a\`, `/a\9b12`: `/a\9b12`} {
		if got := unescape(in); got != want {
			t.Errorf("%q: %q, not %q", in, got, want)
		}
	}
}
