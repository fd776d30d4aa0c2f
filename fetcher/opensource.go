package fetcher

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/docker-quay/docker-quay/fetcher/open"
	"github.com/docker-quay/docker-quay/fetcher/published"
)

const (
	// maxOpenSwarms bounds the open swarms of one blob: as many torrents as package published finds of a layer.
	maxOpenSwarms = 4
	// openLeast is how many pieces an open swarm is asked for at a time at least, while the registry is another way: few, since what it
	// was asked for and does not send comes late.
	openLeast = 4
	// openPatience is how long the registry leaves a piece to an open swarm that was asked for it: the window is a second and
	// a half of what the swarm sent lately, so a piece that takes thrice as long is not on its way.
	openPatience = 5 * time.Second
	// openRest is how long a swarm that let pieces wait is asked for no other: the registry gets them meanwhile.
	openRest = time.Second
	// openGrace is how long a fetch that has nothing but open swarms waits for their first peer: a tracker answers in seconds, a search in
	// the DHT takes up to half a minute.
	openGrace = 30 * time.Second
	// openLook is how often a swarm is asked how it goes.
	openLook = time.Second
	// torrentSupplier begins the name of a torrent as the supplier of a piece: see open.Torrent.Supplier.
	torrentSupplier = "torrent:"
)

// openSource is one open swarm of a download. Its fields are guarded by the download's mu, but those that never change.
type openSource struct {
	meta    *published.Torrent
	private bool // kept to its trackers
	name    supplier
	near    int // pieces of the store that share one of the torrent's

	tor      *open.Torrent     // nil while it is being added
	wanted   map[int]time.Time // pieces asked of it, and since when
	last     time.Time         // when a piece came, or the first was asked for
	rest     time.Time         // nothing is asked before
	looked   time.Time         // when it was asked how it goes
	met      bool              // it had a peer
	ended    bool              // it contradicts what is here
	attempt  int               // of the download when it was added
	again    bool              // it is to be entered anew
	out      bool              // not believed at the moment
	ticked   time.Time         // when count began
	count    int               // pieces since then
	recently int               // pieces in the second before
}

// addTorrent takes a published torrent of the blob as one more way to it, for as long as the blob is in use. Private ones are kept to
// their trackers.
func (d *download) addTorrent(p *published.Torrent, private bool) error {
	fail := func(err error) error { return fmt.Errorf("%s: torrent %s: %w", d.what(), p.InfoHash, err) }
	if p.Info.TotalLength() != d.desc.Size || p.Layer.Digest != "" && p.Layer.Digest != d.desc.Digest {
		return fail(open.ErrMismatch)
	}
	o := &openSource{
		meta: p, private: private, name: torrentSupplier + p.InfoHash.HexString(), wanted: map[int]time.Time{},
		near: max(int(p.Info.PieceLength/d.st.PieceSize()), 1),
	}
	var old *openSource
	d.mu.Lock()
	i := slices.IndexFunc(d.opens, func(have *openSource) bool { return have.name == o.name })
	switch {
	case d.stopped:
		d.mu.Unlock()
		return fail(ErrClosed)
	case d.banned[o.name]:
		d.mu.Unlock()
		return fail(open.ErrMismatch)
	case i >= 0:
		// Somebody else uses it already; with more trackers it begins anew.
		old = d.opens[i]
		o.meta = old.meta.With(slices.Concat(p.Trackers...), nil)
		o.private = private || old.private
		if old.tor == nil || len(o.meta.Trackers) == len(old.meta.Trackers) {
			d.mu.Unlock()
			return nil
		}
		d.opens[i] = o
	case len(d.opens) >= maxOpenSwarms:
		d.mu.Unlock()
		return fail(fmt.Errorf("%d others are in use for it", maxOpenSwarms))
	default:
		d.opens = append(d.opens, o)
	}
	d.mu.Unlock()
	if old != nil {
		old.tor.Drop()
	}
	if err := d.enterOpen(o); err != nil {
		return fail(err)
	}
	return nil
}

// enterOpen enters the swarm of a source that is in d.opens. Its error takes the source out again.
func (d *download) enterOpen(o *openSource) error {
	s, err := d.f.openSwarm(o.private)
	var tor *open.Torrent
	if err == nil {
		tor, err = s.Add(o.meta, openStore{d, o})
	}
	d.mu.Lock()
	if err == nil && (d.stopped || !slices.Contains(d.opens, o)) {
		err = ErrClosed
	}
	if err != nil {
		d.opens = slices.DeleteFunc(d.opens, func(have *openSource) bool { return have == o })
		d.mu.Unlock()
		if tor != nil {
			tor.Drop()
		}
		return err
	}
	now := time.Now()
	o.tor, o.attempt, o.ended, o.again = tor, d.attempts, false, false
	o.last, o.ticked, o.rest = now, now, time.Time{}
	clear(o.wanted)
	d.openSince = now
	d.mu.Unlock()
	d.poke()
	return nil
}

// openNow are the open swarms that can be asked.
func (d *download) openNow() []*openSource {
	d.mu.Lock()
	defer d.mu.Unlock()
	var all []*openSource
	for _, o := range d.opens {
		if o.tor != nil {
			all = append(all, o)
		}
	}
	return all
}

// tellOpen tells the open swarms of a piece that has come, but not the one that it came by.
func (d *download) tellOpen(i int, by supplier) {
	for _, o := range d.openNow() {
		if o.name != by {
			o.tor.Have(i)
		}
	}
}

// leaveOpen leaves the open swarms.
func (d *download) leaveOpen() {
	d.mu.Lock()
	all := d.opens
	d.opens = nil
	d.mu.Unlock()
	for _, o := range all {
		if o.tor != nil {
			o.tor.Drop()
		}
	}
}

// wantedOpen reports whether a piece is asked of an open swarm. Called with d.mu held.
func (d *download) wantedOpen(i int) bool {
	for _, o := range d.opens {
		if _, ok := o.wanted[i]; ok {
			return true
		}
	}
	return false
}

// fromOpen reports whether a piece came by a torrent: nobody vouches for it before the blob is complete. Called with d.mu held.
func (d *download) fromOpen(i int) bool { return strings.HasPrefix(d.supplier[i], torrentSupplier) }

// vouched reports whether members may have the pieces [first, last): none came by a torrent. Called with d.mu held.
func (d *download) vouched(first, last int) bool {
	for i := first; d.byOpen && i < last; i++ {
		if d.fromOpen(i) {
			return false
		}
	}
	return true
}

// fillOpen keeps the open swarms busy, as fillWindow does the closed one.
func (d *download) fillOpen() {
	for _, o := range d.openNow() {
		d.fillFrom(o, time.Now())
	}
}

func (d *download) fillFrom(o *openSource, now time.Time) {
	available := o.tor.Availability() // not under d.mu: it takes the library's lock
	d.look(o, now)
	d.mu.Lock()
	if (o.ended || o.again) && o.attempt != d.attempts && !o.out {
		// What it contradicted was wrong, perhaps; and a swarm in which this node seemed to have everything lost its peers.
		d.mu.Unlock()
		o.tor.Drop()
		if err := d.enterOpen(o); err != nil {
			d.log.Warn("a torrent is not used any more", "torrent", o.meta.InfoHash, "err", err)
		}
		return
	}
	registry := d.originUsable(now)
	withdrawn := d.withdraw(o, now, available, registry || len(d.opens) > 1 || d.tor != nil)
	var wishes []int
	if !o.ended && !o.out && !now.Before(o.rest) && !(d.holdsBack() && d.f.hot(startQuiet)) {
		wishes = d.choose(o, available, d.openWindow(o, now, registry), registry)
	}
	if len(o.wanted) == 0 && len(wishes) > 0 {
		o.last = now // the clock of its stall starts with the first wish
	}
	for _, i := range wishes {
		o.wanted[i] = now
	}
	d.mu.Unlock()
	for _, i := range withdrawn {
		o.tor.Unwant(i)
	}
	for _, i := range wishes {
		o.tor.Want(i)
	}
}

// look asks a swarm how it goes, now and then.
func (d *download) look(o *openSource, now time.Time) {
	d.mu.Lock()
	due := now.Sub(o.looked) >= openLook
	if due {
		o.looked = now
	}
	d.mu.Unlock()
	if !due {
		return
	}
	s := o.tor.Stats()
	d.mu.Lock()
	defer d.mu.Unlock()
	o.met = o.met || s.Peers > 0
	o.ended = errors.Is(s.Err, open.ErrMismatch)
}

// withdraw takes back wishes that are met and, when there is another way, those that nobody there can meet or that wait for too long.
// Called with d.mu held.
func (d *download) withdraw(o *openSource, now time.Time, available []uint16, otherWay bool) (back []int) {
	silent := otherWay && len(o.wanted) > 0 && now.Sub(o.last) > stalledAfter
	if silent {
		o.rest = now.Add(distrustPeers)
	}
	for i, since := range o.wanted {
		late := otherWay && now.Sub(since) > openPatience
		switch {
		case d.st.Has(i):
		case silent, late, o.ended, o.out, otherWay && (i >= len(available) || available[i] == 0):
			back = append(back, i)
			if late && !silent {
				o.rest = now.Add(openRest)
			}
		default:
			continue
		}
		delete(o.wanted, i)
	}
	return back
}

// openWindow is how many more pieces a swarm may be asked for. Beside a registry it grows with what the swarm sends. Called with d.mu
// held.
func (d *download) openWindow(o *openSource, now time.Time, registry bool) int {
	limit := int64(window)
	if d.f.hot(0) {
		limit = demandWindow
	}
	if now.Sub(o.ticked) >= time.Second {
		o.recently, o.count, o.ticked = o.count, 0, now
	}
	most := max(int(limit/d.st.PieceSize()), openLeast)
	if registry {
		most = min(most, max(openLeast, max(o.recently, o.count)*3/2))
	}
	return most - len(o.wanted)
}

// choose picks up to room pieces that a swarm has and nobody else was asked for, those that somebody waits for first, then the rarest,
// and those together that share a piece of the torrent. Called with d.mu held.
func (d *download) choose(o *openSource, available []uint16, room int, registry bool) []int {
	if room <= 0 {
		return nil
	}
	type candidate struct{ piece, holders, order int }
	var can []candidate
	order := map[int]int{} // of pieces of the torrent; chance among equals
	for i, n := range available {
		waited := d.flights[i] != nil // which asks the registry and members itself
		if n == 0 || i >= d.pieces || d.st.Has(i) || d.claims[d.segmentOf(i)] || waited && registry || d.wanted[i].reads > 0 || d.wantedOpen(i) {
			continue
		}
		if waited {
			n = 0
		}
		group := i / o.near
		if _, ok := order[group]; !ok {
			order[group] = rand.Int()
		}
		can = append(can, candidate{i, int(n), order[group]})
	}
	slices.SortStableFunc(can, func(a, b candidate) int {
		if a.holders != b.holders {
			return a.holders - b.holders
		}
		return cmp.Or(cmp.Compare(a.order, b.order), a.piece-b.piece)
	})
	var wishes []int
	for _, c := range can[:min(len(can), room)] {
		wishes = append(wishes, c.piece)
	}
	return wishes
}

// wishOpen asks the open swarms for pieces that somebody waits for.
func (d *download) wishOpen(first, last int) {
	for _, o := range d.openNow() {
		d.mu.Lock()
		use := !o.ended && !o.out
		for i := first; use && i <= last; i++ {
			if _, ok := o.wanted[i]; !ok && !d.st.Has(i) {
				o.wanted[i] = time.Now()
			}
		}
		d.mu.Unlock()
		for i := first; use && i <= last; i++ {
			o.tor.Want(i)
		}
	}
}

// openLimit is how long a fetch that has no other way may stand still for the sake of its torrents, and for how long it does.
// Called with d.mu held.
func (d *download) openLimit(now time.Time) (limit, quiet time.Duration) {
	quiet = now.Sub(d.openSince)
	if d.seeking > 0 {
		return quiet + 1, quiet // the search has a deadline of its own
	}
	for _, o := range d.opens {
		switch {
		case o.ended && o.attempt == d.attempts:
		case o.met:
			limit = noProgress
		default:
			limit = max(limit, openGrace)
		}
	}
	return limit, quiet
}
