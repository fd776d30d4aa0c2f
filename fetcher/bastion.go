package fetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

// Reach says how this node gets at registries.
type Reach string

// The values of Reach; "" is Direct.
const (
	// Direct asks registries, and members when one does not answer.
	Direct Reach = "direct"
	// ThroughMembers never asks a registry: a bastion. Manifests and blobs come from
	// members of the trust domain, which ask registries for it.
	ThroughMembers Reach = "members"
)

const (
	// maxAsked bounds the members that are asked one after another whether they
	// reach a registry: each gets the credential. Three that cannot say that this
	// is no accident.
	maxAsked = 3
	// maxAskedSeen bounds the members that are asked, all at once, when what they
	// saw will do.
	maxAskedSeen = 16
	// firstMember bounds the wait for any member to turn up.
	firstMember = time.Second
	// askNext is when the next member is asked beside one that has not answered: a
	// registry and its token service on another continent take less.
	askNext = 2 * time.Second
	// registrySilent is how long the registry may be silent before members are asked
	// as well. One that drops packets costs 20 s until it counts as away.
	registrySilent = 3 * time.Second
	// contentWithin is the same for a manifest whose digest is known, which
	// any member may have and gives without asking anybody.
	contentWithin = 300 * time.Millisecond
	// offlinePatience is how long the registry is tried when what was seen will do.
	offlinePatience = 5 * time.Second
	// awayFor is how long a registry that could not be reached counts as away.
	// It is still asked, but members at the same time.
	awayFor = 30 * time.Second
	// maxAway bounds the registries that are remembered to be away.
	maxAway = 256
)

// unreached remembers which registries could not be reached lately. The zero value
// is ready.
type unreached struct {
	mu    sync.Mutex // guards following
	until map[string]time.Time
}

func (u *unreached) note(host string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.until == nil || len(u.until) >= maxAway {
		u.until = map[string]time.Time{}
	}
	u.until[host] = time.Now().Add(awayFor)
}

func (u *unreached) clear(host string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.until, host)
}

func (u *unreached) has(host string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return time.Now().Before(u.until[host])
}

// Away reports whether the registry of an image is not to be asked, or could not be
// reached lately, while there are members who might.
func (f *Fetcher) Away(ref reference.Named) bool {
	if f.o.Reach == ThroughMembers {
		return true
	}
	return f.away.has(reference.Domain(ref)) && len(f.Members()) > 0
}

// found is what somebody said that a reference names.
type found struct {
	desc   ocispec.Descriptor
	body   []byte
	access string         // as store.Ref.Access
	age    time.Duration  // since the registry said so
	from   cluster.Member // who told; the zero Member: the registry, or this node
}

// reply is what members said together.
type reply struct {
	live  *found // the registry's word, or content with the digest asked for
	seen  *found // the newest that one of them saw
	err   error  // the registry's refusal, when final; else why there is nothing, or nil
	final bool
	asked int
}

// refusals are the errors of a registry that keep their identity between members. A
// final one is the registry's word on the image and the credential: who hears it
// asks nobody else.
var refusals = []struct {
	kind  string
	err   error
	final bool
}{
	{"denied", origin.ErrDenied, true},
	{"not_found", origin.ErrNotFound, true},
	{"rate_limited", origin.ErrRateLimited, false},
	{"tls", origin.ErrTLS, false},
	{"mismatch", origin.ErrMismatch, false},
	{"too_large", origin.ErrTooLarge, false},
	{"unsupported", origin.ErrUnsupported, false},
	{"unavailable", origin.ErrUnavailable, false},
	{"unexpected", origin.ErrUnexpected, false},
}

// refusalOf puts an error of the registry on the wire. What is none of them is a
// registry that did not answer.
func refusalOf(err error) *cluster.Refusal {
	for _, r := range refusals {
		if errors.Is(err, r.err) {
			return cluster.NewRefusal(r.kind, err)
		}
	}
	return cluster.NewRefusal("unavailable", err)
}

// refused is a refusal as the node that asked tells it. A kind of a newer member's is a
// registry that did not answer.
func refused(m cluster.Member, r *cluster.Refusal) (err error, final bool) {
	kind := origin.ErrUnavailable
	for _, k := range refusals {
		if k.kind == r.Kind {
			kind, final = k.err, k.final
		}
	}
	return &throughMember{m, r.Message, kind}, final
}

// throughMember is what a registry said to a member that asked it for this node.
type throughMember struct {
	member  cluster.Member
	message string
	kind    error
}

func (e *throughMember) Error() string {
	return fmt.Sprintf("%s (asked through %s)", e.message, called(e.member))
}

func (e *throughMember) Unwrap() error { return e.kind }

// called names a member for a person.
func called(m cluster.Member) string {
	return fmt.Sprintf("node %.12s at %s", m.ID, m.Addr)
}

// membersToAsk waits a moment for the first members and returns them: those that say that they
// reach registries first, else in random order.
func (f *Fetcher) membersToAsk(ctx context.Context) []cluster.Member {
	if f.cluster == nil {
		return nil
	}
	// A process that has just begun hears of the members within a few of these.
	look := time.NewTicker(firstMember / 50)
	defer look.Stop()
	ms := f.Members()
	for begun := time.Now(); len(ms) == 0 && time.Since(begun) < firstMember && ctx.Err() == nil; ms = f.Members() {
		select {
		case <-look.C:
		case <-ctx.Done():
		}
	}
	ms = slices.Clone(ms)
	rand.Shuffle(len(ms), func(a, b int) { ms[a], ms[b] = ms[b], ms[a] })
	slices.SortStableFunc(ms, func(a, b cluster.Member) int { return preferred(b) - preferred(a) })
	return ms
}

// preferred ranks members for what has to do with registries: whether they say that they reach
// them, then whether they will stay.
func preferred(m cluster.Member) (rank int) {
	if m.Origin {
		rank += 2
	}
	if !m.Ephemeral {
		rank++
	}
	return rank
}

// askMembers asks one member after another until one has the registry's word, or all
// at once when what they saw will do. access is the name of the question's credential.
func (f *Fetcher) askMembers(ctx context.Context, q cluster.Question, access string) reply {
	ms := f.membersToAsk(ctx)
	if q.Offline {
		ms = ms[:min(len(ms), maxAskedSeen)]
	} else {
		ms = ms[:min(len(ms), maxAsked)]
	}
	type answer struct {
		m   cluster.Member
		a   cluster.Answer
		err error
	}
	answers := make(chan answer, len(ms))
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var r reply
	running := 0
	next := func() {
		if r.asked == len(ms) {
			return
		}
		m := ms[r.asked]
		r.asked++
		running++
		wg.Go(func() {
			a, err := f.cluster.Resolve(ctx, m, q)
			answers <- answer{m, a, err}
		})
	}
	for next(); q.Offline && r.asked < len(ms); {
		next()
	}
	hedge := time.NewTicker(askNext)
	defer hedge.Stop()
	for running > 0 {
		select {
		case <-hedge.C:
			next()
			continue
		case a := <-answers:
			running--
			if a.err == nil && a.a.Refusal == nil {
				a.err = r.take(a.m, a.a, q, access)
			} else if a.err == nil {
				var final bool
				if a.err, final = refused(a.m, a.a.Refusal); final {
					r.err, r.final = a.err, true
					return r
				}
			}
			if r.live != nil {
				return r
			}
			if a.err != nil && ctx.Err() == nil {
				f.log.Info("a member has no answer", "image", q.Ref, "node", a.m.ID, "err", a.err)
				if !errors.Is(a.err, cluster.ErrBusy) && !errors.Is(a.err, cluster.ErrNoErrands) {
					r.err = a.err
				}
			}
			next()
		}
	}
	if r.err == nil {
		r.err = ctx.Err()
	}
	return r
}

// take takes an answer in; an error says that it is none.
func (r *reply) take(m cluster.Member, a cluster.Answer, q cluster.Question, access string) error {
	got := &found{
		desc: ocispec.Descriptor{MediaType: a.MediaType, Digest: a.Digest, Size: int64(len(a.Body))},
		body: a.Body, age: time.Duration(a.Age) * time.Second, from: m,
	}
	if err := origin.Check(got.desc, got.body); err != nil {
		return fmt.Errorf("%s gave a manifest that is none: %w", called(m), err)
	}
	switch a.Access {
	case cluster.AccessPublic:
		got.access = origin.Public
	case cluster.AccessLogin:
		got.access = access
	}
	switch {
	case a.Source == cluster.FromRegistry || q.Digest != "":
		r.live = got
	case r.seen == nil || got.age < r.seen.age:
		r.seen = got
	}
	return nil
}
