package published

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// MaxSize bounds a .torrent file in bytes: 838,000 pieces.
	MaxSize = 16 << 20

	// minPiece is the block that peers ask for (BEP 3), of which a piece is a multiple. maxPiece bounds what must be received, and kept, before
	// anything of it can be checked; libtorrent takes no larger ones either.
	minPiece = 16 << 10
	maxPiece = 64 << 20

	// maxLayer bounds a layer: 16 TiB, the largest file of ext4, as the store has it.
	maxLayer = 16 << 40

	// maxURLs bounds trackers, and web seeds likewise: lists in the wild have a dozen.
	maxURLs = 32
	// maxURL bounds the length of one: what servers take in a request line by default is 8 KiB, signed URLs reach 2.
	maxURL = 4 << 10
	// maxText bounds name, comment and author: a file name's length on Linux.
	maxText = 255
)

var (
	trackerSchemes = []string{"http", "https", "udp"}
	webSeedSchemes = []string{"http", "https"}
)

// Parse reads a .torrent file from a source that is not trusted. Errors wrap ErrInvalid. Trackers and web seeds of other kinds than
// this program speaks (wss, ftp) are left out, as are all keys that it does not use.
func Parse(b []byte) (*Torrent, error) {
	t, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return t, nil
}

func parse(b []byte) (*Torrent, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("it is larger than %d MiB", MaxSize>>20)
	}
	top, err := decode(b)
	if err != nil {
		return nil, err
	}
	raw := top.dict["info"]
	if top.kind != 'd' || raw.kind != 'd' {
		return nil, errors.New("it has no info dictionary")
	}
	info, err := parseInfo(raw)
	if err != nil {
		return nil, err
	}
	trackers, err := parseTrackers(top)
	if err != nil {
		return nil, err
	}
	seeds, err := urls(top.dict["url-list"], webSeedSchemes)
	if err != nil {
		return nil, fmt.Errorf("web seeds: %w", err)
	}
	t := &Torrent{Info: info, WebSeeds: seeds, Trackers: trackers, Private: info.Private != nil && *info.Private}
	comment := text(top.dict["comment"])
	t.MetaInfo = outer(slices.Clone(raw.raw), trackers, seeds, comment, text(top.dict["created by"]))
	t.InfoHash = metainfo.HashBytes(t.MetaInfo.InfoBytes)
	t.Layer = ocispec.Descriptor{Digest: digestOf(info.Name), Size: info.Length}
	if t.Layer.Digest == "" {
		t.Layer.Digest = digestOf(comment)
	}
	return t, libraryReads(t)
}

// parseInfo reads the info dictionary.
func parseInfo(v value) (metainfo.Info, error) {
	for key, why := range map[string]string{
		"files":        "it is of several files, a layer is one",
		"file tree":    "it is of BitTorrent version 2, which few clients speak",
		"meta version": "it is of BitTorrent version 2, which few clients speak",
		"attr":         "it is of a special file", // padding, a link: BEP 47
		"symlink path": "it is of a special file",
	} {
		if _, ok := v.dict[key]; ok {
			return metainfo.Info{}, errors.New(why)
		}
	}
	length, size, pieces := v.dict["length"], v.dict["piece length"], v.dict["pieces"]
	switch {
	case length.kind != 'i' || length.num <= 0 || length.num > maxLayer:
		return metainfo.Info{}, errors.New("its length is not that of a layer")
	case size.kind != 'i' || size.num < minPiece || size.num > maxPiece || size.num&(size.num-1) != 0:
		return metainfo.Info{}, fmt.Errorf("its piece length is not a power of two from %d KiB to %d MiB", minPiece>>10, maxPiece>>20)
	case pieces.kind != 's' || int64(len(pieces.str)) != numPieces(length.num, size.num)*metainfo.HashSize:
		return metainfo.Info{}, errors.New("it has not as many piece hashes as its length needs")
	}
	info := metainfo.Info{Length: length.num, PieceLength: size.num, Pieces: pieces.str, Name: text(v.dict["name"])}
	if info.Name == "" || info.Name == "." || info.Name == ".." || strings.ContainsAny(info.Name, `/\`) || info.Name != string(v.dict["name"].str) {
		return metainfo.Info{}, errors.New("its name is none of a file")
	}
	if p, ok := v.dict["private"]; ok {
		if p.kind != 'i' || p.num != 0 && p.num != 1 {
			return metainfo.Info{}, errors.New("it is neither private nor not")
		}
		private := p.num == 1
		info.Private = &private
	}
	return info, nil
}

// libraryReads makes sure that the library that downloads sees in the info dictionary what we saw, and survives it.
func libraryReads(t *Torrent) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = errors.New("its info dictionary has entries of kinds that they must not have")
		}
	}()
	var seen metainfo.Info
	if err := bencode.Unmarshal(t.MetaInfo.InfoBytes, &seen); err != nil {
		return fmt.Errorf("its info dictionary: %w", err)
	}
	private := seen.Private != nil && *seen.Private
	if seen.Length != t.Info.Length || seen.PieceLength != t.Info.PieceLength || string(seen.Pieces) != string(t.Info.Pieces) ||
		seen.Name != t.Info.Name || private != t.Private || seen.HasV2() || len(seen.Files) > 0 {
		return errors.New("its info dictionary reads differently to different clients")
	}
	return nil
}

// parseTrackers reads announce-list, or announce where there is no list that counts (BEP 12).
func parseTrackers(top value) ([][]string, error) {
	var tiers [][]string
	count := 0
	for _, tier := range top.dict["announce-list"].list {
		us, err := urls(tier, trackerSchemes)
		if err != nil {
			return nil, fmt.Errorf("trackers: %w", err)
		}
		if count += len(us); count > maxURLs {
			return nil, fmt.Errorf("it names more than %d trackers", maxURLs)
		}
		if len(us) > 0 {
			tiers = append(tiers, us)
		}
	}
	if len(tiers) > 0 {
		return tiers, nil
	}
	us, err := urls(top.dict["announce"], trackerSchemes)
	if err != nil || len(us) == 0 {
		return nil, err
	}
	return [][]string{us}, nil
}

// urls are those of a list, or of a single string, that have one of the schemes.
func urls(v value, schemes []string) ([]string, error) {
	if v.kind == 's' {
		v.list = []value{v}
	}
	if len(v.list) > maxURLs {
		return nil, fmt.Errorf("it names more than %d", maxURLs)
	}
	var out []string
	for _, e := range v.list {
		u := string(e.str)
		if e.kind == 's' && checkURL(u, schemes) == nil && !slices.Contains(out, u) {
			out = append(out, u)
		}
	}
	return out, nil
}

// checkURL says what is wrong with a URL of a tracker or a web seed.
func checkURL(s string, schemes []string) error {
	if len(s) > maxURL {
		return fmt.Errorf("a URL longer than %d bytes", maxURL)
	}
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return fmt.Errorf("%q is not a URL", s)
	case !slices.Contains(schemes, u.Scheme):
		return fmt.Errorf("%q is not a URL of %s", s, strings.Join(schemes, ", "))
	case u.Hostname() == "" || u.Opaque != "":
		return fmt.Errorf("%q names no host", s)
	case u.User != nil:
		return fmt.Errorf("%q holds a password, which everybody would see", u.Redacted())
	}
	return nil
}

// text is a string for people: printable, of bounded length, else "".
func text(v value) string {
	s := string(v.str)
	if len(s) > maxText || !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return s
}

func numPieces(length, pieceLength int64) int64 { return (length + pieceLength - 1) / pieceLength }
