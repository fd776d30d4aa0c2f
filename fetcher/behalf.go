package fetcher

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/distribution/reference"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

const (
	// behalfPatience bounds how long a registry is asked for a member: less than
	// that waits, so that what was seen can still be told. behalfMoment is the same when
	// what was seen will do.
	behalfPatience = cluster.AnswerWithin - 2*time.Second
	behalfMoment   = 3 * time.Second
	// keptForOthers bounds the bytes of manifests that this process keeps because
	// it asked for others: the store's quota does not count them. Beyond it questions
	// are answered and nothing is kept.
	keptForOthers = 64 << 20
)

// behalf does at registries for members what they cannot do themselves. It uses their
// credentials and none of its own, and connects to nothing that only this node is meant to
// reach (origin.Options.OnBehalf).
type behalf struct{ f *Fetcher }

var _ cluster.Errands = behalf{}

// client returns a registry client that has one credential, a member's, for the registry of ref;
// origin.ErrUnavailable when this node asks none.
func (b behalf) client(ref reference.Named, login *cluster.Login, insecure bool) (*origin.Client, error) {
	if b.f.o.Behalf == nil || b.f.o.Reach == ThroughMembers {
		return nil, fmt.Errorf("%w through this node", origin.ErrUnavailable)
	}
	o := *b.f.o.Behalf
	o.OnBehalf, o.Insecure, o.DockerConfigDir, o.Log = true, insecure, "", b.f.log
	// Who waits has another member to ask.
	o.MaxRetries = 1
	if login == nil {
		login = &cluster.Login{}
	}
	o.Credentials = origin.LoginFor(ref, login.Username, login.Secret)
	c, err := origin.New(o)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", origin.ErrUnavailable, err)
	}
	return c, nil
}

// Resolve implements cluster.Errands.
func (b behalf) Resolve(ctx context.Context, from string, q cluster.Question) cluster.Answer {
	ref, err := reference.ParseNamed(q.Ref)
	if err != nil {
		return cluster.Answer{Refusal: refusalOf(err)}
	}
	if q.Digest != "" {
		if got, err := b.f.content(q.Digest); err == nil {
			return answer(got, cluster.FromCache, "")
		}
		if q.Held {
			return cluster.Answer{Refusal: cluster.NewRefusal("unavailable", fmt.Errorf("%s is not here", q.Digest))}
		}
	}
	got, access, err := b.registry(ctx, ref, q)
	switch {
	case err == nil:
		b.f.log.Info("asked the registry for a member", "node", from, "image", ref, "digest", got.desc.Digest)
		b.remember(ref, got)
		return answer(got, cluster.FromRegistry, access)
	case !errors.Is(err, origin.ErrUnavailable):
		b.f.log.Info("the registry refused a member", "node", from, "image", ref, "err", err)
		return cluster.Answer{Refusal: refusalOf(err)}
	}
	if q.Digest != "" {
		return cluster.Answer{Refusal: refusalOf(err)}
	}
	seen, access, ok := b.seen(ref, q)
	if !ok {
		return cluster.Answer{Refusal: refusalOf(err)}
	}
	b.f.log.Info("told a member what was seen", "node", from, "image", ref, "digest", seen.desc.Digest, "age", seen.age, "err", err)
	return answer(seen, cluster.FromCache, access)
}

func answer(got found, source, access string) cluster.Answer {
	return cluster.Answer{
		MediaType: got.desc.MediaType, Digest: got.desc.Digest, Body: got.body,
		Source: source, Access: access, Age: int64(got.age / time.Second),
	}
}

// registry asks the registry with the question's credential. Every error that is no refusal
// wraps origin.ErrUnavailable.
func (b behalf) registry(ctx context.Context, ref reference.Named, q cluster.Question) (got found, access string, err error) {
	host := reference.Domain(ref)
	if b.f.awayForOthers.has(host) {
		return got, "", fmt.Errorf("%s: %w to this node, a moment ago", host, origin.ErrUnavailable)
	}
	c, err := b.client(ref, q.Login, q.Insecure)
	if err != nil {
		return got, "", err
	}
	defer c.Close()
	repo, err := c.Repository(ref)
	if err != nil {
		return got, "", fmt.Errorf("%w: %w", origin.ErrUnavailable, err)
	}
	patience := behalfPatience
	if q.Offline {
		patience = behalfMoment
	}
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	got.desc, got.body, err = repo.Manifest(asking, tagOrDigest(ref))
	if err != nil && asking.Err() != nil {
		err = fmt.Errorf("%s: %w: no answer within %s", host, origin.ErrUnavailable, patience)
	}
	if errors.Is(err, origin.ErrUnavailable) && ctx.Err() == nil {
		b.f.awayForOthers.note(host)
	}
	if err != nil {
		return got, "", err
	}
	if got.access = repo.Access(); got.access == origin.Public {
		return got, cluster.AccessPublic, nil
	}
	return got, cluster.AccessLogin, nil
}

// seen is what this node saw under a name, if who asks may have it: the member itself,
// everybody when it is public, or a user with a credential that the registry accepted here before.
func (b behalf) seen(ref reference.Named, q cluster.Question) (got found, access string, ok bool) {
	got, err := b.f.seenHere(ref)
	if err != nil {
		return got, "", false
	}
	if got.access == origin.Public {
		return got, cluster.AccessPublic, true
	}
	if q.Login != nil {
		c, err := origin.New(origin.Options{HostDirs: []string{}, Credentials: origin.LoginFor(ref, q.Login.Username, q.Login.Secret), OnBehalf: true, Log: b.f.log})
		if err == nil && c.Accepted(ref, got.access) {
			return got, cluster.AccessLogin, true
		}
	}
	return got, "", q.Node
}

// remember keeps what the registry said to a member, so that it can be told again when the
// registry is away.
func (b behalf) remember(ref reference.Named, got found) {
	if b.f.kept.Add(int64(len(got.body))) > keptForOthers {
		return
	}
	if old, err := b.f.o.Store.Ref(ref.String()); err == nil && old.Target.Digest == got.desc.Digest && old.Access != "" {
		got.access = old.Access // of a user here, who may be in need of it when the registry is away
	}
	if err := b.f.keep(ref, got); err != nil {
		b.f.log.Warn("cannot keep what the registry told a member", "image", ref, "err", err)
	}
}

// RunErrand implements cluster.Errands.
func (b behalf) RunErrand(ctx context.Context, from string, e cluster.Errand, begun func()) error {
	if b.f.o.NoSeed {
		return cluster.NewRefusal("unavailable", errors.New("this node gives nothing to others"))
	}
	if info, err := b.f.o.Store.Stat(e.Digest); err == nil && info.Complete && info.Size == e.Size {
		begun()
		return nil
	}
	ref, err := reference.ParseNamed(e.Ref)
	if err != nil {
		return refusalOf(err)
	}
	c, err := b.client(ref, e.Login, e.Insecure)
	if err != nil {
		return refusalOf(err)
	}
	defer c.Close()
	repo, err := c.Repository(ref)
	if err != nil {
		return refusalOf(err)
	}
	// Before anything here depends on the credential: a fetch of the same blob that
	// goes well must not get one that the registry does not accept.
	desc, err := repo.Stat(ctx, e.Digest)
	if err != nil {
		return refusalOf(err)
	}
	if desc.Size != e.Size {
		return cluster.NewRefusal("mismatch", fmt.Errorf("%s has %d bytes at the registry, not %d", e.Digest, desc.Size, e.Size))
	}
	blob, err := b.f.Blob(ctx, ref, desc, BlobOptions{Origin: repo})
	if err != nil {
		return cluster.NewRefusal("failed", err)
	}
	defer blob.Close()
	b.f.log.Info("fetching a blob for a member", "node", from, "image", ref, "blob", e.Digest, "size", e.Size)
	blob.Fetch()
	begun()
	if err := blob.Wait(ctx); err != nil {
		return refusalOf(err)
	}
	return nil
}
