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
	// Layers are the layers of its snapshotter, for those who ask for each. May be nil.
	Layers func() []Layer
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
	img *fetcher.Image
	o   *origin.Client
	uid int

	// guarded by Server.mu
	used   time.Time
	busy   int
	faults map[digest.Digest]fault // why a stream broke off
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
	s.mux.HandleFunc("GET /quay/v1/peers", s.peers)
	s.mux.HandleFunc("POST /quay/v1/images", s.open)
	s.mux.HandleFunc("GET /quay/v1/images/{session}/content/{digest}", s.with(s.content))
	s.mux.HandleFunc("GET /quay/v1/images/{session}/content/{digest}/fault", s.with(s.fault))
	s.mux.HandleFunc("GET /quay/v1/images/{session}/index/{digest}", s.with(s.index))
	s.mux.HandleFunc("GET /quay/v1/images/{session}/progress", s.with(s.progress))
	s.mux.HandleFunc("POST /quay/v1/images/{session}/fetch", s.with(s.fetch))
	s.mux.HandleFunc("POST /quay/v1/images/{session}/torrents/{digest}", s.with(s.publish))
	s.mux.HandleFunc("DELETE /quay/v1/images/{session}", s.close)
	go s.expire(ctx)
	return s
}

// shutdownGrace is how long requests get to end when the daemon stops: a manifest
// or an answer does, a layer need not, for its pull goes on where it was.
const shutdownGrace = 2 * time.Second

type uidKey struct{}

// userOf is the user at the other end of a request; nobody (-1) when the kernel
// did not tell.
func userOf(r *http.Request) int {
	if uid, ok := r.Context().Value(uidKey{}).(int); ok {
		return uid
	}
	return -1
}

// Serve answers on l, a unix socket, until it is closed or ctx ends; then
// requests get a moment to end.
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
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(over)
		grace, cancel := context.WithTimeout(context.Background(), shutdownGrace)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
	})
	err := srv.Serve(l)
	if !stop() {
		<-over // requests under way end first
	}
	if !errors.Is(err, http.ErrServerClosed) && ctx.Err() == nil {
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
	s.end(func(*session) bool { return true })
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
		case now := <-t.C:
			s.endIdle(now)
		}
	}
}

func (s *Server) endIdle(now time.Time) {
	s.end(func(ss *session) bool { return ss.busy == 0 && now.Sub(ss.used) > sessionIdle })
}

// end ends the sessions for which over, called with s.mu held, is true.
func (s *Server) end(over func(*session) bool) {
	var gone []*session
	s.mu.Lock()
	for id, ss := range s.sessions {
		if over(ss) {
			delete(s.sessions, id)
			gone = append(gone, ss)
		}
	}
	s.mu.Unlock()
	for _, ss := range gone { // without the lock: closing may wait for a disk
		ss.end()
	}
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	st := s.o.Status()
	if each, _ := strconv.ParseBool(r.URL.Query().Get("layers")); each && st.Layers != nil && s.o.Layers != nil {
		st.Layers.List = s.o.Layers()
	}
	respond(w, st)
}

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
	policy, err := fetcher.ParseTorrentPolicy(req.Torrents)
	if err == nil {
		err = fetcher.CheckTrackers(req.Trackers)
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("image %q: torrents: %w", req.Ref, err))
		return
	}
	o, err := s.o.Origin(req)
	if err != nil {
		refuse(w, http.StatusInternalServerError, err)
		return
	}
	uid := userOf(r)
	img, err := s.o.Fetcher.Image(r.Context(), ref, fetcher.ImageOptions{
		Origin: o, Platform: req.Platform, SkipOrigin: req.SkipWebSeed, Offline: req.Offline, Torrents: policy, Trackers: req.Trackers,
		AllowCached: func(seen store.Ref) bool {
			return uid == 0 || seen.Access == origin.Public || o.Accepted(ref, seen.Access)
		},
	})
	if err != nil {
		_ = o.Close()
		s.o.Log.Info("image refused", "image", ref, "uid", uid, "err", err)
		refuse(w, http.StatusBadGateway, err)
		return
	}
	id := rand.Text()
	s.mu.Lock()
	full := len(s.sessions) >= maxSessions
	if !full {
		s.sessions[id] = &session{img: img, o: o, uid: uid, used: time.Now(), faults: map[digest.Digest]fault{}}
	}
	s.mu.Unlock()
	if full {
		(&session{img: img, o: o}).end()
		refuse(w, http.StatusServiceUnavailable, fmt.Errorf("too many pulls at once on this node: it has %d; try again when some have ended, or use --no-daemon", maxSessions))
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
func (s *Server) with(f func(http.ResponseWriter, *http.Request, *session)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		uid := userOf(r)
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
		f(w, r, ss)
	}
}

// content streams a manifest, the config or a layer of the session's image.
func (s *Server) content(w http.ResponseWriter, r *http.Request, ss *session) {
	img := ss.img
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
		if r.Context().Err() == nil {
			s.mu.Lock()
			ss.faults[d] = faultOf(err)
			s.mu.Unlock()
		}
		panic(http.ErrAbortHandler) // the client asks why
	}
}

// fault tells why the last stream of a part broke off; an empty one if it did
// not.
func (s *Server) fault(w http.ResponseWriter, r *http.Request, ss *session) {
	s.mu.Lock()
	f := ss.faults[digest.Digest(r.PathValue("digest"))]
	s.mu.Unlock()
	respond(w, f)
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

func (s *Server) progress(w http.ResponseWriter, _ *http.Request, ss *session) {
	respond(w, ss.img.Progress())
}

func (s *Server) fetch(w http.ResponseWriter, r *http.Request, ss *session) {
	if err := ss.img.Fetch(r.Context()); err != nil {
		refuse(w, http.StatusBadGateway, err)
		return
	}
	respond(w, struct{}{})
}

func (s *Server) close(w http.ResponseWriter, r *http.Request) {
	uid := userOf(r)
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
