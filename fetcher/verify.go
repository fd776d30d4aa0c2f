package fetcher

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/cluster"
	"github.com/docker-quay/docker-quay/fetcher/store"
)

// maxAttempts bounds how often a blob whose digest does not match is fetched
// again, in part or whole, before the fetch fails.
const maxAttempts = 6

// witnessTries is how often, announceEvery apart, the keeper is asked for a peer that
// has the blob whole when those that were known have it wrong.
const witnessTries = 3

// verify hashes the blob as its beginning grows, so that the last piece is
// followed by the verdict at once, and acts on the verdict.
func (d *download) verify(r *run) {
	for {
		sum, err := d.hash(r.ctx)
		if err != nil {
			if r.ctx.Err() == nil {
				d.fail(r, fmt.Errorf("%s: %w", d.what(), err))
			}
			return
		}
		d.mu.Lock()
		if d.run != r || d.state != Fetching {
			d.mu.Unlock()
			return
		}
		d.setState(Verifying)
		d.mu.Unlock()
		if sum == d.desc.Digest {
			if err := d.st.Finish(r.ctx, sum); err != nil {
				if r.ctx.Err() == nil {
					d.fail(r, fmt.Errorf("%s: %w", d.what(), err))
				}
				return
			}
			d.mu.Lock()
			suspects, believed := d.suspects, d.believed
			d.mu.Unlock()
			if believed != "" {
				d.forgive(believed) // all that is here agrees with it
			}
			for _, peer := range suspects {
				if peer != believed {
					d.ban(peer)
				}
			}
			d.complete(r)
			return
		}
		if err := d.mend(r); err != nil {
			if r.ctx.Err() == nil {
				d.fail(r, err)
			}
			return
		}
		d.mu.Lock()
		if d.run != r {
			d.mu.Unlock()
			return
		}
		d.setState(Fetching)
		d.mu.Unlock()
		d.poke()
	}
}

// hash returns the digest of the blob, waiting for pieces as it goes.
func (d *download) hash(ctx context.Context) (digest.Digest, error) {
	alg := d.desc.Digest.Algorithm()
	h := alg.Hash()
	bp := pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	for i := 0; i < d.pieces; i++ {
		for !d.st.Has(i) {
			changed := d.st.Changed()
			if d.st.Has(i) {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return "", ctx.Err()
			}
		}
		if err := ctx.Err(); err != nil {
			return "", err
		}
		off, n := d.st.PieceRange(i)
		p := (*bp)[:n]
		if _, err := d.st.ReadAt(p, off); err != nil {
			if errors.Is(err, store.ErrMissing) {
				// Pieces were dropped meanwhile, for a word about them that was
				// false: once more, when they are back.
				h.Reset()
				i = -1
				continue
			}
			return "", err
		}
		h.Write(p)
	}
	return digest.NewDigest(alg, h), nil
}

// mend acts on a digest that does not match: it drops the pieces that can be
// wrong, so that they are fetched again. Whoever is proven to have sent a wrong
// one is banned from this blob.
func (d *download) mend(r *run) error {
	d.mu.Lock()
	d.attempts++
	attempt := d.attempts
	if attempt == 1 {
		clear(d.table.tried)
	}
	source := d.origin
	usable := d.originErr == nil && source != nil
	suppliers := maps.Clone(d.supplier)
	d.mu.Unlock()
	d.log.Warn("digest mismatch", "attempt", attempt, "pieces_from_peers", len(suppliers), "registry", usable)

	var fromPeers []int
	for i := range d.pieces {
		if d.st.Source(i) == store.Peer {
			fromPeers = append(fromPeers, i)
		}
	}
	switch {
	case attempt >= maxAttempts, len(fromPeers) == 0 && attempt > 1:
		n := d.drop(func(int) bool { return true })
		return fmt.Errorf("%s: %w (%d pieces dropped after %d attempts; %s)", d.what(), ErrMismatch, n, attempt, blame(suppliers))
	case len(fromPeers) == 0:
		// All of it came from the registry or from an earlier run's disk: once
		// more from the start tells a lying registry from a bad disk.
		d.drop(func(int) bool { return true })
		return nil
	case usable:
		signers := map[int]string{}
		for _, i := range fromPeers {
			signers[i] = d.table.signer(i)
		}
		wrong, err := d.compare(r.ctx, fromPeers, "", func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
			s, err := source.Open(ctx, d.desc, off, n)
			if err == nil && s.Whole() {
				_ = s.Close()
				return nil, errNoRanges
			}
			return s, err
		})
		if errors.Is(err, errNoRanges) {
			d.drop(func(i int) bool { return d.st.Source(i) == store.Peer })
			return nil
		}
		if err != nil {
			return err
		}
		for _, i := range wrong {
			d.blameFor(signers[i], suppliers[i])
		}
		if len(wrong) == 0 {
			// The peers sent what the registry has: then the rest is wrong.
			d.drop(func(int) bool { return true })
		}
		return nil
	case d.otherTorrent(), d.swapSides():
		return nil
	default:
		return d.mendFromPeers(r, fromPeers, suppliers)
	}
}

// errNoRanges: the registry cannot be asked for single pieces.
var errNoRanges = errors.New("the registry answers no ranges")

// witnesses are the peers that have all of the blob and were not believed in vain,
// those last that others contradicted.
func (d *download) witnesses() []cluster.Member {
	d.mu.Lock()
	defer d.mu.Unlock()
	var ms []cluster.Member
	contradicted := map[string]int{}
	for _, p := range d.parts {
		if p.Complete() && d.bannedFor[p.ID] != WrongBytes && !d.table.tried[p.ID] {
			ms = append(ms, p.Member)
			if d.banned[p.ID] {
				contradicted[p.ID] = 1
			}
		}
	}
	slices.SortFunc(ms, func(a, b cluster.Member) int {
		return cmp.Or(contradicted[a.ID]-contradicted[b.ID], strings.Compare(a.ID, b.ID))
	})
	return ms
}

// mendFromPeers is mend without a registry: nobody is beyond doubt, so one peer
// after the other is believed in everything until the digest agrees.
func (d *download) mendFromPeers(r *run, pieces []int, suppliers map[int]supplier) error {
	candidates := d.witnesses()
	for range witnessTries {
		if len(candidates) > 0 || sleep(r.ctx, announceEvery) != nil {
			break
		}
		d.announceNow(r.ctx) // others may have come that have it
		candidates = d.witnesses()
	}
	if len(candidates) == 0 {
		n := d.drop(func(int) bool { return true })
		return fmt.Errorf("%s: %w (%d pieces dropped: no peer that has it whole has the right bytes, and the registry may not be asked; %s)", d.what(), ErrMismatch, n, blame(suppliers))
	}
	m := candidates[0]
	d.table.tried[m.ID] = true
	signers := map[int]string{}
	for _, i := range pieces {
		signers[i] = d.table.signer(i)
	}
	wrong, err := d.compare(r.ctx, pieces, m.ID, func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		p := make([]byte, n)
		ctx, cancel := context.WithTimeout(ctx, rowTakes)
		defer cancel()
		if _, err := d.f.cluster.ReadAt(ctx, m, d.desc.Digest, p, off, cluster.ReadOptions{Silent: silentPeer}); err != nil {
			return nil, err
		}
		return io.NopCloser(bytes.NewReader(p)), nil
	})
	if err != nil && r.ctx.Err() == nil && !isLocal(err) {
		d.log.Warn("cannot compare with a peer", "peer", m.ID, "err", err)
		return nil // the next attempt takes the next
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.believed, d.suspects = m.ID, nil // those of one that was believed in vain
	for _, i := range wrong {
		d.suspects = append(d.suspects, cmp.Or(signers[i], suppliers[i]))
	}
	return err
}

// compare fetches pieces once more from somebody to be believed (a peer, or the
// registry for "") and replaces those that differ, which it returns.
func (d *download) compare(ctx context.Context, pieces []int, believed string, open func(ctx context.Context, off, n int64) (io.ReadCloser, error)) (wrong []int, err error) {
	source := store.Origin
	if believed != "" {
		source = store.Peer
	}
	bp, op := pieceBufs.Get().(*[]byte), pieceBufs.Get().(*[]byte)
	defer pieceBufs.Put(bp)
	defer pieceBufs.Put(op)
	most := int(maxFlight / d.st.PieceSize())
	for len(pieces) > 0 {
		row := 1 // a row of pieces is one request
		for row < len(pieces) && row < most && pieces[row] == pieces[row-1]+1 {
			row++
		}
		off, _ := d.st.PieceRange(pieces[0])
		lastOff, lastLen := d.st.PieceRange(pieces[row-1])
		s, err := open(ctx, off, lastOff+lastLen-off)
		if err != nil {
			return wrong, err
		}
		var body io.Reader = s
		if source == store.Origin { // what members send is limited where it is read
			body = d.limited(ctx, s)
		}
		for _, i := range pieces[:row] {
			pieceOff, n := d.st.PieceRange(i)
			good, have := (*bp)[:n], (*op)[:n]
			if _, err = io.ReadFull(body, good); err != nil {
				break
			}
			if _, rerr := d.st.ReadAt(have, pieceOff); rerr == nil && bytes.Equal(have, good) {
				continue
			}
			wrong = append(wrong, i)
			d.f.count.wrong.Add(1)
			d.drop(func(j int) bool { return j == i })
			if err = d.put(i, good, source, believed); err != nil {
				break
			}
		}
		_ = s.Close()
		if err != nil {
			return wrong, err
		}
		pieces = pieces[row:]
	}
	return wrong, nil
}

// drop forgets the pieces for which f is true, here and in the swarm.
func (d *download) drop(f func(i int) bool) int {
	var gone []int
	n := d.st.ClearPieces(func(i int, _ store.Source) bool {
		if f(i) {
			gone = append(gone, i)
			return true
		}
		return false
	})
	tor := d.torrent()
	d.mu.Lock()
	for _, i := range gone {
		delete(d.supplier, i)
	}
	d.mu.Unlock()
	for _, i := range gone {
		d.table.forget(i)
	}
	if tor != nil {
		for _, i := range gone {
			tor.Lost(i)
		}
	}
	for _, o := range d.openNow() {
		for _, i := range gone {
			o.tor.Lost(i)
		}
	}
	return n
}

// blameFor acts on a piece that was wrong although somebody had signed for it: who
// passed it on did so in good faith.
func (d *download) blameFor(signer, supplier string) {
	if signer != "" {
		d.disbelieve(signer)
		return
	}
	d.ban(supplier)
}

// ban stops asking a peer for this blob.
func (d *download) ban(peer string) { d.banFor(peer, WrongBytes) }

func (d *download) banFor(peer string, why BanReason) {
	if peer == "" {
		return
	}
	if strings.HasPrefix(peer, torrentSupplier) {
		d.dropTorrent(peer)
		return
	}
	d.mu.Lock()
	was := d.banned[peer]
	d.banned[peer] = true
	if !was {
		d.bannedFor[peer] = why
		d.f.count.banned(why)
	}
	tor := d.tor
	d.mu.Unlock()
	if was {
		return
	}
	d.log.Warn("peer sent wrong bytes and is not asked again for this blob", "peer", peer, "reason", why)
	if tor != nil {
		tor.Ban(peer)
	}
}

// blame lists who supplied pieces, for the message of a mismatch.
func blame(suppliers map[int]supplier) string {
	seen := map[string]bool{}
	for _, s := range suppliers {
		if s != "" {
			seen[s] = true
		}
	}
	if len(seen) == 0 {
		return "all of it came from the registry"
	}
	return "peers that supplied pieces: " + strings.Join(slices.Sorted(maps.Keys(seen)), ", ")
}
