package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/published"
)

const (
	// searchWithin bounds the search for the torrents of an image: a list, and a small file a layer.
	searchWithin = 30 * time.Second
	// resolveWithin bounds the look at where a tracker's name leads.
	resolveWithin = 5 * time.Second
)

// TorrentPolicy says for which images published torrents are looked for.
type TorrentPolicy string

// The policies.
const (
	// TorrentsAuto: for all images on a node without a cluster secret. Within a trust domain members are the faster and safer way.
	TorrentsAuto TorrentPolicy = "auto"
	// TorrentsAlways: also beside the members of the trust domain.
	TorrentsAlways TorrentPolicy = "always"
	// TorrentsNever: for none.
	TorrentsNever TorrentPolicy = "never"
)

// TorrentPolicies are all of them, for messages and completion.
func TorrentPolicies() []string {
	return []string{string(TorrentsAuto), string(TorrentsAlways), string(TorrentsNever)}
}

// ParseTorrentPolicy reads a policy; "" is TorrentsAuto.
func ParseTorrentPolicy(s string) (TorrentPolicy, error) {
	if s == "" {
		return TorrentsAuto, nil
	}
	if !slices.Contains(TorrentPolicies(), s) {
		return "", fmt.Errorf("%q is none of %s", s, strings.Join(TorrentPolicies(), ", "))
	}
	return TorrentPolicy(s), nil
}

// CheckTrackers says what is wrong with announce URLs of a user.
func CheckTrackers(urls []string) error {
	o := published.MakeOptions{
		Layer:    ocispec.Descriptor{Digest: digest.Canonical.FromString(""), Size: 1},
		Open:     func(context.Context) (io.ReadCloser, error) { return nil, io.EOF },
		Trackers: urls,
	}
	return o.Check()
}

// usesTorrents reports whether published torrents are looked for.
func (i *Image) usesTorrents() (bool, error) {
	node := i.f.o.Open
	p := i.o.Torrents
	switch {
	case p == TorrentsNever:
		return false, nil
	case node == nil || node.Use == TorrentsNever:
		if p == TorrentsAlways {
			return false, fmt.Errorf("%s: published torrents were asked for, and %w: its configuration says so", i.Ref, errNoOpen)
		}
		return false, nil
	}
	if p == "" || p == TorrentsAuto {
		p = node.Use
	}
	return p == TorrentsAlways || i.f.cluster == nil, nil
}

// peersOnly reports whether the registry is not asked for a blob. No torrents are of configs: where there are only those, the config
// comes from the registry as the manifests do.
func (i *Image) peersOnly(desc ocispec.Descriptor) bool {
	return i.o.SkipOrigin && !(i.torrents != nil && desc.Digest == i.Config.Digest)
}

// torrentSearch is the search for the torrents of an image's layers, in the background: no fetch waits for it, unless it has no other
// way.
type torrentSearch struct {
	i      *Image
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex // guards following
	over    bool       // what there is was found
	closed  bool
	found   map[digest.Digest][]*published.Torrent
	waiting []*download
}

// searchTorrents begins the search if there is something to fetch.
func (i *Image) searchTorrents() error {
	use, err := i.usesTorrents()
	if err != nil || !use {
		return err
	}
	var missing []ocispec.Descriptor
	for _, l := range i.Layers {
		if info, err := i.f.o.Store.Stat(l.Digest); l.Size > 0 && (err != nil || !info.Complete) {
			missing = append(missing, l)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	s := &torrentSearch{i: i}
	s.ctx, s.cancel = context.WithCancel(i.f.ctx)
	i.torrents = s
	s.wg.Go(func() { s.run(missing) })
	return nil
}

// expect gives a download the torrents that are found of it. Nil-safe.
func (s *torrentSearch) expect(d *download) {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if d.seek(); s.over {
		s.wg.Go(func() { s.give(d) })
		return
	}
	s.waiting = append(s.waiting, d) // at most one for each blob of the image
}

// end ends the search; the torrents stay with the downloads. Nil-safe.
func (s *torrentSearch) end() {
	if s == nil {
		return
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.wg.Wait()
}

func (s *torrentSearch) run(layers []ocispec.Descriptor) {
	ctx, cancel := context.WithTimeout(s.ctx, searchWithin)
	defer cancel()
	found := map[digest.Digest][]*published.Torrent{}
	for _, t := range s.i.published(ctx, layers) {
		if t = s.i.withTrackers(ctx, t); t != nil {
			found[t.Layer.Digest] = append(found[t.Layer.Digest], t)
		}
	}
	s.mu.Lock()
	s.over, s.found = true, found
	waiting := s.waiting
	s.waiting = nil
	s.mu.Unlock()
	for _, d := range waiting {
		s.give(d)
	}
}

// give ends the waiting of a download.
func (s *torrentSearch) give(d *download) {
	defer d.sighted()
	for _, t := range s.found[d.desc.Digest] {
		if s.ctx.Err() != nil {
			return
		}
		if err := d.addTorrent(t, s.i.keepsPrivate(t)); err != nil && !errors.Is(err, ErrClosed) {
			s.i.f.log.Warn("a published torrent is not used", "err", err)
		}
	}
}

// keepsPrivate reports whether a torrent is kept to its trackers: it says so, or the image is not public.
func (i *Image) keepsPrivate(t *published.Torrent) bool {
	return t.Private || i.access != origin.Public
}

// published looks for torrents of layers beside the image, else for those that an old Quay makes.
func (i *Image) published(ctx context.Context, layers []ocispec.Descriptor) []*published.Torrent {
	log := i.f.log.With("image", i.Ref)
	all, err := published.Find(ctx, i.repo, published.Query{Subject: i.Manifest.Digest, Layers: layers, Log: log})
	if err == nil || ctx.Err() != nil {
		return all
	}
	if !errors.Is(err, published.ErrNone) {
		log.Info("published torrents cannot be used", "err", err)
	}
	for _, l := range layers {
		t, err := published.FromQuay(ctx, i.repo, l)
		if err != nil {
			// What one layer does not have no other has, or will: this is no such Quay.
			log.Debug("no torrent by the registry", "blob", l.Digest, "err", err)
			break
		}
		all = append(all, t)
	}
	return all
}

// withTrackers is a torrent with the trackers that may be asked: the user's instead of its own when there are any. Nil when it is kept to
// its trackers and none is left.
func (i *Image) withTrackers(ctx context.Context, t *published.Torrent) *published.Torrent {
	var tiers [][]string
	if len(i.o.Trackers) > 0 {
		for _, u := range i.o.Trackers {
			tiers = append(tiers, []string{u})
		}
	} else {
		for _, tier := range t.Trackers {
			tier = slices.DeleteFunc(slices.Clone(tier), func(u string) bool { return !elsewhere(ctx, u) })
			if len(tier) > 0 {
				tiers = append(tiers, tier)
			}
		}
	}
	private := i.keepsPrivate(t) || !i.f.o.Open.Public
	if len(tiers) == 0 && private {
		i.f.log.Info("a published torrent names no tracker that could be asked", "image", i.Ref, "blob", t.Layer.Digest)
		return nil
	}
	with := *t
	with.Trackers = tiers
	return &with
}

// elsewhere reports whether a tracker that nobody here named may be asked: it is not this machine, and not where clouds keep
// the secrets of their machines. Addresses of private networks are, since that is where companies have their trackers.
func elsewhere(ctx context.Context, tracker string) bool {
	u, err := url.Parse(tracker)
	if err != nil || u.Hostname() == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, resolveWithin)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname())
	if err != nil {
		return false
	}
	return len(addrs) > 0 && !slices.ContainsFunc(addrs, func(a netip.Addr) bool {
		a = a.Unmap()
		return !a.IsValid() || a.IsUnspecified() || a.IsLoopback() || a.IsLinkLocalUnicast() || a.IsMulticast()
	})
}

// Publish gives layers of the image to open swarms by torrents of them, for as long as the image is open. The layers must be
// here: see Fetch.
func (i *Image) Publish(ctx context.Context, torrents []*published.Torrent) error {
	if len(torrents) > maxOpenSwarms*len(i.Layers) {
		return fmt.Errorf("%s: %d torrents are more than %d for each layer", i.Ref, len(torrents), maxOpenSwarms)
	}
	for _, t := range torrents {
		k := slices.IndexFunc(i.Layers, func(l ocispec.Descriptor) bool { return l.Digest == t.Layer.Digest })
		if k < 0 {
			return fmt.Errorf("%s: the torrent %s is of none of its layers", i.Ref, t.InfoHash)
		}
		b, err := i.Blob(ctx, i.Layers[k])
		if err != nil {
			return err
		}
		if !b.Complete() {
			return fmt.Errorf("%s: layer %s is not here to be given to anybody: %w", i.Ref, t.Layer.Digest, ErrNoSource)
		}
		if err := b.d.addTorrent(t, t.Private); err != nil {
			return err
		}
	}
	return nil
}

// seek notes that torrents of the blob are looked for; sighted that they were found, or not.
func (d *download) seek() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seeking++
	d.openSince = time.Now()
}

func (d *download) sighted() {
	d.mu.Lock()
	d.seeking--
	d.openSince = time.Now()
	d.mu.Unlock()
	d.poke()
}
