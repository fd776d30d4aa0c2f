package fetcher

import (
	"errors"
	"sync"

	"github.com/docker-quay/docker-quay/fetcher/open"
	"github.com/docker-quay/docker-quay/fetcher/trust"
)

// OpenOptions are this node's part in open BitTorrent swarms, which need no secret: those of torrents that were published for layers.
// Nothing is opened before the first torrent is used.
type OpenOptions struct {
	// Use says for which images torrents are looked for; "" is TorrentsAuto.
	Use TorrentPolicy
	// Listen is the address to listen on, "" for all. Ports is where, beside the port for the cluster, the first that is free;
	// the zero range lets the kernel choose.
	Listen string
	Ports  trust.PortRange
	// Public lets nodes find peers of public torrents without a tracker, by DHT, peer exchange and local service discovery.
	Public bool
}

// errNoOpen: Options.Open is nil.
var errNoOpen = errors.New("this node takes no part in open BitTorrent swarms")

// openSwarms are the node's open swarms: one for torrents that may be talked of, one that knows no DHT, no peer exchange and no local
// discovery.
type openSwarms struct {
	mu              sync.Mutex // guards following
	closed          bool
	public, private *open.Swarm
}

// openSwarm returns the swarm for private or other torrents, which begins now if there was none.
func (f *Fetcher) openSwarm(private bool) (*open.Swarm, error) {
	o := f.o.Open
	if o == nil {
		return nil, errNoOpen
	}
	f.opens.mu.Lock()
	defer f.opens.mu.Unlock()
	if f.opens.closed {
		return nil, ErrClosed
	}
	s := &f.opens.public
	if private || !o.Public {
		s = &f.opens.private
	}
	if *s != nil {
		return *s, nil
	}
	var err error
	*s, err = open.New(open.Options{
		Listen: o.Listen, Ports: o.Ports, Public: s == &f.opens.public,
		Seed: !f.o.NoSeed, UploadLimit: f.up, DownloadLimit: f.down, Log: f.log,
	})
	if err != nil {
		*s = nil
		return nil, err
	}
	f.log.Info("taking part in open BitTorrent", "port", (*s).Port(), "public", s == &f.opens.public)
	return *s, nil
}

func (f *Fetcher) closeOpenSwarms() {
	f.opens.mu.Lock()
	f.opens.closed = true
	all := []*open.Swarm{f.opens.public, f.opens.private}
	f.opens.mu.Unlock()
	for _, s := range all {
		if s == nil {
			continue
		}
		if err := s.Close(); err != nil {
			f.log.Warn("leaving open BitTorrent", "err", err)
		}
	}
}
