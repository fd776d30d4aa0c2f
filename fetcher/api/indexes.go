package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// index tells what the node knows of the content of a part of the image.
func (s *Server) index(w http.ResponseWriter, r *http.Request, ss *session) {
	d, err := digest.Parse(r.PathValue("digest"))
	if err != nil {
		refuse(w, http.StatusBadRequest, err)
		return
	}
	if _, ok := partOf(ss.img, d); !ok {
		refuse(w, http.StatusNotFound, fmt.Errorf("%s is no part of %s: %w", d, ss.img.Ref, origin.ErrNotFound))
		return
	}
	b, err := s.o.Fetcher.Known(r.Context(), d)
	switch {
	case errors.Is(err, fetcher.ErrNoIndex):
		refuse(w, http.StatusNotFound, fmt.Errorf("the content of %s: %w", d, origin.ErrNotFound))
		return
	case err != nil:
		refuse(w, http.StatusBadGateway, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	_, _ = w.Write(b) // the client sees that it ends too early
}

// Index is what the node knows of the content of a layer, in the form that nodes tell each other; an error that matches
// origin.ErrNotFound when it knows nothing that it has checked itself.
func (s *Session) Index(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	resp, err := s.c.do(ctx, http.MethodGet, s.path("/index/"+desc.Digest.String()), nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, cluster.MaxIndex+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("what the node daemon at %s knows of %s: %w", s.c.path, desc.Digest, err)
	case len(b) > cluster.MaxIndex:
		return nil, fmt.Errorf("what the node daemon at %s knows of %s has more than %d MiB", s.c.path, desc.Digest, cluster.MaxIndex>>20)
	}
	return b, nil
}
