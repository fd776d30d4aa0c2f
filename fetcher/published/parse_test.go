package published

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/anacrolix/torrent/bencode"
	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
)

// dict writes a bencoded dictionary of keys and values in turn.
func dict(kv ...any) string {
	m := map[string]any{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i].(string)] = kv[i+1]
	}
	return string(bencode.MustMarshal(m))
}

// info is a good info dictionary, with changes.
func info(kv ...any) bencode.Bytes {
	m := map[string]any{"name": "x", "length": 20000, "piece length": 16 << 10, "pieces": strings.Repeat("h", 40)}
	for i := 0; i < len(kv); i += 2 {
		if m[kv[i].(string)] = kv[i+1]; kv[i+1] == nil {
			delete(m, kv[i].(string))
		}
	}
	return bencode.MustMarshal(m)
}

// hostile are files that must be refused.
var hostile = map[string]string{
	"nothing":              "",
	"no dictionary":        "le",
	"no info":              dict("announce", "http://x/a"),
	"info is a string":     dict("info", "x"),
	"cut":                  dict("info", info())[:60],
	"more behind":          dict("info", info()) + "e",
	"a key twice":          "d4:info" + string(info()) + "4:info" + string(info()) + "e",
	"a key that is none":   "di1e4:infoe",
	"odd number":           "d4:infod6:lengthi007eee",
	"minus zero":           "d4:infod6:lengthi-0eee",
	"huge number":          "d4:infod6:lengthi99999999999999999999eee",
	"huge string":          "d4:info9999999999999:e",
	"negative string":      "d4:info-1:e",
	"deep":                 strings.Repeat("l", 1000) + strings.Repeat("e", 1000),
	"deep dictionaries":    strings.Repeat("d1:a", 1000) + strings.Repeat("e", 1000),
	"many values":          "l" + strings.Repeat("i0e", 100_000) + "e",
	"too large":            strings.Repeat(" ", MaxSize+1),
	"no length":            dict("info", info("length", nil)),
	"empty":                dict("info", info("length", 0, "pieces", "")),
	"negative":             dict("info", info("length", -1)),
	"larger than any":      dict("info", info("length", int64(maxLayer)+1)),
	"length is a string":   dict("info", info("length", "20000")),
	"no pieces":            dict("info", info("pieces", nil)),
	"a piece less":         dict("info", info("pieces", strings.Repeat("h", 20))),
	"a piece more":         dict("info", info("pieces", strings.Repeat("h", 60))),
	"half a hash":          dict("info", info("pieces", strings.Repeat("h", 39))),
	"no piece length":      dict("info", info("piece length", nil)),
	"piece length 0":       dict("info", info("piece length", 0)),
	"negative pieces":      dict("info", info("piece length", -16384)),
	"odd pieces":           dict("info", info("piece length", 20000)),
	"huge pieces":          dict("info", info("piece length", 128<<20, "pieces", strings.Repeat("h", 20))),
	"no name":              dict("info", info("name", nil)),
	"a path":               dict("info", info("name", "../../etc/passwd")),
	"a backward path":      dict("info", info("name", `..\x`)),
	"the folder above":     dict("info", info("name", "..")),
	"a name with a NUL":    dict("info", info("name", "a\x00b")),
	"a name of bytes":      dict("info", info("name", "\xff\xfe")),
	"a long name":          dict("info", info("name", strings.Repeat("n", 300))),
	"several files":        dict("info", info("length", nil, "files", []any{map[string]any{"length": 20000, "path": []string{"a"}}})),
	"files and a length":   dict("info", info("files", []any{})),
	"version 2":            dict("info", info("meta version", 2)),
	"a file tree":          dict("info", info("file tree", map[string]any{})),
	"padding":              dict("info", info("attr", "p")),
	"private in part":      dict("info", info("private", 2)),
	"private in words":     dict("info", info("private", "no")),
	"many trackers":        dict("info", info(), "announce-list", []any{slices.Repeat([]string{"http://x/a"}, maxURLs+1)}),
	"many tiers":           dict("info", info(), "announce-list", tiers(maxURLs+1)),
	"many web seeds":       dict("info", info(), "url-list", slices.Repeat([]string{"http://x/a"}, maxURLs+1)),
	"another name besides": dict("info", info("name.utf-8", 5)),
}

func tiers(n int) (out []any) {
	for i := range n {
		out = append(out, []string{fmt.Sprintf("http://x%d/a", i)})
	}
	return out
}

func TestParseRefuses(t *testing.T) {
	for name, text := range hostile {
		if tor, err := Parse([]byte(text)); !errors.Is(err, ErrInvalid) || tor != nil || len(err.Error()) > 300 {
			t.Errorf("%s: %+v, %v", name, tor, err)
		}
	}
}

// TestParseForeign: what other programs write is read, and what is of no use in it left out.
func TestParseForeign(t *testing.T) {
	d := digest.FromString("layer")
	tor, err := Parse([]byte(dict("info", info("source", "x", "md5sum", strings.Repeat("0", 32)), "creation date", 1_500_000_000, "nodes", []any{[]any{"h", 1}},
		"announce", "http://only-without-a-list/a", "httpseeds", []string{"http://x"}, "url-list", "https://web/x", "comment", string(d),
		"announce-list", []any{[]string{"wss://webtorrent.example", "http://a/announce?jwt=x.y"}, []string{}, "stray", []string{"udp://b:1", "udp://b:1", "nonsense", "http://u:p@c/"}})))
	if err != nil {
		t.Fatal(err)
	}
	want := [][]string{{"http://a/announce?jwt=x.y"}, {"udp://b:1"}}
	if !reflect.DeepEqual(tor.Trackers, want) || !slices.Equal(tor.WebSeeds, []string{"https://web/x"}) || tor.Layer.Digest != d || tor.Layer.Size != 20000 || tor.Private {
		t.Errorf("%+v", tor)
	}
	for _, gone := range []string{"webtorrent", "nodes", "httpseeds", "creation"} {
		if bytes.Contains(tor.Encode(), []byte(gone)) {
			t.Errorf("%s is still there", gone)
		}
	}
	if tor, err := Parse([]byte(dict("info", info(), "announce", "udp://t:1", "announce-list", []any{}))); err != nil || !reflect.DeepEqual(tor.Trackers, [][]string{{"udp://t:1"}}) || tor.Layer.Digest != "" {
		t.Errorf("%+v, %v", tor, err)
	}
}

func TestMagnet(t *testing.T) {
	const hex = "0123456789abcdef0123456789ABCDEF01234567"
	for link, want := range map[string]string{
		"magnet:?xt=urn:btih:" + hex: "0123456789abcdef0123456789abcdef01234567",
		"magnet:?dn=x&xt=urn:btmh:1220ab&xt=urn:btih:AERUKZ4JVPG66AJDIVTYTK6N54ASGRLH&tr=udp%3A%2F%2Ft%3A1": "0123456789abcdef0123456789abcdef01234567",
		"magnet:?xt=urn:btih:" + hex + "&xl=-5&dn=%ff":                                                      "0123456789abcdef0123456789abcdef01234567",
		"":                                     "",
		"http://x":                             "",
		"magnet:":                              "",
		"magnet:?xt=urn:btih:":                 "",
		"magnet:?xt=urn:btih:" + hex + "00":    "",
		"magnet:?xt=urn:btih:" + "x" + hex[1:]: "",
		"magnet:?xt=urn:sha1:" + hex:           "",
		"magnet:?xt=urn:btih:" + hex + "&%zz":  "",
		"magnet:?xt=urn:btih:" + hex + "&xt=urn:btih:" + strings.Repeat("0", 40): "",
		"magnet:?xt=urn:btih:" + hex + strings.Repeat("&tr=http://x", maxURLs+1): "",
		"magnet:?xt=urn:btih:" + hex + "&dn=" + strings.Repeat("x", maxMagnet):   "",
	} {
		m, err := ParseMagnet(link)
		if want == "" && !errors.Is(err, ErrInvalid) || want != "" && (err != nil || m.InfoHash.HexString() != want) || m.Layer.Size != 0 {
			t.Errorf("%.100s: %+v, %v", link, m, err)
		}
	}
}

// FuzzParse: what is taken can be encoded, reads back the same, and is no surprise to the library that downloads it.
func FuzzParse(f *testing.F) {
	f.Add(makeOf(f, 100_000, full).Encode())
	f.Add(makeOf(f, 1, nil).Encode())
	for _, text := range hostile {
		if len(text) < 10_000 {
			f.Add([]byte(text))
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		tor, err := Parse(b)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		again, err := Parse(tor.Encode())
		if err != nil || !reflect.DeepEqual(again, tor) {
			t.Fatalf("%+v reads back as %+v, %v", tor, again, err)
		}
		if m, err := ParseMagnet(tor.Magnet()); err != nil || m.InfoHash != tor.InfoHash {
			t.Fatalf("%s: %v", tor.Magnet(), err)
		}
		mi, err := metainfo.Load(bytes.NewReader(tor.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		info, err := mi.UnmarshalInfo()
		if err != nil || info.NumPieces() != tor.Info.NumPieces() || info.TotalLength() != tor.Info.Length || info.Piece(info.NumPieces()-1).Length() <= 0 {
			t.Fatalf("the library reads %+v, %v", info, err)
		}
	})
}

func FuzzParseMagnet(f *testing.F) {
	f.Add(makeOf(f, 100_000, full).Magnet())
	f.Add("magnet:?xt=urn:btih:AERUKZ4JVPG66AJDIVTYTK6N54ASGRLH&dn=sha256-x&xl=99999999999999999999")
	f.Fuzz(func(t *testing.T, link string) {
		m, err := ParseMagnet(link)
		if err != nil {
			return
		}
		for _, u := range append(slices.Clone(m.Trackers), m.WebSeeds...) {
			if checkURL(u, trackerSchemes) != nil {
				t.Errorf("%q", u)
			}
		}
		if m.Layer.Digest != "" && m.Layer.Digest.Validate() != nil || m.Layer.Size < 0 {
			t.Errorf("%+v", m)
		}
	})
}
