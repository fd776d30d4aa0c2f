package published

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/snapshotter/index"
)

const (
	// lookWithin is how long a container waits to hear what is published, at most: a list and a
	// manifest, two round trips, take 0.1 s at a far registry. The layer that it waits for is
	// fetched anyhow in a few seconds.
	lookWithin = 2 * time.Second

	// foundFor, noneFor and failedFor are how long what a look found is believed, that there is
	// nothing, and that the registry did not answer. All layers of an image ask within
	// seconds; somebody who has just published wants to see it soon.
	foundFor  = 10 * time.Minute
	noneFor   = time.Minute
	failedFor = 10 * time.Second

	// maxLooks bounds how many images are remembered; a hostile one takes 250 KiB.
	maxLooks = 128
	// maxPerLayer bounds the indexes that are tried for one layer.
	maxPerLayer = 4
	// maxLayers bounds the layers that a look remembers; images have no more.
	maxLayers = 512

	// An index must come within readWithin and a second for each readRate bytes: a hundredth of
	// the layer's own time on any link, and an end on one that stalls.
	readWithin = 2 * time.Second
	readRate   = 256 << 10
	// parallelReads is how many indexes are fetched at once: the layers of an image ask side by side.
	parallelReads = 4
)

// Finder finds published indexes for a node. Its methods may be called by many at once.
type Finder struct {
	log    *slog.Logger
	within time.Duration
	now    func() time.Time
	fetch  chan struct{} // holds one for each index that is fetched
	decode chan struct{} // the same, decoded: one at a time, for a hostile one takes memory

	mu    sync.Mutex // guards following
	looks map[lookKey]*look
}

// FinderOptions are those of a Finder; the zero value is good.
type FinderOptions struct {
	Log *slog.Logger // told what is published and not usable; nil is silence
	// Within bounds a look at what is published; 0 is two seconds.
	Within time.Duration
}

// NewFinder makes a Finder. There is nothing to close.
func NewFinder(o FinderOptions) *Finder {
	f := &Finder{
		log: o.Log, within: o.Within, now: time.Now,
		fetch: make(chan struct{}, parallelReads), decode: make(chan struct{}, 1), looks: map[lookKey]*look{},
	}
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	if f.within <= 0 {
		f.within = lookWithin
	}
	return f
}

// Query says which layer's index is looked for.
type Query struct {
	// Repository is the image's, opened with the credentials of who may read the image.
	Repository Repository
	// Manifest is that of the image, for one platform; without it nothing is found.
	Manifest digest.Digest
	// Layer has the layer's digest and size.
	Layer ocispec.Descriptor
	// DiffID is what the image's configuration says of the layer; "" when that is not known.
	DiffID digest.Digest
	// Open opens the index's blob. What it reads need not have been checked.
	Open func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// Find gets the first usable index that is published for a layer, see the package comment for what
// has been checked of it. ErrNone says that there is none, ErrInvalid that what is there is refused,
// and any other error that the registry, or who has the blob, did not give it in time.
//
// The registry is asked once for an image, by whichever of its layers comes first.
func (f *Finder) Find(ctx context.Context, q Query) (*index.Index, error) {
	if q.Manifest == "" {
		return nil, fmt.Errorf("%s of an image whose manifest is not known: %w", q.Layer.Digest, ErrNone)
	}
	l := f.lookOf(lookKey{q.Repository.Name().Name(), q.Manifest})
	candidates, trouble, err := f.look(ctx, l, q)
	if err != nil {
		return nil, err
	}
	for _, e := range candidates {
		x, err := f.read(ctx, q, e)
		if err == nil {
			return x, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		err = fmt.Errorf("the index %s of the layer %s of %s@%s: %w", e.digest, q.Layer.Digest, q.Repository.Name(), q.Manifest, err)
		f.log.Warn("a published index is not used", "error", err)
		if trouble == nil {
			trouble = err
		}
		if errors.Is(err, ErrInvalid) {
			l.refuse(ctx, e, err)
		}
	}
	if trouble != nil {
		return nil, trouble
	}
	return nil, fmt.Errorf("the layer %s of %s@%s: %w", q.Layer.Digest, q.Repository.Name(), q.Manifest, ErrNone)
}

type lookKey struct {
	repository string
	manifest   digest.Digest
}

// look is what one image's referrers say.
type look struct {
	turn chan struct{} // holds one while somebody has the following
	// until is when it has to be done again; zero: it has not been done.
	until   time.Time
	found   map[digest.Digest][]entry // by layer
	refused map[digest.Digest]error   // why one of found was taken out; by layer
	trouble error                     // of a referrer
	err     error                     // of all
}

// look returns the indexes of a layer that are published, after looking if that was not done lately.
// Who comes while another looks waits for his answer, and looks himself when that one gave up.
func (f *Finder) look(ctx context.Context, l *look, q Query) (candidates []entry, trouble, err error) {
	if err := enter(ctx, l.turn); err != nil {
		return nil, nil, err
	}
	defer func() { <-l.turn }()
	if f.now().After(l.until) {
		f.ask(ctx, l, q.Repository, q.Manifest)
	}
	if err := ctx.Err(); err != nil && l.err != nil {
		return nil, nil, err
	}
	if trouble = l.refused[q.Layer.Digest]; trouble == nil {
		trouble = l.trouble
	}
	return l.found[q.Layer.Digest], trouble, l.err
}

// refuse keeps an index from being fetched again, and decoded, for each container that starts.
func (l *look) refuse(ctx context.Context, e entry, why error) {
	if enter(ctx, l.turn) != nil {
		return
	}
	defer func() { <-l.turn }()
	// Others go through the slice that is there.
	l.found[e.layer] = slices.DeleteFunc(slices.Clone(l.found[e.layer]), func(other entry) bool { return other == e })
	l.refused[e.layer] = why
}

func (f *Finder) lookOf(k lookKey) *look {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.looks[k]
	if l == nil {
		if len(f.looks) >= maxLooks {
			clear(f.looks) // costs each image that is still pulled one more look
		}
		l = &look{turn: make(chan struct{}, 1)}
		f.looks[k] = l
	}
	return l
}

// ask looks.
func (f *Finder) ask(ctx context.Context, l *look, repo Repository, manifest digest.Digest) {
	limited, cancel := context.WithTimeout(ctx, f.within)
	defer cancel()
	artifacts, trouble, err := referrers(limited, repo, manifest, f.log)
	l.found, l.refused, l.trouble, l.err = map[digest.Digest][]entry{}, map[digest.Digest]error{}, trouble, err
	for _, a := range artifacts {
		for _, e := range a.entries {
			had := l.found[e.layer]
			if !slices.Contains(had, e) && len(had) < maxPerLayer && (had != nil || len(l.found) < maxLayers) {
				l.found[e.layer] = append(had, e)
			}
		}
	}
	for _, had := range l.found {
		// The one with the most places to begin at first.
		slices.SortStableFunc(had, func(a, b entry) int { return cmp.Compare(b.size, a.size) })
	}
	switch {
	case ctx.Err() != nil:
		l.until = time.Time{} // who asked gave up, which says nothing to the next one
	case err != nil:
		if limited.Err() != nil {
			l.err = fmt.Errorf("%s did not say within %v which indexes are published for %s: %w", repo.Name(), f.within, manifest, err)
		}
		l.until = f.now().Add(failedFor)
	case len(l.found) == 0:
		l.until = f.now().Add(noneFor)
	default:
		l.until = f.now().Add(foundFor)
	}
}

// read fetches, decodes and checks an index.
func (f *Finder) read(ctx context.Context, q Query, e entry) (*index.Index, error) {
	if e.size > q.Layer.Size+slack {
		return nil, fmt.Errorf("%w: it has %d bytes, for a layer of %d", ErrInvalid, e.size, q.Layer.Size)
	}
	text, err := f.blob(ctx, q, e)
	if err != nil {
		return nil, err
	}
	if err := enter(ctx, f.decode); err != nil {
		return nil, err
	}
	defer func() { <-f.decode }()
	return Decode(text, q.Layer, q.DiffID)
}

// Decode takes an index from somebody: with bounded memory, and only one of that layer. diffID is "" when it is not known. What the
// index says stays a claim until Verify. Errors match ErrInvalid.
func Decode(text []byte, layer ocispec.Descriptor, diffID digest.Digest) (*index.Index, error) {
	if err := affordable(text); err != nil {
		return nil, err
	}
	x, err := index.Decode(bytes.NewReader(text))
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	case x.Blob != layer.Digest || x.BlobSize != layer.Size:
		return nil, fmt.Errorf("%w: it is of the layer %s with %d bytes", ErrInvalid, x.Blob, x.BlobSize)
	case x.DiffID == "":
		return nil, fmt.Errorf("%w: it has no diff ID, so it could never be verified", ErrInvalid)
	case diffID != "" && x.DiffID != diffID:
		return nil, fmt.Errorf("%w: it is of a layer with the diff ID %s, the image's configuration says %s", ErrInvalid, x.DiffID, diffID)
	}
	return x, nil
}

// affordable says what keeps an index from being decoded.
func affordable(text []byte) error {
	n, err := index.Footprint(text)
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	case n > maxFootprint:
		return fmt.Errorf("%w: it takes %d MiB of memory, more than the %d that are allowed", ErrInvalid, n>>20, maxFootprint>>20)
	}
	return nil
}

// blob fetches an index's bytes.
func (f *Finder) blob(ctx context.Context, q Query, e entry) ([]byte, error) {
	// The time runs while others are waited for, too: who is stuck behind slow ones does without.
	ctx, cancel := context.WithTimeout(ctx, readWithin+time.Duration(e.size)*time.Second/readRate)
	defer cancel()
	if err := enter(ctx, f.fetch); err != nil {
		return nil, err
	}
	defer func() { <-f.fetch }()
	r, err := q.Open(ctx, e.descriptor())
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(r, e.size+1))
	if err = errors.Join(err, r.Close()); err != nil {
		return nil, err
	}
	if int64(len(text)) != e.size || e.digest.Algorithm().FromBytes(text) != e.digest {
		return nil, errors.New("what came has not its digest")
	}
	return text, nil
}

// enter takes a place, or gives up with ctx.
func enter(ctx context.Context, places chan struct{}) error {
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
