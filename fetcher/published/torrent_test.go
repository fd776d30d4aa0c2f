package published

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/anacrolix/torrent/metainfo"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// layer is a layer of n bytes, the same in each run.
func layer(n int) (ocispec.Descriptor, []byte) {
	b := make([]byte, n)
	rand.New(rand.NewSource(int64(n))).Read(b)
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(b), Size: int64(n)}, b
}

// makeOf makes a torrent of a layer of n bytes; change may say more.
func makeOf(t testing.TB, n int, change func(*MakeOptions)) *Torrent {
	t.Helper()
	desc, b := layer(n)
	o := MakeOptions{Layer: desc, Open: opener(b)}
	if change != nil {
		change(&o)
	}
	tor, err := Make(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	return tor
}

func opener(b []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

// full are options with everything in them.
func full(o *MakeOptions) {
	o.Trackers = []string{"http://t1.example/announce", "udp://t2.example:6969"}
	o.WebSeeds = []string{"https://web.example/blob?a=b&c=d"}
	o.Private, o.CreatedBy, o.PieceLength = true, "docker-quay/test", 32<<10
}

// TestRoundTrip: what was made reads back the same, by us and by the library, and is made the same again.
func TestRoundTrip(t *testing.T) {
	for _, n := range []int{1, 16 << 10, 256<<10 - 1, 256 << 10, 256<<10 + 1, 1_000_000} {
		for name, change := range map[string]func(*MakeOptions){"plain": nil, "full": full} {
			t.Run(fmt.Sprint(n, " ", name), func(t *testing.T) {
				made := makeOf(t, n, change)
				read, err := Parse(made.Encode())
				if err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(made, read) {
					t.Errorf("made %+v\nread %+v", made, read)
				}
				if again := makeOf(t, n, change); !bytes.Equal(again.Encode(), made.Encode()) {
					t.Error("it is made differently each time")
				}
				mi, err := metainfo.Load(bytes.NewReader(made.Encode()))
				if err != nil {
					t.Fatal(err)
				}
				info, err := mi.UnmarshalInfo()
				if err != nil || mi.HashInfoBytes() != made.InfoHash || info.TotalLength() != int64(n) || info.IsDir() || info.BestName() != LayerName(made.Layer.Digest) {
					t.Errorf("the library reads %+v, %v", info, err)
				}
				desc, b := layer(n)
				if made.Layer.Digest != desc.Digest {
					t.Error("it is of another layer")
				}
				pieces, err := metainfo.GeneratePieces(bytes.NewReader(b), info.PieceLength, nil)
				if err != nil || !bytes.Equal(pieces, info.Pieces) {
					t.Errorf("the library hashes other pieces: %v", err)
				}
				m, err := ParseMagnet(made.Magnet())
				if err != nil || m.InfoHash != made.InfoHash || !reflect.DeepEqual(m.Layer, made.Layer) || !slices.Equal(m.WebSeeds, made.WebSeeds) || len(m.Trackers) != len(made.Trackers) {
					t.Errorf("%s reads back as %+v, %v", made.Magnet(), m, err)
				}
			})
		}
	}
}

// TestMktorrent: another program makes the same metainfo of the same file.
func TestMktorrent(t *testing.T) {
	mktorrent, err := exec.LookPath("mktorrent")
	if err != nil {
		t.Skip("needs mktorrent: `make test` installs it on Debian")
	}
	for name, change := range map[string]func(*MakeOptions){
		"public":  func(o *MakeOptions) { o.Trackers = []string{"http://t1.example/announce"} },
		"private": func(o *MakeOptions) { full(o) },
	} {
		t.Run(name, func(t *testing.T) {
			desc, b := layer(1_000_000)
			made := makeOf(t, len(b), change)
			dir := t.TempDir()
			file, out := filepath.Join(dir, LayerName(desc.Digest)), filepath.Join(dir, "out.torrent")
			if err := os.WriteFile(file, b, 0o644); err != nil {
				t.Fatal(err)
			}
			power := 0
			for 1<<power < made.Info.PieceLength {
				power++
			}
			args := []string{"-d", "-l", fmt.Sprint(power), "-o", out, "-c", made.MetaInfo.Comment}
			for _, tier := range made.Trackers {
				args = append(args, "-a", tier[0])
			}
			for _, u := range made.WebSeeds {
				args = append(args, "-w", u)
			}
			if made.Private {
				args = append(args, "-p")
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if text, err := exec.CommandContext(ctx, mktorrent, append(args, file)...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			text, err := os.ReadFile(out)
			if err != nil {
				t.Fatal(err)
			}
			theirs, err := Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			// All but who made it. A lone web seed it writes as a string, a lone tracker also as a list.
			ours := *made
			ours.MetaInfo = theirs.MetaInfo
			if !reflect.DeepEqual(&ours, theirs) || !bytes.Equal(made.MetaInfo.InfoBytes, theirs.MetaInfo.InfoBytes) {
				t.Errorf("ours %+v\ntheirs %+v\n%q", made, theirs, text)
			}
		})
	}
}

func TestMakeRefuses(t *testing.T) {
	desc, b := layer(100_000)
	broken := errors.New("broken")
	for _, tc := range []struct {
		name   string
		change func(*MakeOptions)
		want   error
		text   string
	}{
		{"other bytes", func(o *MakeOptions) { o.Open = opener(append([]byte{1}, b[1:]...)) }, ErrMismatch, string(desc.Digest)},
		{"fewer bytes", func(o *MakeOptions) { o.Open = opener(b[1:]) }, ErrMismatch, "99999 bytes instead of 100000"},
		{"more bytes", func(o *MakeOptions) { o.Open = opener(append(slices.Clone(b), 0)) }, ErrMismatch, "more than"},
		{"no bytes", func(o *MakeOptions) { o.Open = func(context.Context) (io.ReadCloser, error) { return nil, broken } }, broken, ""},
		{"an error at the end", func(o *MakeOptions) {
			o.Open = func(context.Context) (io.ReadCloser, error) {
				return io.NopCloser(io.MultiReader(bytes.NewReader(b), failing{broken})), nil
			}
		}, broken, ""},
		{"an empty layer", func(o *MakeOptions) { o.Layer.Size = 0 }, nil, "0 bytes"},
		{"no digest", func(o *MakeOptions) { o.Layer.Digest = "x" }, nil, "digest"},
		{"odd pieces", func(o *MakeOptions) { o.PieceLength = 100_000 }, nil, "power of two"},
		{"small pieces", func(o *MakeOptions) { o.PieceLength = 8 << 10 }, nil, "power of two"},
		{"too many pieces", func(o *MakeOptions) { o.Layer.Size, o.PieceLength = 1<<40, 16<<10 }, nil, "too many"},
		{"a tracker that is none", func(o *MakeOptions) { o.Trackers = []string{"wss://x"} }, nil, "http, https, udp"},
		{"a tracker with a password", func(o *MakeOptions) { o.Trackers = []string{"http://u:secret@x/announce"} }, nil, "password"},
		{"a web seed that is none", func(o *MakeOptions) { o.WebSeeds = []string{"ftp://x"} }, nil, "http, https"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := MakeOptions{Layer: desc, Open: opener(b)}
			tc.change(&o)
			tor, err := Make(t.Context(), o)
			if err == nil || tor != nil || !errors.Is(err, tc.want) && tc.want != nil || !strings.Contains(err.Error(), tc.text) || strings.Contains(err.Error(), "secret") {
				t.Errorf("got %v, %v", tor, err)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Make(ctx, MakeOptions{Layer: desc, Open: opener(b)}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

type failing struct{ error }

func (f failing) Read([]byte) (int, error) { return 0, f.error }

// TestPieceLength: the file of any layer is one that Parse takes.
func TestPieceLength(t *testing.T) {
	for _, size := range []int64{1, 256 << 20, 1 << 30, 100 << 30, 1 << 40, maxLayer} {
		o := MakeOptions{Layer: ocispec.Descriptor{Digest: digest.FromString("x"), Size: size}}
		if err := o.Check(); err != nil || numPieces(size, o.PieceLength)*20 > maxHashes {
			t.Errorf("%d: pieces of %d, %v", size, o.PieceLength, err)
		}
	}
}

func TestWith(t *testing.T) {
	a := makeOf(t, 1000, full)
	b := a.With([]string{"http://t1.example/announce", "http://t3.example/announce", "ftp://no"}, []string{"https://web.example/blob?a=b&c=d", "http://web2.example/"})
	if len(b.Trackers) != 3 || b.Trackers[2][0] != "http://t3.example/announce" || len(b.WebSeeds) != 2 || b.InfoHash != a.InfoHash || len(a.Trackers) != 2 || len(a.WebSeeds) != 1 {
		t.Errorf("%+v", b)
	}
	if read, err := Parse(b.Encode()); err != nil || !reflect.DeepEqual(read, b) {
		t.Errorf("%+v, %v", read, err)
	}
	var many []string
	for i := range 100 {
		many = append(many, fmt.Sprintf("http://x%d/", i))
	}
	if _, err := Parse(a.With(many, many).Encode()); err != nil {
		t.Error(err)
	}
}
