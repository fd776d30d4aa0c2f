package tracker

import (
	"container/list"
	"math/rand/v2"
	"net/netip"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"golang.org/x/time/rate"
)

const (
	// maxPerSource bounds the listings of one address: a node with 1,000 layers, and a few of them behind one router.
	maxPerSource = 4000
	// maxIdleSources bounds the addresses that are remembered without a listing, for their rate.
	maxIdleSources = 10_000
	// sourceRate and sourceBurst bound the announces of one address: a node with 1,000 layers announces them all when it starts, and
	// then 3.3 a second.
	sourceRate  = 10
	sourceBurst = 2000
)

// swarms is who was announced for what. It is not safe for concurrent use: the Tracker holds a lock.
type swarms struct {
	max    int           // peers in all
	expiry time.Duration // of a peer that is silent

	torrents map[metainfo.Hash]*swarm // none is empty
	recent   list.List                // of *peer, the one announced last in front
	sources  map[netip.Prefix]*source
	idle     list.List // of *source without listings, the one seen last in front
}

// swarm is the peers of one torrent.
type swarm struct {
	peers      []*peer
	index      map[netip.AddrPort]*peer
	seeders    int
	downloaded int64 // how many told that they completed it
}

// peer is one client's listing for one torrent.
type peer struct {
	addr   netip.AddrPort
	hash   metainfo.Hash
	seeder bool
	seen   time.Time
	at     int // in swarm.peers
	recent *list.Element
	source *source
}

// source is an address that asks: one of IPv4, or the /64 that a single host can have of IPv6.
type source struct {
	prefix netip.Prefix
	peers  int
	bucket *rate.Limiter
	idle   *list.Element // nil while it has listings
}

func newSwarms(max int, expiry time.Duration) *swarms {
	return &swarms{max: max, expiry: expiry, torrents: map[metainfo.Hash]*swarm{}, sources: map[netip.Prefix]*source{}}
}

func prefixOf(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, _ := a.Prefix(bits) // fails for other lengths only
	return p
}

// source finds or makes the record of an address. When there are too many, the one that was idle longest is forgotten.
func (s *swarms) source(a netip.Addr) *source {
	prefix := prefixOf(a)
	src := s.sources[prefix]
	if src == nil {
		src = &source{prefix: prefix, bucket: rate.NewLimiter(sourceRate, sourceBurst)}
		s.sources[prefix] = src
		s.rest(src)
	} else if src.idle != nil {
		s.idle.MoveToFront(src.idle)
	}
	return src
}

// rest notes that a source has no listing.
func (s *swarms) rest(src *source) {
	src.idle = s.idle.PushFront(src)
	if s.idle.Len() > maxIdleSources {
		oldest := s.idle.Back()
		delete(s.sources, oldest.Value.(*source).prefix)
		s.idle.Remove(oldest)
	}
}

// allow reports whether an address may ask n things more now.
func (s *swarms) allow(a netip.Addr, n int, now time.Time) bool {
	s.expire(now)
	return s.source(a).bucket.AllowN(now, n)
}

// announce lists or unlists a peer.
func (s *swarms) announce(a announce, addr netip.AddrPort, now time.Time) error {
	s.expire(now)
	sw := s.torrents[a.infoHash]
	var p *peer
	if sw != nil {
		p = sw.index[addr]
	}
	switch {
	case a.event == stopped:
		if p != nil {
			s.remove(p)
		}
		return nil
	case addr.Port() == 0:
		return nil // it listens to nobody: nothing to tell others
	case p == nil:
		src := s.source(addr.Addr())
		if src.peers >= maxPerSource {
			return refusal("too many torrents of one address")
		}
		for s.recent.Len() >= s.max {
			s.remove(s.recent.Back().Value.(*peer))
		}
		sw = s.torrents[a.infoHash] // it may have been the last of this very swarm
		if sw == nil {
			sw = &swarm{index: map[netip.AddrPort]*peer{}}
			s.torrents[a.infoHash] = sw
		}
		p = &peer{addr: addr, hash: a.infoHash, source: src, at: len(sw.peers)}
		p.recent = s.recent.PushFront(p)
		sw.peers = append(sw.peers, p)
		sw.index[addr] = p
		if src.peers++; src.idle != nil {
			s.idle.Remove(src.idle)
			src.idle = nil
		}
	}
	s.recent.MoveToFront(p.recent)
	p.seen = now
	if a.event == completed && !p.seeder {
		sw.downloaded++
	}
	if seeder := a.left == 0; seeder != p.seeder {
		p.seeder = seeder
		if sw.seeders--; seeder {
			sw.seeders += 2
		}
	}
	return nil
}

// remove takes a peer off every list.
func (s *swarms) remove(p *peer) {
	sw := s.torrents[p.hash]
	last := sw.peers[len(sw.peers)-1]
	sw.peers[p.at], last.at = last, p.at
	sw.peers[len(sw.peers)-1] = nil
	sw.peers = sw.peers[:len(sw.peers)-1]
	delete(sw.index, p.addr)
	if p.seeder {
		sw.seeders--
	}
	if len(sw.peers) == 0 {
		delete(s.torrents, p.hash)
	}
	s.recent.Remove(p.recent)
	if p.source.peers--; p.source.peers == 0 {
		s.rest(p.source)
	}
}

// expire forgets who has been silent for too long.
func (s *swarms) expire(now time.Time) {
	for e := s.recent.Back(); e != nil && now.Sub(e.Value.(*peer).seen) > s.expiry; e = s.recent.Back() {
		s.remove(e.Value.(*peer))
	}
}

// pick chooses up to n others at random for the client at addr. A seeder has no use for seeders.
func (s *swarms) pick(h metainfo.Hash, addr netip.AddrPort, seeder bool, n int) []netip.AddrPort {
	sw := s.torrents[h]
	if sw == nil {
		return nil
	}
	var out []netip.AddrPort
	for i := 0; i < len(sw.peers) && len(out) < n; i++ {
		j := i + rand.IntN(len(sw.peers)-i) // a shuffle that stops when there are enough
		sw.peers[i], sw.peers[j] = sw.peers[j], sw.peers[i]
		sw.peers[i].at, sw.peers[j].at = i, j
		p := sw.peers[i]
		if p.addr == addr || seeder && p.seeder || p.addr.Addr().IsLoopback() && !addr.Addr().IsLoopback() {
			continue
		}
		out = append(out, p.addr)
	}
	return out
}

// count is the seeders and the others of a torrent, and how often it was completed.
func (s *swarms) count(h metainfo.Hash) (seeders, leechers int, downloaded int64) {
	sw := s.torrents[h]
	if sw == nil {
		return 0, 0, 0
	}
	return sw.seeders, len(sw.peers) - sw.seeders, sw.downloaded
}
