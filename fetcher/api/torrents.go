package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/published"
)

// publish gives a layer of the session's image to the open swarm of a torrent, the body, for as long as the session lives.
func (s *Server) publish(w http.ResponseWriter, r *http.Request, ss *session) {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	if _, ok := partOf(ss.img, d); !ok {
		refuse(w, http.StatusNotFound, fmt.Errorf("%s is no part of %s: %w", d, ss.img.Ref, origin.ErrNotFound))
		return
	}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, published.MaxSize))
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("the torrent of %s: %w", d, err))
		return
	}
	t, err := published.Parse(text)
	if err == nil && t.Layer.Digest != d {
		err = errors.New("it is of another layer")
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, fmt.Errorf("the torrent of %s: %w", d, err))
		return
	}
	if err := ss.img.Publish(r.Context(), []*published.Torrent{t}); err != nil {
		refuse(w, http.StatusBadGateway, err)
		return
	}
	s.o.Log.Info("seeding a layer in its open swarm", "image", ss.img.Ref, "blob", d, "torrent", t.InfoHash, "private", t.Private, "uid", ss.uid)
	respond(w, struct{}{})
}

// Publish has the node give layers of the image, which it must have, to open swarms for as long as the session lives.
func (s *Session) Publish(ctx context.Context, torrents []*published.Torrent) error {
	for _, t := range torrents {
		err := s.c.call(ctx, http.MethodPost, s.path("/torrents/"+t.Layer.Digest.String()), encoded(t.Encode()), &struct{}{})
		if err != nil {
			return err
		}
	}
	return nil
}

// encoded is a body that is sent as it is.
type encoded []byte
