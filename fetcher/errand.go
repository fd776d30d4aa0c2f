package fetcher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/origin"
)

const (
	// errandLook is how often a bastion looks whether a blob grows. After one look
	// without a byte a member is asked to fetch it: members that have it
	// answer in a tenth of that.
	errandLook = 300 * time.Millisecond
	// errandQuiet is how long a blob may stand still once it has grown before a
	// member is asked to fetch what is left: longer than a swarm takes to turn to another holder.
	errandQuiet = 3 * time.Second
	// errandAgain is how long to wait when no member wants to, before all are asked again.
	errandAgain = 5 * time.Second
)

// Way says how the blobs of one image are fetched.
type Way struct {
	// Repository is where the registry has them; Client has the credentials that
	// members fetch them with for this node when it cannot.
	Repository *origin.Repository
	Client     *origin.Client
	// PeersOnly asks no registry, neither here nor through members.
	PeersOnly bool
	// Remote says that this node does not reach the registry.
	Remote bool
	// Needed is BlobOptions.Needed.
	Needed bool
}

// Layer returns a handle on a blob of an image, as Blob does. On a node that does not
// reach the registry all of the blob comes from members, and while none has it one of
// those that reach the registry is asked to fetch it. There the fetch of all of it begins
// at once: until a member has begun there is nobody whom a single read could be asked of.
func (f *Fetcher) Layer(ctx context.Context, ref reference.Named, desc ocispec.Descriptor, w Way) (*Blob, error) {
	remote := f.cluster != nil && (w.Remote || f.o.Reach == ThroughMembers)
	var source Origin
	if !w.PeersOnly && !remote && f.o.Reach != ThroughMembers {
		source = w.Repository
	}
	b, err := f.Blob(ctx, ref, desc, BlobOptions{Origin: source, Needed: w.Needed})
	if err != nil || !remote || w.PeersOnly || b.Complete() {
		return b, err
	}
	e := cluster.Errand{Ref: reference.TrimNamed(ref).String(), Digest: desc.Digest, Size: desc.Size, Insecure: w.Client.Insecure()}
	user, secret, access := w.Client.Login(ref)
	if secret != "" {
		e.Login = &cluster.Login{Username: user, Secret: secret}
	}
	b.over = f.sendFor(b.d, e, access)
	b.d.enter() // a read that finds no holder hears from the swarm when there is one
	b.Fetch()
	return b, nil
}

// errandKey tells errands apart: two users may want the same blob, and the registry let in
// only one of them.
type errandKey struct {
	repository string
	digest     digest.Digest
	access     string
}

// errand is the care for one blob that this node cannot fetch itself.
type errand struct {
	users  int
	cancel context.CancelFunc
	done   chan struct{}
}

// sendFor has members fetch a blob while nothing of it comes, until the function it returns
// is called.
func (f *Fetcher) sendFor(d *download, e cluster.Errand, access string) (over func()) {
	key := errandKey{e.Ref, e.Digest, access}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return func() {}
	}
	er := f.errands[key]
	if er == nil {
		ctx, cancel := context.WithCancel(d.ctx)
		er = &errand{cancel: cancel, done: make(chan struct{})}
		f.errands[key] = er
		go func() {
			defer close(er.done)
			d.sendMembers(ctx, e)
		}()
	}
	er.users++
	return func() {
		f.mu.Lock()
		er.users--
		last := er.users == 0
		if last {
			delete(f.errands, key)
		}
		f.mu.Unlock()
		if last {
			er.cancel()
			<-er.done
		}
	}
}

// sendMembers asks one member after another to fetch the blob, as long as it is not
// complete and does not grow.
func (d *download) sendMembers(ctx context.Context, e cluster.Errand) {
	have, grew, quiet := d.st.Have(), time.Now(), errandLook
	tried := map[string]bool{}
	t := time.NewTicker(errandLook)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if d.st.Complete() {
			return
		}
		if now := d.st.Have(); now > have {
			have, grew, quiet = now, time.Now(), errandQuiet
		}
		if time.Since(grew) < quiet {
			continue
		}
		m, ok := d.f.errandMember(e.Digest, tried)
		if !ok {
			clear(tried)
			grew, quiet = time.Now(), errandAgain
			continue
		}
		tried[m.ID] = true
		d.log.Info("asking a member to fetch the blob", "node", m.ID, "have", have)
		err := d.f.cluster.RunErrand(ctx, m, e, nil)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			// It has all of it: the swarm brings it.
			grew, quiet = time.Now(), errandAgain
		case errors.Is(err, cluster.ErrBusy), errors.Is(err, cluster.ErrNoErrands):
			d.log.Debug("a member does not fetch the blob", "node", m.ID, "err", err)
		default:
			d.log.Warn("a member could not fetch the blob", "node", m.ID, "err", err)
		}
	}
}

// errandMember is the member to ask for a blob among those not tried: of the preferred, the
// one that ranks first for it, so that bastions that want the same blob ask the same member.
func (f *Fetcher) errandMember(d digest.Digest, tried map[string]bool) (best cluster.Member, ok bool) {
	var top [sha256.Size]byte
	for _, m := range f.Members() {
		if tried[m.ID] {
			continue
		}
		rank := sha256.Sum256([]byte(m.ID + string(d)))
		better := preferred(m) - preferred(best)
		if better == 0 {
			better = bytes.Compare(rank[:], top[:])
		}
		if !ok || better > 0 {
			best, top, ok = m, rank, true
		}
	}
	return best, ok
}
