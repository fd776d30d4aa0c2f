package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// leaseTime bounds how long the content of a killed pull stays protected from garbage collection, and so how long
	// a later pull can go on from it. As long as containerd's own pulls take.
	leaseTime = 24 * time.Hour
	// dialTimeout: a containerd on this machine answers in milliseconds or not at all.
	dialTimeout = 5 * time.Second
	// completeAtOnce is how many layers are copied to the content store side by side: two keep the disk and sha256 of
	// containerd both busy, more only take turns.
	completeAtOnce = 2

	criLabel      = "io.cri-containerd.image" // CRI lists only images that carry it
	criLabelValue = "managed"
	criNamespace  = "k8s.io"
)

// Lazy says what becomes of layers that a remote snapshotter mounts before they are complete.
type Lazy string

// The choices of --lazy. With an ordinary snapshotter (overlayfs) there are no lazy layers, and all are the same.
const (
	AutoLazy  Lazy = "auto"  // mount lazily, then complete the content store, so that push, save and commit work
	KeepLazy  Lazy = "keep"  // mount lazily and leave it at that
	NeverLazy Lazy = "never" // fetch and unpack every layer before the image counts as pulled
)

// Containerd pulls into one namespace of a containerd on this machine.
type Containerd struct {
	client      *containerd.Client
	address     string
	namespace   string
	snapshotter string
	labels      map[string]string // of the image record
	what        string            // for String
	// keepDangling keeps a replaced image under the name that dockerd gives such images, as `docker pull` does.
	keepDangling bool
	lazy         Lazy
	say          func(format string, args ...any)
	// confirm asks whoever shall use the image whether it is there; nil: nobody.
	confirm func(ctx context.Context, img Image) error
}

// ContainerdOptions are for NewContainerd.
type ContainerdOptions struct {
	Address     string // socket path
	Namespace   string
	Snapshotter string // "" = the namespace's default, else overlayfs
	Lazy        Lazy
	Say         func(format string, args ...any) // tells the user what happens; nil: nobody
}

// NewContainerd connects to containerd and looks that it answers and has the snapshotter.
func NewContainerd(ctx context.Context, o ContainerdOptions) (*Containerd, error) {
	c, err := containerd.New(o.Address, containerd.WithDefaultNamespace(o.Namespace), containerd.WithTimeout(dialTimeout))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", o.Address, err)
	}
	if o.Snapshotter == "" {
		o.Snapshotter, err = c.GetLabel(namespaces.WithNamespace(ctx, o.Namespace), "containerd.io/defaults/snapshotter")
		if err != nil && !errdefs.IsNotFound(err) {
			c.Close()
			return nil, fmt.Errorf("containerd at %s: %w", o.Address, err)
		}
		if o.Snapshotter == "" {
			o.Snapshotter = "overlayfs"
		}
	}
	if _, err := c.GetSnapshotterCapabilities(ctx, o.Snapshotter); err != nil {
		c.Close()
		return nil, fmt.Errorf("containerd at %s has no working snapshotter %q: %w", o.Address, o.Snapshotter, err)
	}
	if o.Say == nil {
		o.Say = func(string, ...any) {}
	}
	t := &Containerd{
		client: c, address: o.Address, namespace: o.Namespace, snapshotter: o.Snapshotter, lazy: o.Lazy, say: o.Say,
		what: fmt.Sprintf("containerd (namespace %s, snapshotter %s) at %s", o.Namespace, o.Snapshotter, o.Address),
	}
	if o.Namespace == criNamespace {
		t.labels = map[string]string{criLabel: criLabelValue}
	}
	return t, nil
}

func (t *Containerd) String() string { return t.what }

// Platform is this machine's.
func (t *Containerd) Platform() *ocispec.Platform { return nil }

// Close ends the connection.
func (t *Containerd) Close() error { return t.client.Close() }

// Pull makes the image known to containerd: manifests and config into the content store, layers into the snapshotter
// (which a remote snapshotter answers at once), then the image record; from then on containers start. Last, the blobs
// that the snapshotter did not need are copied to the content store.
func (t *Containerd) Pull(ctx context.Context, img Image) (res Result, err error) {
	ctx = namespaces.WithNamespace(ctx, t.namespace)
	res.Reference = familiar(img.Ref())
	ref := name(img.Ref())

	ctx, done, err := t.client.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		return res, fmt.Errorf("%s: %w", t, err)
	}
	defer func() {
		// After a cancelled pull the lease stays until it expires, so that the next pull finds what this one got.
		if ctx.Err() == nil {
			err = errors.Join(err, done(context.WithoutCancel(ctx)))
		}
	}()

	old, err := t.client.ImageService().Get(ctx, ref)
	if err != nil && !errdefs.IsNotFound(err) {
		return res, fmt.Errorf("%s: %w", t, err)
	}
	known := err == nil
	if known && old.Target.Digest == img.Target().Digest {
		missing, err := t.missing(ctx, img)
		if err != nil {
			return res, err
		}
		if ok, err := t.unpacked(ctx, img); err == nil && ok && len(missing) == 0 {
			res.UpToDate = true
			return res, nil
		}
	}

	if err := t.unpackPatiently(ctx, img, ref); err != nil {
		return res, err
	}
	if known && t.keepDangling && old.Target.Digest != img.Target().Digest {
		if err := t.dangle(ctx, old); err != nil {
			return res, err
		}
	}
	if err := t.record(ctx, images.Image{Name: ref, Target: img.Target(), Labels: t.labels}); err != nil {
		return res, err
	}
	if t.confirm != nil {
		if err := t.confirm(ctx, img); err != nil {
			return res, err
		}
	}

	missing, err := t.missing(ctx, img)
	if err != nil {
		return res, err
	}
	for _, l := range missing {
		res.Lazy = append(res.Lazy, l.Digest)
	}
	switch {
	case len(missing) == 0:
	case t.lazy == KeepLazy:
		res.Notes = append(res.Notes, fmt.Sprintf("%d layers stay lazy: to push, save or commit the image, pull it again without --lazy=keep", len(missing)))
	default:
		t.say("Ready: containers can be started from %s; now completing %d lazy layers, so that it can be pushed and saved", res.Reference, len(missing))
		if err := t.complete(ctx, img, missing); err != nil {
			return res, err
		}
	}
	return res, nil
}

const (
	// snapshotterBack bounds the wait for a snapshotter that does not answer: containerd dials one that was restarted
	// again after 1 to 3 s, and fails what is asked meanwhile.
	snapshotterBack = 10 * time.Second
	// snapshotterPause is the pause between two tries, half of it chance.
	snapshotterPause = 500 * time.Millisecond
)

// unpackPatiently is unpack, over again while the snapshotter is not there. What was fetched is not fetched again.
func (t *Containerd) unpackPatiently(ctx context.Context, img Image, ref string) error {
	for begun := time.Now(); ; {
		err := t.unpack(ctx, img, ref)
		if !errdefs.IsUnavailable(err) || time.Since(begun) > snapshotterBack {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(snapshotterPause/2 + rand.N(snapshotterPause)):
		}
	}
}

// unpack runs containerd's own unpacker over the image's tree, with the manifest of our platform as the only one.
func (t *Containerd) unpack(ctx context.Context, img Image, ref string) (err error) {
	defer func() {
		if err != nil {
			err = t.explain(ctx, img, err)
		}
	}()
	store := t.client.ContentStore()
	children := images.SetChildrenLabels(store, images.ChildrenHandler(store))
	source, err := docker.AppendDistributionSourceLabel(store, ref)
	if err != nil {
		return err
	}
	var handler images.Handler = images.Handlers(
		remotes.FetchHandler(store, remotes.FetcherFunc(t.opener(img))),
		onlyManifest(children, img.Manifest().Digest),
		source,
	)
	if t.lazy != NeverLazy {
		// These labels tell a remote snapshotter which layer of which image it is asked for; without them it is an
		// ordinary snapshotter. Ordinary ones do not look at them.
		handler = snapshotters.AppendInfoHandlerWrapper(ref)(handler)
	}
	caps, err := t.client.GetSnapshotterCapabilities(ctx, t.snapshotter)
	if err != nil {
		return err
	}
	run, cancel := context.WithCancel(ctx)
	defer cancel()
	u, err := unpack.NewUnpacker(run, store, unpack.WithUnpackPlatform(unpack.Platform{
		Platform: platforms.All, SnapshotterKey: t.snapshotter, Snapshotter: t.client.SnapshotService(t.snapshotter),
		Applier: t.client.DiffService(), SnapshotterCapabilities: caps,
	}))
	if err != nil {
		return err
	}
	err = images.Dispatch(run, u.Unpack(handler), nil, img.Target())
	if err != nil {
		cancel() // nobody wants the layers any more
	}
	n, uerr := u.Wait()
	switch {
	case err != nil:
		return err
	case uerr != nil:
		return uerr
	case n.Unpacks == 0 && len(img.Layers()) > 0:
		return fmt.Errorf("the config %s has the media type %q, which no container can be started from", img.Config().Digest, img.Config().MediaType)
	}
	return nil
}

// opener reads the image for containerd. containerd asks by descriptors that carry its own annotations: those are
// dropped.
func (t *Containerd) opener(img Image) func(context.Context, ocispec.Descriptor) (io.ReadCloser, error) {
	return func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		for _, d := range slices.Concat([]ocispec.Descriptor{img.Target(), img.Manifest(), img.Config()}, img.Layers()) {
			if d.Digest == desc.Digest {
				return img.Open(ctx, d)
			}
		}
		return img.Open(ctx, desc)
	}
}

// onlyManifest lets an index have one child: the manifest that was chosen when the image was resolved.
func onlyManifest(h images.HandlerFunc, want digest.Digest) images.HandlerFunc {
	return func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		children, err := h(ctx, desc)
		if err != nil || !images.IsIndexType(desc.MediaType) {
			return children, err
		}
		return slices.DeleteFunc(slices.Clone(children), func(d ocispec.Descriptor) bool {
			// An index within an index may lead to it.
			return images.IsManifestType(d.MediaType) && d.Digest != want
		}), nil
	}
}

// record creates or replaces the image's name.
func (t *Containerd) record(ctx context.Context, i images.Image) error {
	s := t.client.ImageService()
	for {
		_, err := s.Create(ctx, i)
		if errdefs.IsAlreadyExists(err) {
			if _, err = s.Update(ctx, i); errdefs.IsNotFound(err) {
				continue // removed in between
			}
		}
		if err != nil {
			return fmt.Errorf("name the image %s in %s: %w", i.Name, t, err)
		}
		if t.keepDangling {
			// What now has a name is no longer dangling.
			if err := s.Delete(ctx, danglingName(i.Target.Digest)); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("%s: %w", t, err)
			}
		}
		return nil
	}
}

// danglingName is how dockerd names images that lost theirs (moby, daemon/containerd/soft_delete.go).
func danglingName(d digest.Digest) string { return "moby-dangling@" + d.String() }

func (t *Containerd) dangle(ctx context.Context, old images.Image) error {
	others, err := t.client.ImageService().List(ctx, fmt.Sprintf("target.digest==%s", old.Target.Digest))
	if err != nil {
		return fmt.Errorf("%s: %w", t, err)
	}
	if len(others) > 1 {
		return nil // it has another name
	}
	old.Name = danglingName(old.Target.Digest)
	delete(old.Labels, images.AnnotationImageName)
	delete(old.Labels, ocispec.AnnotationRefName)
	if _, err := t.client.ImageService().Create(ctx, old); err != nil && !errdefs.IsAlreadyExists(err) {
		return fmt.Errorf("keep the image that had the name %s until now: %w", old.Name, err)
	}
	return nil
}

// missing lists the blobs that the content store lacks.
func (t *Containerd) missing(ctx context.Context, img Image) ([]ocispec.Descriptor, error) {
	var out []ocispec.Descriptor
	for _, d := range append([]ocispec.Descriptor{img.Config()}, img.Layers()...) {
		_, err := t.client.ContentStore().Info(ctx, d.Digest)
		if errdefs.IsNotFound(err) {
			out = append(out, d)
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", t, err)
		}
	}
	return out, nil
}

// unpacked tells whether the image's top layer is in the snapshotter.
func (t *Containerd) unpacked(ctx context.Context, img Image) (bool, error) {
	b, err := content.ReadBlob(ctx, t.client.ContentStore(), img.Config())
	if err != nil {
		return false, err
	}
	var config ocispec.Image
	if err := json.Unmarshal(b, &config); err != nil {
		return false, err
	}
	if len(config.RootFS.DiffIDs) == 0 {
		return true, nil
	}
	var info snapshots.Info
	info, err = t.client.SnapshotService(t.snapshotter).Stat(ctx, identity.ChainID(config.RootFS.DiffIDs).String())
	return err == nil && info.Kind == snapshots.KindCommitted, err
}

// complete copies blobs into the content store. The manifest's labels already refer to them, so that they are never
// garbage while the image has a name.
func (t *Containerd) complete(ctx context.Context, img Image, blobs []ocispec.Descriptor) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(completeAtOnce)
	for _, d := range blobs {
		g.Go(func() error {
			err := remotes.Fetch(ctx, t.client.ContentStore(), remotes.FetcherFunc(t.opener(img)), d)
			if err != nil && !errdefs.IsAlreadyExists(err) {
				return t.explain(ctx, img, fmt.Errorf("copy layer %s into the content store: %w", shortDigest(d.Digest), err))
			}
			return nil
		})
	}
	return g.Wait()
}

// explain names the image and the target, and lets an interruption look like one: gRPC hides it in a status.
func (t *Containerd) explain(ctx context.Context, img Image, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("put %s into %s: %w", familiar(img.Ref()), t, err)
}
