package published

import (
	"errors"
	"strings"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// MediaType of a .torrent file, as IANA has it.
const MediaType = "application/x-bittorrent"

// What the functions of this package may end with, for errors.Is.
var (
	// ErrInvalid: the bytes are no metainfo, or none that this program takes; the text says why.
	ErrInvalid = errors.New("not a usable torrent")
	// ErrMismatch: what should have been the layer has another digest or size.
	ErrMismatch = errors.New("the layer does not match its digest")
	// ErrNone: nothing is published for what was asked.
	ErrNone = errors.New("no torrents are published")
)

// Torrent is the metainfo of one layer, with real piece hashes: what any BitTorrent client can download and check it by. It is
// immutable once made.
type Torrent struct {
	// Layer is the digest and size of the layer that it says it is of. The digest is empty when the metainfo does not tell, which
	// is so for a file of somebody else's; the size is then the torrent's. What it says is a claim: only the layer's own digest
	// decides what was downloaded.
	Layer ocispec.Descriptor
	// MetaInfo holds the info dictionary in the bytes that its infohash was made of, and of the rest only what was checked.
	MetaInfo *metainfo.MetaInfo
	// Info is the info dictionary, read and checked: one file, its length, its pieces.
	Info metainfo.Info
	// InfoHash is the SHA-1 of the info dictionary.
	InfoHash metainfo.Hash
	// WebSeeds are URLs of the file itself (BEP 19), http or https.
	WebSeeds []string
	// Trackers are announce URLs by tier (BEP 12): http, https or udp.
	Trackers [][]string
	// Private forbids DHT, peer exchange and local discovery (BEP 27): peers come from the trackers alone.
	Private bool
}

// Encode is the .torrent file. Equal torrents have equal bytes.
func (t *Torrent) Encode() []byte { return bencode.MustMarshal(t.MetaInfo) }

// With is t with more ways to the same layer: trackers, each a tier of its own behind those that are there, and web seeds. What is there already
// is not added, and nothing is above the bounds of Parse. The info dictionary, and with it the infohash, stays.
func (t *Torrent) With(trackers, webSeeds []string) *Torrent {
	c := *t
	known := map[string]bool{}
	c.Trackers = nil
	count := 0
	for _, tier := range t.Trackers {
		c.Trackers = append(c.Trackers, tier)
		for _, u := range tier {
			known[u] = true
			count++
		}
	}
	for _, u := range trackers {
		if !known[u] && count < maxURLs && checkURL(u, trackerSchemes) == nil {
			known[u] = true
			count++
			c.Trackers = append(c.Trackers, []string{u})
		}
	}
	c.WebSeeds = append([]string(nil), t.WebSeeds...)
	for _, u := range t.WebSeeds {
		known[u] = true
	}
	for _, u := range webSeeds {
		if !known[u] && len(c.WebSeeds) < maxURLs && checkURL(u, webSeedSchemes) == nil {
			known[u] = true
			c.WebSeeds = append(c.WebSeeds, u)
		}
	}
	c.MetaInfo = outer(t.MetaInfo.InfoBytes, c.Trackers, c.WebSeeds, t.MetaInfo.Comment, t.MetaInfo.CreatedBy)
	return &c
}

// outer is what lies around an info dictionary. The oldest clients know one tracker only, hence Announce.
func outer(info []byte, trackers [][]string, webSeeds []string, comment, createdBy string) *metainfo.MetaInfo {
	mi := &metainfo.MetaInfo{InfoBytes: info, Comment: comment, CreatedBy: createdBy, UrlList: webSeeds}
	if len(trackers) > 0 {
		mi.Announce = trackers[0][0]
		if len(trackers) > 1 || len(trackers[0]) > 1 {
			mi.AnnounceList = trackers
		}
	}
	return mi
}

// LayerName is the name of a layer as a file, in torrents and wherever a client saves it: its digest with "-" for the colon, which some
// file systems do not take.
func LayerName(d digest.Digest) string { return strings.ReplaceAll(d.String(), ":", "-") }

// digestOf reads a layer's digest from a name as LayerName makes it, or from a digest as it is; "" when it is neither.
func digestOf(name string) digest.Digest {
	if algorithm, hex, ok := strings.Cut(name, "-"); ok {
		name = algorithm + ":" + hex
	}
	d, err := digest.Parse(name)
	if err != nil {
		return ""
	}
	return d
}
