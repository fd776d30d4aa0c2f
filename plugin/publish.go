package plugin

import (
	"context"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

// publish makes torrents of layers that are here, puts them beside the image, and has them seeded for as long as src is open.
func (opts *torrentOptions) publish(ctx context.Context, o Options, req Request, src Source, layers []ocispec.Descriptor, reporter *progress.Reporter) error {
	torrents := make([]*published.Torrent, 0, len(layers))
	for _, l := range layers {
		t, err := opts.make(ctx, src, l, false)
		if err != nil {
			return err
		}
		torrents = append(torrents, t)
	}
	if err := o.Publish(ctx, req, src.Manifest(), torrents); err != nil {
		return err
	}
	reporter.Say("Published the torrents of %d layers beside %s", len(torrents), src.Ref())
	return src.Publish(ctx, torrents)
}

// StoreTorrents puts torrents beside an image, into its registry, with the user's own login.
func StoreTorrents(ctx context.Context, r Request, subject ocispec.Descriptor, torrents []*published.Torrent) error {
	c, err := origin.New(origin.Options{
		DockerConfigDir: r.DockerConfigDir, Insecure: r.Insecure, UserAgent: "docker-quay/" + fetcher.Version, Log: r.Log,
	})
	if err != nil {
		return err
	}
	defer c.Close()
	repo, err := c.Repository(r.Ref)
	if err != nil {
		return err
	}
	return published.Store(ctx, repo, subject, torrents)
}
