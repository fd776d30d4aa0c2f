package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"github.com/distribution/reference"
	"github.com/docker/cli/cli/config"
	"github.com/docker/cli/cli/config/credentials"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/docker-quay/docker-quay/fetcher"
	"github.com/docker-quay/docker-quay/fetcher/api"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/plugin/progress"
)

// OpenImage opens an image from the node daemon when one answers, else by a fetcher in this process.
func OpenImage(ctx context.Context, r Request) (Source, error) {
	if !r.NoDaemon {
		c, _, err := api.Dial(ctx, r.Socket)
		switch {
		case err == nil:
			return openRemote(ctx, c, r)
		case errors.Is(err, os.ErrPermission):
			// Said aloud: the user may expect the node's cache, and be one group away from it.
			note := fmt.Sprintf("the node daemon at %s may not be used by this user (its group may); fetching in this process", r.Socket)
			return openEmbedded(ctx, r, note)
		case !nobodyThere(err):
			return nil, err
		}
	}
	return openEmbedded(ctx, r, "")
}

// NodeVersion asks the daemon at a socket for its version; "" when none answers.
func NodeVersion(ctx context.Context, socket string) string {
	c, st, err := api.Dial(ctx, socket)
	if err != nil {
		return ""
	}
	_ = c.Close()
	return st.Version
}

// nobodyThere reports whether no daemon listens at the socket: it is not there, or was left by one that died.
func nobodyThere(err error) bool {
	var op *net.OpError
	return errors.Is(err, os.ErrNotExist) || errors.As(err, &op) && errors.Is(op, unix.ECONNREFUSED)
}

// remote is an image that the node daemon fetches.
type remote struct {
	*api.Session
	client *api.Client
	via    string
	notes  []string
	before map[digest.Digest]fetcher.Progress // when the session began
}

func openRemote(ctx context.Context, c *api.Client, r Request) (Source, error) {
	req := api.ImageRequest{
		Ref: r.Ref.String(), Insecure: r.Insecure, SkipWebSeed: r.SkipWebSeed, Offline: r.Offline,
		Torrents: string(r.Torrents), Trackers: r.Trackers,
	}
	if r.Platform != nil {
		req.Platform = *r.Platform
	}
	login, err := loginOf(r.DockerConfigDir, reference.Domain(r.Ref))
	if err != nil {
		return nil, err
	}
	if login != (api.Credential{}) {
		req.Credentials = map[string]api.Credential{reference.Domain(r.Ref): login}
	}
	s, err := c.Image(ctx, req)
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	src := &remote{Session: s, client: c, via: "the node daemon at " + r.Socket, before: map[digest.Digest]fetcher.Progress{}}
	for _, p := range s.Progress() {
		src.before[p.Digest] = p
	}
	if s.Image.Note != "" {
		src.notes = append(src.notes, s.Image.Note)
	}
	if len(r.Peers) > 0 || r.UploadRate > 0 || r.DownloadRate > 0 || r.NoSeed || r.Zone != "" || r.LocalDiscovery {
		src.notes = append(src.notes, "the node daemon fetches, with the peers and the limits of its own configuration; --no-daemon uses those of the command line")
	}
	return src, nil
}

// loginOf is the user's own login for a registry.
func loginOf(dir, host string) (api.Credential, error) {
	if dir == "" {
		dir = config.Dir()
	}
	file, err := config.Load(dir)
	if err != nil {
		return api.Credential{}, fmt.Errorf("docker's configuration in %s cannot be read: %w", dir, err)
	}
	if !file.ContainsAuth() {
		file.CredentialsStore = credentials.DetectDefaultStore(file.CredentialsStore)
	}
	key := host
	if host == "docker.io" {
		key = "https://index.docker.io/v1/"
	}
	a, err := file.GetAuthConfig(key)
	if err != nil {
		return api.Credential{}, fmt.Errorf("docker's credential helper has no answer for %s: %w", key, err)
	}
	if a.IdentityToken != "" {
		return api.Credential{Secret: a.IdentityToken}, nil
	}
	return api.Credential{Username: a.Username, Secret: a.Password}, nil
}

func (s *remote) Target() ocispec.Descriptor   { return s.Image.Target }
func (s *remote) Manifest() ocispec.Descriptor { return s.Image.Manifest }
func (s *remote) Config() ocispec.Descriptor   { return s.Image.Config }
func (s *remote) Layers() []ocispec.Descriptor { return s.Image.Layers }
func (s *remote) Via() string                  { return s.via }
func (s *remote) Notes() []string              { return s.notes }

// Progress counts from the beginning of the session. The node counts for as long as it has a blob open: what it fetched for
// an earlier pull is this one's cache.
func (s *remote) Progress() []progress.Blob {
	ps := s.Session.Progress()
	for i := range ps {
		b := s.before[ps[i].Digest]
		ps[i].FromOrigin -= b.FromOrigin
		ps[i].FromPeers -= b.FromPeers
		ps[i].FromCache += b.FromOrigin + b.FromPeers
		if ps[i].FromOrigin < 0 || ps[i].FromPeers < 0 { // the node began to count anew
			ps[i].FromCache, ps[i].FromOrigin, ps[i].FromPeers = ps[i].Have, 0, 0
		}
	}
	return blobs(ps)
}

func (s *remote) Close() error {
	// The session of a daemon that has gone needs no closing.
	_ = s.Session.Close()
	return s.client.Close()
}

// embedded is an image fetched in this process.
type embedded struct {
	img     *fetcher.Image
	fetcher *fetcher.Fetcher
	store   *store.Store
	origin  *origin.Client
	notes   []string
}

func openEmbedded(ctx context.Context, r Request, note string) (_ Source, err error) {
	s := &embedded{}
	defer func() {
		if err != nil {
			_ = s.Close()
		}
	}()
	if note != "" {
		s.notes = append(s.notes, note)
	}
	var secret *trust.Secret
	if r.SecretFile != "" {
		loaded, err := trust.Load(r.SecretFile)
		if err != nil {
			return nil, err
		}
		secret = &loaded
	}
	if s.store, err = store.Open(store.Options{Dir: r.StoreDir, Log: r.Log}); err != nil {
		return nil, err
	}
	s.origin, err = origin.New(origin.Options{
		DockerConfigDir: r.DockerConfigDir, Insecure: r.Insecure,
		UserAgent: "docker-quay/" + fetcher.Version, Log: r.Log,
	})
	if err != nil {
		return nil, err
	}
	s.fetcher, err = fetcher.New(ctx, fetcher.Options{
		Store: s.store, Secret: secret, Ports: r.Ports, Peers: r.Peers,
		UploadRate: r.UploadRate, DownloadRate: r.DownloadRate, NoSeed: r.NoSeed, Log: r.Log,
		Zone: r.Zone, LocalDiscovery: r.LocalDiscovery, Connections: r.MaxConnections, Ephemeral: true,
		Open:   &fetcher.OpenOptions{Ports: r.Ports, Public: true},
		Behalf: &origin.Options{UserAgent: "docker-quay/" + fetcher.Version},
	})
	if err != nil {
		return nil, err
	}
	o := fetcher.ImageOptions{Origin: s.origin, SkipOrigin: r.SkipWebSeed, Offline: r.Offline, Torrents: r.Torrents, Trackers: r.Trackers}
	if r.Platform != nil {
		o.Platform = *r.Platform
	}
	if s.img, err = s.fetcher.Image(ctx, r.Ref, o); err != nil {
		return nil, err
	}
	if s.img.Note != "" {
		s.notes = append(s.notes, s.img.Note)
	}
	return s, nil
}

func (s *embedded) Ref() reference.Named         { return s.img.Ref }
func (s *embedded) Target() ocispec.Descriptor   { return s.img.Target }
func (s *embedded) Manifest() ocispec.Descriptor { return s.img.Manifest }
func (s *embedded) Config() ocispec.Descriptor   { return s.img.Config }
func (s *embedded) Layers() []ocispec.Descriptor { return s.img.Layers }
func (s *embedded) Notes() []string              { return s.notes }
func (s *embedded) Progress() []progress.Blob    { return blobs(s.img.Progress()) }
func (s *embedded) Fetch(ctx context.Context) error {
	return s.img.Fetch(ctx)
}

func (s *embedded) Publish(ctx context.Context, torrents []*published.Torrent) error {
	return s.img.Publish(ctx, torrents)
}

func (s *embedded) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return s.img.Open(ctx, desc)
}

func (s *embedded) Via() string {
	if a := s.fetcher.Addr(); a.IsValid() {
		return fmt.Sprintf("this process, peers on port %d", a.Port())
	}
	return "this process"
}

// Close ends the fetch; what is in the store stays.
func (s *embedded) Close() error {
	var errs []error
	if s.img != nil {
		errs = append(errs, s.img.Close())
	}
	if s.fetcher != nil {
		errs = append(errs, s.fetcher.Close())
	}
	if s.origin != nil {
		errs = append(errs, s.origin.Close())
	}
	if s.store != nil {
		errs = append(errs, s.store.Close())
	}
	return errors.Join(errs...)
}

// blobs translates the fetcher's progress.
func blobs(ps []fetcher.Progress) []progress.Blob {
	out := make([]progress.Blob, len(ps))
	for i, p := range ps {
		out[i] = progress.Blob{
			Digest: p.Digest, MediaType: p.MediaType, Size: p.Size, Have: p.Have,
			FromCache: p.FromCache, FromOrigin: p.FromOrigin, FromPeers: p.FromPeers, Uploaded: p.Uploaded,
			State: progress.State(p.State), Peers: p.Peers, Note: p.Note,
		}
	}
	return out
}
