package published

import (
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/anacrolix/torrent/metainfo"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// maxMagnet bounds a magnet link in bytes. With a few trackers and web seeds they have one KiB.
	maxMagnet = 64 << 10

	infohashPrefix = "urn:btih:"
)

// Magnet is what a magnet link says (BEP 9): where to meet others who have the info dictionary.
type Magnet struct {
	InfoHash metainfo.Hash
	// Layer is digest and size, as far as the link tells: "" and 0 else. A claim, as in Torrent.
	Layer    ocispec.Descriptor
	Trackers []string
	WebSeeds []string
}

// Magnet is the link. It cannot say that a torrent is private: clients ask DHT for it before they know. Private torrents are given
// away as files.
func (t *Torrent) Magnet() string {
	// The infohash comes first and its colons stay: that is how the clients that search for it by text want it.
	link := "magnet:?xt=" + infohashPrefix + t.InfoHash.HexString() +
		"&dn=" + url.QueryEscape(t.Info.Name) + "&xl=" + strconv.FormatInt(t.Info.Length, 10)
	for _, tier := range t.Trackers {
		for _, u := range tier {
			link += "&tr=" + url.QueryEscape(u)
		}
	}
	for _, u := range t.WebSeeds {
		link += "&ws=" + url.QueryEscape(u)
	}
	return link
}

// ParseMagnet reads a magnet link from a source that is not trusted. Errors wrap ErrInvalid. What it does not know is left out.
func ParseMagnet(link string) (Magnet, error) {
	m, err := parseMagnet(link)
	if err != nil {
		return Magnet{}, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return m, nil
}

func parseMagnet(link string) (Magnet, error) {
	if len(link) > maxMagnet {
		return Magnet{}, fmt.Errorf("a magnet link of more than %d KiB", maxMagnet>>10)
	}
	query, ok := strings.CutPrefix(link, "magnet:?")
	if !ok {
		return Magnet{}, fmt.Errorf("it is not a magnet link")
	}
	q, err := url.ParseQuery(query)
	if err != nil {
		return Magnet{}, fmt.Errorf("its parameters cannot be read")
	}
	var m Magnet
	found := false
	for _, xt := range q["xt"] {
		text, ok := strings.CutPrefix(xt, infohashPrefix)
		if !ok {
			continue // BitTorrent version 2 beside version 1, another network
		}
		h, err := parseInfohash(text)
		if err != nil {
			return Magnet{}, err
		}
		if found && h != m.InfoHash {
			return Magnet{}, fmt.Errorf("it names several torrents")
		}
		m.InfoHash, found = h, true
	}
	if !found {
		return Magnet{}, fmt.Errorf("it names no infohash")
	}
	if len(q["tr"]) > maxURLs || len(q["ws"]) > maxURLs {
		return Magnet{}, fmt.Errorf("it names more than %d trackers or web seeds", maxURLs)
	}
	m.Trackers, m.WebSeeds = only(q["tr"], trackerSchemes), only(q["ws"], webSeedSchemes)
	m.Layer.Digest = digestOf(q.Get("dn"))
	if n, err := strconv.ParseInt(q.Get("xl"), 10, 64); err == nil && n > 0 && n <= maxLayer {
		m.Layer.Size = n
	}
	return m, nil
}

// parseInfohash reads 40 hex digits, or 32 of base 32.
func parseInfohash(s string) (h metainfo.Hash, err error) {
	var b []byte
	switch len(s) {
	case hex.EncodedLen(len(h)):
		b, err = hex.DecodeString(s)
	case base32.StdEncoding.EncodedLen(len(h)):
		b, err = base32.StdEncoding.DecodeString(strings.ToUpper(s))
	default:
		err = fmt.Errorf("of %d digits", len(s))
	}
	if err != nil || len(b) != len(h) {
		return h, fmt.Errorf("%.80q is not an infohash", s)
	}
	return metainfo.Hash(b), nil
}

// only are the URLs with one of the schemes, each once.
func only(us, schemes []string) []string {
	list := value{kind: 'l'}
	for _, u := range us {
		list.list = append(list.list, value{kind: 's', str: []byte(u)})
	}
	out, _ := urls(list, schemes) // its number was checked
	return out
}
