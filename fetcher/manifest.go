package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// Manifest returns the descriptor and body of what a reference names, an index
// or a manifest, as Image finds it.
func (f *Fetcher) Manifest(ctx context.Context, ref reference.Named, o ImageOptions) (ocispec.Descriptor, []byte, error) {
	img, body, err := f.find(ctx, ref, o)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	return img.Target, body, nil
}

// find returns an image of which only the target is known yet, and its body.
func (f *Fetcher) find(ctx context.Context, ref reference.Named, o ImageOptions) (*Image, []byte, error) {
	ref = reference.TagNameOnly(ref)
	img := &Image{f: f, o: o, Ref: ref, blobs: map[digest.Digest]*Blob{}, seen: map[digest.Digest]int64{}}
	var err error
	if img.repo, err = o.Origin.Repository(ref); err != nil {
		return nil, nil, err
	}
	after := registrySilent
	if o.Offline || f.Away(ref) {
		after = 0
	}
	q := cluster.Question{Ref: ref.String(), Node: img.anyCached(), Offline: o.Offline}
	got, seen, err := img.ask(ctx, tagOrDigest(ref), q, after)
	if errors.Is(err, origin.ErrUnavailable) && ctx.Err() == nil {
		got, err = img.lastSeen(err, seen)
	}
	if err != nil {
		return nil, nil, err
	}
	if got.from.ID != "" || got.age == 0 {
		if err := f.keep(ref, got); err != nil {
			return nil, nil, err
		}
	}
	img.Target, img.access, img.remote = got.desc, got.access, got.from.ID != ""
	return img, got.body, nil
}

// tagOrDigest is what registries are asked for.
func tagOrDigest(ref reference.Named) string {
	if d, ok := ref.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := ref.(reference.Tagged); ok {
		return t.Tag()
	}
	return "latest"
}

// keep stores what was found, and under which name, unless the store knows something newer.
func (f *Fetcher) keep(ref reference.Named, got found) error {
	if err := f.o.Store.PutContent(got.desc.Digest, got.body); err != nil {
		return err
	}
	seen := time.Now().Add(-got.age)
	if old, err := f.o.Store.Ref(ref.String()); err == nil && got.age > 0 && old.Seen.After(seen) {
		return nil
	}
	return f.o.Store.SetRef(store.Ref{Name: ref.String(), Target: got.desc, Seen: seen, Access: got.access})
}

// anyCached reports whether the caller may have anything that was seen: it is the
// node itself, or the owner of the store.
func (i *Image) anyCached() bool {
	return i.o.AllowCached == nil || i.o.AllowCached(store.Ref{Name: i.Ref.String()})
}

// errMembersOnly is why a bastion has not asked the registry.
var errMembersOnly = fmt.Errorf("%w to this node, which is set to reach it through members only", origin.ErrUnavailable)

// ask asks the registry for a manifest, and members when it is away, not to be asked, or silent
// for after. The first good answer wins; a refusal by the registry is final, seen through a member only when
// this node does not reach the registry itself. The error wraps origin.ErrUnavailable when nobody does; seen
// is then the newest that members saw, if they did.
func (i *Image) ask(ctx context.Context, name string, q cluster.Question, after time.Duration) (got found, seen *found, err error) {
	f, host := i.f, reference.Domain(i.Ref)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	user, secret, access := i.o.Origin.Login(i.Ref)
	if secret != "" {
		q.Login = &cluster.Login{Username: user, Secret: secret}
	}
	q.Insecure = i.o.Origin.Insecure()
	var direct, members chan reply
	var away, refusal error
	switch {
	case f.o.Reach != ThroughMembers:
		direct = make(chan reply, 1)
		wg.Go(func() { direct <- i.askRegistry(ctx, name, q.Offline) })
	case f.cluster == nil:
		return got, nil, fmt.Errorf("%s: %w, and there is no cluster secret", i.Ref, errMembersOnly)
	default:
		away, after = fmt.Errorf("%s: %w", i.Ref, errMembersOnly), 0
	}
	held, answered := false, false
	askMembers := func() {
		if members != nil && !held || f.cluster == nil {
			return
		}
		// While the registry may still answer it alone is told the credential for what any
		// member may have.
		mine := q
		if held = direct != nil && q.Digest != ""; held {
			mine.Login, mine.Held = nil, true
		}
		c := make(chan reply, 1)
		members, answered = c, false
		wg.Go(func() { c <- f.askMembers(ctx, mine, access) })
	}
	silent := time.NewTimer(after)
	defer silent.Stop()
	if direct == nil {
		askMembers()
	}
	for direct != nil || members != nil && !answered {
		select {
		case <-silent.C:
			askMembers()
		case r := <-direct:
			direct = nil
			switch {
			case r.err == nil:
				f.away.clear(host)
				return *r.live, nil, nil
			case !errors.Is(r.err, origin.ErrUnavailable):
				return got, nil, r.err
			}
			away = r.err
			f.away.note(host)
			askMembers()
		case r := <-members:
			answered = true
			switch {
			case r.live != nil:
				f.log.Info("a member told what the image is", "image", q.Ref, "node", r.live.from.ID, "digest", r.live.desc.Digest)
				return *r.live, nil, nil
			case r.final && !held:
				refusal = r.err
			case r.asked > 0:
				err = fmt.Errorf("none of %d members that were asked reaches it", r.asked)
				if r.err != nil {
					err = fmt.Errorf("%w: %w", err, r.err)
				}
			}
			seen = r.seen
		}
	}
	switch {
	case refusal != nil:
		return got, nil, refusal
	case err != nil:
		err = fmt.Errorf("%w; %w", away, err)
	default:
		err = away
	}
	return got, seen, err
}

// askRegistry asks the registry itself, for a moment only when what was seen will do.
func (i *Image) askRegistry(ctx context.Context, name string, offline bool) (r reply) {
	parent := ctx
	if offline {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, offlinePatience)
		defer cancel()
	}
	desc, body, err := i.repo.Manifest(ctx, name)
	if err != nil {
		if ctx.Err() != nil && parent.Err() == nil {
			err = fmt.Errorf("%s: %w: no answer within %s", i.Ref, origin.ErrUnavailable, offlinePatience)
		}
		return reply{err: err}
	}
	return reply{live: &found{desc: desc, body: body, access: i.repo.Access()}}
}

// lastSeen is the newest that this node or a member saw under the image's name; away is why
// there is no registry to say. What only members saw is for who asked for it (ImageOptions.Offline).
func (i *Image) lastSeen(away error, seen *found) (found, error) {
	mine, err := i.f.seenHere(i.Ref)
	have := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		away = errors.Join(away, err)
	}
	if have && !i.allowed(mine) {
		have = false
		away = fmt.Errorf("%w (this node holds the image, but gives it without the registry's word only to a user who was let in before)", away)
	}
	if seen != nil && !i.allowed(*seen) {
		seen = nil
	}
	switch {
	case have && (seen == nil || mine.age <= seen.age):
		when := time.Now().Add(-mine.age)
		i.Note = fmt.Sprintf("the registry cannot be reached; using %s as seen %s", mine.desc.Digest, when.UTC().Format(time.RFC3339))
		i.f.log.Warn("registry away, using what was seen", "image", i.Ref, "digest", mine.desc.Digest, "seen", when, "err", away)
		return mine, nil
	case seen != nil && (have || i.o.Offline):
		i.Note = fmt.Sprintf("the registry cannot be reached; using %s as %s saw it %s ago", seen.desc.Digest, called(seen.from), span(seen.age))
		i.f.log.Warn("registry away, using what a member saw", "image", i.Ref, "digest", seen.desc.Digest, "node", seen.from.ID, "age", seen.age, "err", away)
		return *seen, nil
	case seen != nil:
		return found{}, fmt.Errorf("%w; use --offline to take the digest %s that %s saw %s ago", away, seen.desc.Digest, called(seen.from), span(seen.age))
	}
	return found{}, away
}

// span is a duration in a sentence, in the largest unit of which there are two.
func span(d time.Duration) string {
	switch {
	case d < 2*time.Second:
		return "a moment"
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", d/time.Second)
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", d/time.Hour)
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}

func (i *Image) allowed(s found) bool {
	return i.o.AllowCached == nil || i.o.AllowCached(store.Ref{Name: i.Ref.String(), Target: s.desc, Seen: time.Now().Add(-s.age), Access: s.access})
}

// seenHere is what this node saw last under a name; fs.ErrNotExist when it has nothing.
func (f *Fetcher) seenHere(ref reference.Named) (found, error) {
	r, err := f.o.Store.Ref(ref.String())
	if d, ok := ref.(reference.Digested); ok && errors.Is(err, fs.ErrNotExist) {
		// Not asked for by this name before, but perhaps as part of an index. Access
		// stays empty: nothing is known of who may read it.
		return f.content(d.Digest())
	}
	if err != nil {
		return found{}, err
	}
	body, err := f.o.Store.Content(r.Target.Digest)
	if err != nil {
		return found{}, err
	}
	// At least a moment, as "just now" is the registry's.
	return found{desc: r.Target, body: body, access: r.Access, age: max(time.Since(r.Seen), 1)}, nil
}

// content is a manifest that is here by its digest; fs.ErrNotExist when it is not.
func (f *Fetcher) content(d digest.Digest) (found, error) {
	body, err := f.o.Store.Content(d)
	if err != nil {
		return found{}, err
	}
	desc, err := origin.Describe(body)
	if err != nil {
		return found{}, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	desc.Digest = d // of whatever algorithm
	return found{desc: desc, body: body, age: 1}, nil
}

// manifest returns the body of a manifest or index that the image names by its digest, from
// the store, the registry or a member.
func (i *Image) manifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if b, err := i.f.o.Store.Content(desc.Digest); err == nil {
		return b, nil
	}
	ref, err := reference.WithDigest(reference.TrimNamed(i.Ref), desc.Digest)
	if err != nil {
		return nil, err
	}
	after := contentWithin
	if i.remote || i.f.Away(i.Ref) {
		after = 0
	}
	got, _, err := i.ask(ctx, desc.Digest.String(), cluster.Question{Ref: ref.String(), Digest: desc.Digest}, after)
	if err != nil {
		return nil, err
	}
	return got.body, i.f.o.Store.PutContent(desc.Digest, got.body)
}
