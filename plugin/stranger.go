package plugin

import (
	"context"
	"errors"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// Stranger is what somebody without any login gets of an image from its registry.
type Stranger struct {
	// Public: its manifest may be read.
	Public bool
	// WebSeed is the URL at which the registry gives its layers even without a token, with {digest} for the layer's; "" when it does
	// not.
	WebSeed string
}

// AskAsStranger asks an image's registry as somebody without any login: for the image's manifest, and for one of its layers. An error
// means that the registry did not say; a refusal is an answer.
func AskAsStranger(ctx context.Context, r Request, manifest, layer digest.Digest) (Stranger, error) {
	c, err := origin.New(origin.Options{
		Credentials: func(string) (string, string, error) { return "", "", nil },
		Insecure:    r.Insecure, UserAgent: "docker-quay/" + fetcher.Version, Log: r.Log,
		MaxRetries: -1, // the same registry has just given us the image
	})
	if err != nil {
		return Stranger{}, err
	}
	defer c.Close()
	repo, err := c.Repository(r.Ref)
	if err != nil {
		return Stranger{}, err
	}
	_, _, err = repo.Manifest(ctx, manifest.String())
	switch {
	case errors.Is(err, origin.ErrDenied), errors.Is(err, origin.ErrNotFound):
		return Stranger{}, nil
	case err != nil:
		return Stranger{}, err
	}
	// hosts.toml may bring along what lets us in: then we are no stranger.
	s := Stranger{Public: repo.Access() == origin.Public}
	if u, err := repo.WebSeed(ctx, layer); err == nil && s.Public {
		s.WebSeed = strings.Replace(u, layer.String(), digestPlace, 1)
	}
	return s, ctx.Err()
}
