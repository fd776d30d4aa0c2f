package target

import (
	"context"
	"fmt"
	"net"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/moby/moby/client"
)

// dialable opens and closes a connection.
func dialable(path string) error {
	conn, err := net.DialTimeout("unix", path, dialTimeout)
	if err != nil {
		return fmt.Errorf("containerd at %s: %w", path, err)
	}
	return conn.Close()
}

// belongsTo looks whether docker's images are in this containerd, by the first that has a name. An engine without
// images proves nothing: seenBy will.
func (t *Containerd) belongsTo(ctx context.Context, api DockerAPI) error {
	list, err := api.ImageList(ctx, client.ImageListOptions{})
	if err != nil {
		return err
	}
	for _, i := range list.Items {
		for _, tag := range i.RepoTags {
			ref, err := reference.ParseNormalizedNamed(tag)
			if err != nil {
				continue
			}
			_, err = t.client.ImageService().Get(namespaces.WithNamespace(ctx, t.namespace), ref.String())
			if errdefs.IsNotFound(err) {
				return fmt.Errorf("the containerd at %s lacks %s, which docker has: it is another's", t.address, tag)
			}
			return err
		}
	}
	return nil
}

// seenBy asks docker for the image that was put into its containerd.
func seenBy(ctx context.Context, api DockerAPI, t *Containerd, img Image) error {
	got, err := api.ImageInspect(ctx, name(img.Ref()))
	switch {
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%s was put into the containerd at %s, but the Docker Engine at %s does not see it, so it must use another: name its socket with --containerd-address, or use `--to classic`: %w",
			familiar(img.Ref()), t.address, api.DaemonHost(), ErrRefused)
	case err != nil:
		return fmt.Errorf("ask docker for %s: %w", familiar(img.Ref()), err)
	case got.ID != img.Target().Digest.String() && got.ID != img.Manifest().Digest.String() && got.ID != img.Config().Digest.String():
		return fmt.Errorf("docker has %s under the name %s instead of %s: %w", got.ID, familiar(img.Ref()), img.Target().Digest, ErrRefused)
	}
	return nil
}
