package tracker

import (
	"errors"
	"net/url"
	"strconv"

	"github.com/anacrolix/torrent/metainfo"
)

// event is why a client announces itself (BEP 3).
type event uint8

const (
	regular event = iota // it is time again
	started
	completed
	stopped
)

// announce is the query of an announce. The client's address is not among it.
type announce struct {
	infoHash metainfo.Hash
	port     uint16 // 0 when the client listens to nobody
	left     int64  // bytes that it lacks, 0 for a seeder; -1 when it does not know yet
	event    event
	want     int // how many peers it would like
}

const (
	// defaultWant is how many peers are told to a client that does not say: what BEP 3 has.
	defaultWant = 50
	// maxWant bounds an answer: 200 IPv6 peers are 3.6 KB. Clients connect to fewer.
	maxWant = 200
	// maxScrape bounds the torrents of one scrape: the URL of more is longer than servers take.
	maxScrape = 64
	// maxQuery bounds a query in bytes: an announce has about 400, a scrape of 64 torrents 5,000.
	maxQuery = 8 << 10
)

// refusal is an error that a client may be told, as its user sees it.
type refusal string

func (r refusal) Error() string { return string(r) }

// parseAnnounce reads the query of an announce.
func parseAnnounce(query string) (announce, error) {
	q, err := parseQuery(query)
	if err != nil {
		return announce{}, err
	}
	a := announce{left: -1, want: defaultWant}
	if a.infoHash, err = parseHash(q.Get("info_hash")); err != nil {
		return announce{}, err
	}
	if len(q.Get("peer_id")) != len(a.infoHash) {
		return announce{}, refusal("peer_id is not of 20 bytes")
	}
	port, err := strconv.ParseUint(q.Get("port"), 10, 16)
	if err != nil {
		return announce{}, refusal("port is not a number from 0 to 65535")
	}
	a.port = uint16(port)
	if n, err := strconv.ParseInt(q.Get("left"), 10, 64); err == nil && n >= 0 {
		a.left = n
	}
	switch q.Get("event") {
	case "started":
		a.event = started
	case "completed":
		a.event = completed
	case "stopped":
		a.event = stopped
	}
	if n, err := strconv.Atoi(q.Get("numwant")); err == nil && n >= 0 {
		a.want = min(n, maxWant)
	}
	if a.event == stopped {
		a.want = 0
	}
	return a, nil
}

// parseScrape reads the query of a scrape.
func parseScrape(query string) ([]metainfo.Hash, error) {
	q, err := parseQuery(query)
	if err != nil {
		return nil, err
	}
	texts := q["info_hash"]
	if len(texts) == 0 {
		return nil, refusal("info_hash is missing: this tracker does not list all it has")
	}
	if len(texts) > maxScrape {
		return nil, refusal("too many torrents in one scrape")
	}
	hashes := make([]metainfo.Hash, 0, len(texts))
	for _, text := range texts {
		h, err := parseHash(text)
		if err != nil {
			return nil, err
		}
		hashes = append(hashes, h)
	}
	return hashes, nil
}

func parseQuery(query string) (url.Values, error) {
	if len(query) > maxQuery {
		return nil, refusal("the request is too long")
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		return nil, refusal("the request cannot be read")
	}
	return q, nil
}

func parseHash(text string) (h metainfo.Hash, err error) {
	if copy(h[:], text) != len(h) || len(text) != len(h) {
		return h, refusal("info_hash is not of 20 bytes")
	}
	return h, nil
}

// reasonOf is what a client is told of an error.
func reasonOf(err error) string {
	var r refusal
	if errors.As(err, &r) {
		return string(r)
	}
	return "the tracker has failed"
}
