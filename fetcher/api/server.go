package api

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// ServerOptions configures a Server. Fetcher, Origin and Status are required.
type ServerOptions struct {
	Fetcher *fetcher.Fetcher
	// Origin makes a registry client that uses the given credentials and no
	// others.
	Origin func(req ImageRequest) (*origin.Client, error)
	// Status describes the node.
	Status func() Status
	// Opened is told of each image that was resolved, with the client that
	// could; it is how the snapshotter gets at layers that the node's own
	// credentials do not open. May be nil.
	Opened func(ref reference.Named, o *origin.Client)
	Log    *slog.Logger
}

// Server serves the node API. It is safe for concurrent use; Close ends its
// sessions.
type Server struct {
	o    ServerOptions
	mux  *http.ServeMux
	stop context.CancelFunc
	done chan struct{}

	mu       sync.Mutex // guards following
	sessions map[string]*session
}

type session struct {
	img  *fetcher.Image
	o    *origin.Client
	uid  int
	used time.Time
	busy int
}

// end gives back what a session holds. Streams that others began with its
// client go on.
func (ss *session) end() {
	_ = ss.img.Close()
	_ = ss.o.Close()
}

// NewServer returns a server; serve it with Serve.
func NewServer(o ServerOptions) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{o: o, mux: http.NewServeMux(), stop: cancel, done: make(chan struct{}), sessions: map[string]*session{}}
	s.mux.HandleFunc("GET /quay/v1/status", s.status)
	s.mux.HandleFunc("POST /quay/v1/images", s.open)
	s.mux.HandleFunc("GET /quay/v1/images/{session}/content/{digest}", s.with(s.content))
	s.mux.HandleFunc("GET /quay/v1/images/{session}/progress", s.with(s.progress))
	s.mux.HandleFunc("POST /quay/v1/images/{session}/fetch", s.with(s.fetch))
	s.mux.HandleFunc("DELETE /quay/v1/images/{session}", s.close)
	go s.expire(ctx)
	return s
}

type uidKey struct{}

// Serve answers on l, a unix socket, until it is closed or ctx ends.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	srv := &http.Server{
		Handler:           s.mux,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(s.o.Log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, uidKey{}, uidOf(c))
		},
	}
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
	})
	defer stop()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
		return err
	}
	return nil
}

// uidOf returns the user at the other end of a unix socket, -1 when unknown.
func uidOf(c net.Conn) int {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return -1
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return -1
	}
	uid := -1
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = int(cred.Uid)
		}
	})
	return uid
}

// Close ends all sessions.
func (s *Server) Close() {
	s.stop()
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, ss := range s.sessions {
		delete(s.sessions, id)
		ss.end()
	}
}

// expire ends sessions that were left behind.
func (s *Server) expire(ctx context.Context) {
	defer close(s.done)
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		s.mu.Lock()
		for id, ss := range s.sessions {
			if ss.busy == 0 && time.Since(ss.used) > sessionIdle {
				delete(s.sessions, id)
				ss.end()
			}
		}
		s.mu.Unlock()
	}
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) { respond(w, s.o.Status()) }

func (s *Server) open(w http.ResponseWriter, r *http.Request) {
	var req ImageRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, maxRequest)).Decode(&req); err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("malformed request: %w", err))
		return
	}
	ref, err := reference.ParseNormalizedNamed(req.Ref)
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("image %q: %w", req.Ref, err))
		return
	}
	o, err := s.o.Origin(req)
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	uid, _ := r.Context().Value(uidKey{}).(int)
	img, err := s.o.Fetcher.Image(r.Context(), ref, fetcher.ImageOptions{
		Origin: o, Platform: req.Platform, SkipOrigin: req.SkipWebSeed,
		AllowCached: func(seen store.Ref) bool {
			return uid == 0 || seen.Access == origin.Public || o.Accepted(ref, seen.Access)
		},
	})
	if err != nil {
		s.o.Log.Info("image refused", "image", ref, "uid", uid, "err", err)
		refuse(w, http.StatusBadGateway, err)
		return
	}
	id := rand.Text()
	s.mu.Lock()
	full := len(s.sessions) >= maxSessions
	if !full {
		s.sessions[id] = &session{img: img, o: o, uid: uid, used: time.Now()}
	}
	s.mu.Unlock()
	if full {
		_ = img.Close()
		refuse(w, http.StatusServiceUnavailable, errors.New("too many pulls at once on this node"))
		return
	}
	if s.o.Opened != nil && !req.SkipWebSeed {
		s.o.Opened(ref, o)
	}
	s.o.Log.Info("image opened", "image", img.Ref, "digest", img.Target.Digest, "uid", uid)
	respond(w, Image{
		Session: id, Ref: img.Ref.String(), Target: img.Target, Manifest: img.Manifest,
		Config: img.Config, Layers: img.Layers, Note: img.Note,
	})
}

// with finds the session of a request and keeps it alive meanwhile. A session
// belongs to the user who opened it.
func (s *Server) with(f func(http.ResponseWriter, *http.Request, *fetcher.Image)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		uid, _ := r.Context().Value(uidKey{}).(int)
		s.mu.Lock()
		ss := s.sessions[r.PathValue("session")]
		if ss == nil || ss.uid != uid {
			s.mu.Unlock()
			refuse(w, http.StatusNotFound, errors.New("no such session; it may have ended with the daemon: pull again"))
			return
		}
		ss.busy++
		ss.used = time.Now()
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			ss.busy--
			ss.used = time.Now()
			s.mu.Unlock()
		}()
		f(w, r, ss.img)
	}
}

// content streams a manifest, the config or a layer of the session's image.
func (s *Server) content(w http.ResponseWriter, r *http.Request, img *fetcher.Image) {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	desc, ok := partOf(img, d)
	if !ok {
		refuse(w, http.StatusNotFound, fmt.Errorf("%s is no part of %s: %w", d, img.Ref, origin.ErrNotFound))
		return
	}
	body, err := img.Open(r.Context(), desc)
	if err != nil {
		refuse(w, http.StatusBadGateway, err)
		return
	}
	defer body.Close()
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(desc.Size, 10))
	if f, ok := w.(http.Flusher); ok {
		f.Flush()
	}
	if _, err := io.Copy(w, body); err != nil {
		panic(http.ErrAbortHandler) // the client asks progress why
	}
}

// partOf returns the descriptor of a part of the image.
func partOf(img *fetcher.Image, d digest.Digest) (ocispec.Descriptor, bool) {
	for _, c := range append([]ocispec.Descriptor{img.Target, img.Manifest, img.Config}, img.Layers...) {
		if c.Digest == d {
			return c, true
		}
	}
	return ocispec.Descriptor{}, false
}

func (s *Server) progress(w http.ResponseWriter, _ *http.Request, img *fetcher.Image) {
	respond(w, img.Progress())
}

func (s *Server) fetch(w http.ResponseWriter, r *http.Request, img *fetcher.Image) {
	if err := img.Fetch(r.Context()); err != nil {
		refuse(w, http.StatusBadGateway, err)
		return
	}
	respond(w, struct{}{})
}

func (s *Server) close(w http.ResponseWriter, r *http.Request) {
	uid, _ := r.Context().Value(uidKey{}).(int)
	id := r.PathValue("session")
	s.mu.Lock()
	ss := s.sessions[id]
	if ss != nil && ss.uid == uid {
		delete(s.sessions, id)
	} else {
		ss = nil
	}
	s.mu.Unlock()
	if ss != nil {
		ss.end()
	}
	respond(w, struct{}{})
}

func respond(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, status int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Del("Content-Length")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(faultOf(err))
}
