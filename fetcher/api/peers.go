package api

import (
	"fmt"
	"net/http"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher"
)

// peers tells what the node knows of its neighbours and of the blobs it shares. It
// names blobs and gives none: whoever may use the socket may know.
func (s *Server) peers(w http.ResponseWriter, r *http.Request) {
	named := r.URL.Query()["digest"]
	if len(named) > fetcher.MaxReportDigests {
		refuse(w, http.StatusBadRequest, fmt.Errorf("%d blobs at once; %d are allowed", len(named), fetcher.MaxReportDigests))
		return
	}
	blobs := make([]digest.Digest, 0, len(named))
	for _, n := range named {
		d, err := digest.Parse(n)
		if err != nil {
			refuse(w, http.StatusBadRequest, fmt.Errorf("%.80q is no digest: %w", n, err))
			return
		}
		blobs = append(blobs, d)
	}
	respond(w, s.o.Fetcher.Report(blobs...))
}
