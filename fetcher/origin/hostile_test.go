package origin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// read reads a range, and says what came even when it ended in an error.
func read(t *testing.T, r *Repository, f *fake, off, n int64) ([]byte, error) {
	t.Helper()
	s, err := r.Open(testContext(t), f.layerDesc, off, n)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	b, err := io.ReadAll(s)
	if !bytes.Equal(b, f.layer[s.Offset():s.Offset()+int64(len(b))]) {
		t.Errorf("wrong bytes came: %s", sum(b))
	}
	return b, err
}

// first lets only the first n requests to path meet the vice.
func first(n int32, vice func(*fake)) func(*fake) {
	return func(f *fake) {
		vice(f)
		inner := f.intercept
		var met atomic.Int32
		f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			return strings.Contains(r.URL.Path, "/blobs/") && met.Add(1) <= n && inner(w, r)
		}
	}
}

// TestAnswers: statuses that pass are waited for, others are named.
func TestAnswers(t *testing.T) {
	for _, tc := range []struct {
		name     string
		vices    func(*fake)
		want     error // nil: the blob comes
		requests int
		text     string
	}{
		{"500 twice", first(2, status("/blobs/", 500, nil, "")), nil, 3, ""},
		{"500 always", status("/blobs/", 500, nil, "<html>"), ErrUnavailable, 5, "500 Internal Server Error"},
		{"502 always", status("/blobs/", 502, nil, ""), ErrUnavailable, 5, ""},
		{"501", status("/blobs/", 501, nil, ""), ErrUnexpected, 1, ""},
		{"429 twice", first(2, status("/blobs/", 429, nil, "")), nil, 3, ""},
		{"429 always", status("/blobs/", 429, nil, `{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}`), ErrRateLimited, 5, "TOOMANYREQUESTS: slow down"},
		{"429 with an hour", status("/blobs/", 429, http.Header{"Retry-After": {"3600"}}, ""), ErrRateLimited, 5, "docker login"},
		{"503 with a date", first(1, status("/blobs/", 503, http.Header{"Retry-After": {"Fri, 31 Dec 2100 23:59:59 GMT"}}, "")), nil, 2, ""},
		{"503 always, with a pause", status("/blobs/", 503, http.Header{"Retry-After": {"1"}}, ""), ErrUnavailable, 5, ""},
		{"403", status("/blobs/", 403, nil, `{"errors":[{"code":"DENIED","message":"no"}]}`), ErrDenied, 1, "DENIED: no"},
		{"401 without challenge", status("/blobs/", 401, nil, ""), ErrDenied, 1, "does not exist or needs a login"},
		{"404", status("/blobs/", 404, nil, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`), ErrNotFound, 1, "BLOB_UNKNOWN"},
		{"416", status("/blobs/", 416, nil, ""), ErrMismatch, 1, "shorter"},
		{"204", status("/blobs/", 204, nil, ""), ErrUnexpected, 1, ""},
		{"304", status("/blobs/", 304, nil, ""), ErrUnexpected, 1, ""},
		{"302 to nowhere", status("/blobs/", 302, nil, ""), ErrUnexpected, 1, ""},
		{"302 to a file", status("/blobs/", 302, http.Header{"Location": {"file:///etc/passwd"}}, ""), ErrUnexpected, 1, "not HTTP"},
		{"redirect loop", func(f *fake) {
			status("/blobs/", 307, http.Header{"Location": {"?again"}}, "")(f)
		}, ErrUnexpected, 6, "redirects more than"},
		{"garbage", status("/blobs/", 404, nil, "\x1b[2Jgone\r\n\u202eevil"), ErrNotFound, 1, "[2Jgone evil"},
		{"encoded", status("/blobs/", 200, http.Header{"Content-Encoding": {"gzip"}}, "x"), ErrMismatch, 1, "encoded"},
		{"another length", status("/blobs/", 200, http.Header{"Content-Length": {"3"}}, "abc"), ErrMismatch, 1, "the manifest says 300000"},
		{"206 without range", status("/blobs/", 206, nil, "abc"), ErrMismatch, 1, "Content-Range"},
		{"206 of another range", status("/blobs/", 206, http.Header{"Content-Range": {"bytes 1-3/300000"}}, "abc"), ErrMismatch, 1, "came for"},
		{"206 of more", status("/blobs/", 206, http.Header{"Content-Range": {"bytes 0-200000/300000"}}, "abc"), ErrMismatch, 1, "came for"},
		{"206 of another blob", status("/blobs/", 206, http.Header{"Content-Range": {"bytes 0-2/3"}}, "abc"), ErrMismatch, 1, "the manifest says"},
		{"206 of another length", status("/blobs/", 206, http.Header{"Content-Range": {"bytes 0-3/300000"}, "Content-Length": {"3"}}, "abc"), ErrMismatch, 1, "announced"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t, false, tc.vices)
			r := f.open(t, Options{}, func(l *limits) { l.pause = 5 * time.Millisecond })
			_, err := read(t, r, f, 0, 100_000)
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v, want %v", err, tc.want)
			}
			if n := f.count("/blobs/"); n != tc.requests {
				t.Errorf("%d requests, want %d", n, tc.requests)
			}
			if err == nil {
				return
			}
			var e *Error
			if !errors.As(err, &e) || e.Host != f.host() || !strings.Contains(err.Error(), f.repo+"@"+string(f.layerDesc.Digest)) {
				t.Errorf("names neither host nor blob: %v", err)
			}
			if !strings.Contains(err.Error(), tc.text) || strings.ContainsAny(err.Error(), "\x1b\r\n\u202e") {
				t.Errorf("got %q, want %q in it", err, tc.text)
			}
		})
	}
}

// TestPauseIsShared: while a host wants to be left alone no stream asks it anything.
func TestPauseIsShared(t *testing.T) {
	const pause = 150 * time.Millisecond
	var refused, early atomic.Int64
	f := newFake(t, false, func(f *fake) {
		f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			now := time.Now().UnixNano()
			if refused.CompareAndSwap(0, now) {
				w.Header().Set("Retry-After", "30")
				w.WriteHeader(http.StatusServiceUnavailable)
				return true
			}
			if time.Duration(now-refused.Load()) < pause {
				early.Add(1)
			}
			return false
		}
	})
	r := f.open(t, Options{}, func(l *limits) { l.pause = pause })
	other := open(t, r.client, f.host()+"/test/other")
	s, err := r.Open(testContext(t), f.layerDesc, 0, 10)
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	refused.Store(0)
	var wg sync.WaitGroup
	begun := make(chan struct{})
	wg.Go(func() { close(begun); read(t, r, f, 0, 10) })
	<-begun
	for {
		if left, _ := r.client.pauses.left(f.host()); left > 0 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	for range 4 {
		wg.Go(func() { read(t, r, f, 100, 10) })
		wg.Go(func() { other.Manifest(testContext(t), "latest") })
	}
	wg.Wait()
	if n := early.Load(); n > 0 {
		t.Errorf("%d requests came during the pause", n)
	}
}

// TestRedirectIsReused: one resolution serves many ranges, and is made again when the URL is refused.
func TestRedirectIsReused(t *testing.T) {
	for _, tc := range []struct{ serves, ranges, resolved int }{{0, 10, 1}, {3, 9, 3}, {1, 4, 4}} {
		f := newFake(t, false, func(f *fake) { f.redirect, f.serves = true, tc.serves })
		r := f.open(t, Options{}, nil)
		for i := range tc.ranges {
			if b, err := read(t, r, f, int64(i)*1000, 1000); err != nil || len(b) != 1000 {
				t.Fatalf("range %d: %d bytes, %v", i, len(b), err)
			}
		}
		if n := f.count("/blobs/"); n != tc.resolved {
			t.Errorf("a URL good for %d requests was resolved %d times for %d ranges, want %d", tc.serves, n, tc.ranges, tc.resolved)
		}
		if n := r.client.Stats().Redirects; n != int64(tc.resolved) {
			t.Errorf("Stats().Redirects = %d", n)
		}
	}
	t.Run("never good", func(t *testing.T) {
		f := newFake(t, false, func(f *fake) {
			f.redirect = true
			status("/storage/", 403, nil, "<Error><Code>AccessDenied</Code></Error>")(f)
		})
		_, err := read(t, f.open(t, Options{}, nil), f, 0, 10)
		if !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "AccessDenied") || strings.Contains(err.Error(), "sig=") {
			t.Fatalf("got %v", err)
		}
		if n := len(f.requests()); n != 2 {
			t.Errorf("%d requests", n)
		}
	})
}

// TestCuts: how long a stream insists.
func TestCuts(t *testing.T) {
	t.Run("no ranges, cut twice", func(t *testing.T) {
		var n atomic.Int32
		f := newFake(t, false, func(f *fake) {
			f.noRanges, f.cut = true, 100_000
			f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if n.Add(1) > 2 {
					f.cut = 0
				}
				return false
			}
		})
		if _, err := read(t, f.open(t, Options{}, nil), f, 0, -1); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("no ranges, cut always", func(t *testing.T) {
		f := newFake(t, false, func(f *fake) { f.noRanges, f.cut = true, 100_000 })
		b, err := read(t, f.open(t, Options{}, nil), f, 1000, 1000)
		if !errors.Is(err, ErrUnavailable) || len(b) == 0 || len(b) > 100_000 {
			t.Fatalf("got %d bytes, %v", len(b), err)
		}
		if n := f.count("/blobs/"); n != 5 {
			t.Errorf("%d requests", n)
		}
	})
	t.Run("headers, but never a byte", func(t *testing.T) {
		f := newFake(t, false, func(f *fake) {
			f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				w.Header().Set("Content-Length", "300000")
				w.WriteHeader(200)
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
		})
		_, err := read(t, f.open(t, Options{}, nil), f, 0, -1)
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "5 connections in a row") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a chunked body that ends early", func(t *testing.T) {
		f := newFake(t, false, status("/blobs/", 206, http.Header{"Content-Range": {"bytes 0-99/300000"}, "Transfer-Encoding": {"chunked"}}, "short"))
		s, err := f.open(t, Options{}, nil).Open(testContext(t), f.layerDesc, 0, 100)
		if err == nil {
			_, err = io.Copy(io.Discard, s)
			s.Close()
		}
		if !errors.Is(err, ErrMismatch) || !strings.Contains(err.Error(), "ended at byte 5") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a chunked body that goes on", func(t *testing.T) {
		f := newFake(t, false, status("/blobs/", 206, http.Header{"Content-Range": {"bytes 0-4/300000"}, "Transfer-Encoding": {"chunked"}}, "12345surplus"))
		s, err := f.open(t, Options{}, nil).Open(testContext(t), f.layerDesc, 0, 5)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		b, err := io.ReadAll(s)
		if string(b) != "12345" || !errors.Is(err, ErrMismatch) {
			t.Fatalf("got %q, %v", b, err)
		}
	})
}

// silence sends a little of each blob and then nothing.
func silence(bytes int64) func(*fake) {
	return func(f *fake) {
		f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			f.blob(&mute{ResponseWriter: w, left: bytes, done: r.Context()}, r)
			return true
		}
	}
}

type mute struct {
	http.ResponseWriter
	left int64
	done context.Context
}

func (m *mute) Write(p []byte) (int, error) {
	if int64(len(p)) > m.left {
		m.ResponseWriter.Write(p[:m.left])
		m.ResponseWriter.(http.Flusher).Flush()
		<-m.done.Done()
		panic(http.ErrAbortHandler)
	}
	m.left -= int64(len(p))
	return m.ResponseWriter.Write(p)
}

func TestStall(t *testing.T) {
	t.Run("goes on", func(t *testing.T) {
		f := newFake(t, false, silence(40_000))
		if _, err := read(t, f.open(t, Options{StallTimeout: 50 * time.Millisecond}, nil), f, 0, -1); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("gives up", func(t *testing.T) {
		f := newFake(t, false, silence(0))
		_, err := read(t, f.open(t, Options{StallTimeout: 20 * time.Millisecond}, nil), f, 0, -1)
		if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no byte came") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("close ends a read", func(t *testing.T) {
		f := newFake(t, false, silence(10))
		s, err := f.open(t, Options{}, nil).Open(testContext(t), f.layerDesc, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		var begun sync.Once
		started := make(chan struct{})
		go func() {
			b := make([]byte, 5)
			for {
				if _, err := s.Read(b); err != nil {
					done <- err
					return
				}
				begun.Do(func() { close(started) })
			}
		}()
		<-started
		s.Close()
		if err := <-done; err == nil || err == io.EOF {
			t.Fatalf("got %v", err)
		}
	})
}

// TestManifestIsChecked walks what may be wrong with one.
func TestManifestIsChecked(t *testing.T) {
	big := strings.Repeat(" ", maxManifest+1)
	for _, tc := range []struct {
		name  string
		vices func(*fake)
		want  error
	}{
		{"announced too large", status("/manifests/", 200, http.Header{"Content-Length": {fmt.Sprint(len(big))}}, big), ErrTooLarge},
		{"endless", status("/manifests/", 200, http.Header{"Transfer-Encoding": {"chunked"}}, big), ErrTooLarge},
		{"other bytes", status("/manifests/", 200, http.Header{"Content-Type": {dockerManifest}}, `{"config":{},"layers":[]}`), ErrMismatch},
		{"not JSON", status("/manifests/", 200, nil, `<html>please log in`), ErrMismatch},
		{"a part", status("/manifests/", 206, nil, `{}`), ErrMismatch},
		{"denied", status("/manifests/", 403, nil, ``), ErrDenied},
		{"gone", status("/manifests/", 404, nil, ``), ErrNotFound},
		{"broken", status("/manifests/", 500, nil, ``), ErrUnavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFake(t, false, tc.vices)
			_, _, err := f.open(t, Options{}, nil).Manifest(testContext(t), string(f.desc.Digest))
			if !errors.Is(err, tc.want) {
				t.Fatalf("got %v", err)
			}
		})
	}
	t.Run("tag with a wrong digest header", func(t *testing.T) {
		f := newFake(t, false, nil)
		f.manifest = append(f.manifest, ' ')
		if _, _, err := f.open(t, Options{}, nil).Manifest(testContext(t), "latest"); !errors.Is(err, ErrMismatch) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("cut twice", func(t *testing.T) {
		var n atomic.Int32
		f := newFake(t, false, func(f *fake) {
			f.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if n.Add(1) > 2 {
					return false
				}
				w.Header().Set("Content-Length", "100")
				io.WriteString(w, "{")
				w.(http.Flusher).Flush()
				panic(http.ErrAbortHandler)
			}
		})
		if _, _, err := f.open(t, Options{}, nil).Manifest(testContext(t), "latest"); err != nil {
			t.Fatal(err)
		}
	})
	for _, bad := range []string{"", "a/b", "../x", "x?y", "sha256:1", "sha256:../..", "md9:abc"} {
		f := newFake(t, false, nil)
		if _, _, err := f.open(t, Options{}, nil).Manifest(testContext(t), bad); err == nil || len(f.requests()) > 0 {
			t.Errorf("%q: %v after %d requests", bad, err, len(f.requests()))
		}
	}
}

// TestUnreachable: refused, unknown and mute hosts are told apart from others, and soon.
func TestUnreachable(t *testing.T) {
	dead := httptest.NewServer(nil)
	dead.Close()
	c := newClient(t, Options{}, func(l *limits) { *l = defaultLimits })
	start := time.Now()
	_, _, err := open(t, c, dead.Listener.Addr().String()+"/x").Manifest(testContext(t), "latest")
	if d := time.Since(start); !errors.Is(err, ErrUnavailable) || d > 3*time.Second {
		t.Fatalf("after %v: %v", d, err)
	}
	if n := c.Stats().Retries; n != int64(defaultLimits.retriesRefused) {
		t.Errorf("%d retries", n)
	}
}
