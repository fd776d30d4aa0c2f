package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// TestBusyboxIsTheSameEveryTime makes the small image twice, in every format, in different folders.
func TestBusyboxIsTheSameEveryTime(t *testing.T) {
	for _, format := range Formats {
		t.Run(format.String(), func(t *testing.T) {
			first, err := Busybox(t.Context(), t.TempDir(), format)
			if missingBusybox(err) {
				t.Skip(err)
			}
			if err != nil {
				t.Fatal(err)
			}
			second, err := Busybox(t.Context(), t.TempDir(), format)
			if err != nil {
				t.Fatal(err)
			}
			if first.Manifest.Digest != second.Manifest.Digest {
				t.Errorf("the same input gave %s and %s", first.Manifest.Digest, second.Manifest.Digest)
			}
			if len(first.Layers) != 3 {
				t.Errorf("%d layers, not 3", len(first.Layers))
			}
			for _, layer := range first.Layers {
				checkBlob(t, first, layer.Digest, layer.Size)
				toc := layer.Annotations[estargz.TOCJSONDigestAnnotation]
				if indexed := format == EStargz || format == ZstdChunked; indexed != (toc != "") {
					t.Errorf("a %s layer has the table of contents %q", format, toc)
				}
			}
		})
	}
}

func missingBusybox(err error) bool {
	_, missing := os.Stat("/bin/busybox")
	return err != nil && missing != nil
}

func checkBlob(t *testing.T, i *Image, d digest.Digest, size int64) {
	t.Helper()
	raw, err := os.ReadFile(i.Path(d))
	if err != nil {
		t.Fatal(err)
	}
	if got := digest.FromBytes(raw); got != d || int64(len(raw)) != size {
		t.Errorf("the blob %s of %d bytes is %s of %d", d, size, got, len(raw))
	}
}

// TestFormatsHoldTheSameFiles: whatever the compression, a container sees one tree.
func TestFormatsHoldTheSameFiles(t *testing.T) {
	cache := t.TempDir()
	sums := map[string]bool{}
	for _, format := range Formats {
		i, err := Busybox(t.Context(), cache, format)
		if missingBusybox(err) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		sum, err := i.TreeSum()
		if err != nil {
			t.Fatal(err)
		}
		sums[sum] = true
	}
	if len(sums) != 1 {
		t.Errorf("different trees: %v", sums)
	}
}

func TestRandomHasExactlyTheSizeAsked(t *testing.T) {
	const size = 1 << 20
	i, err := Random(t.Context(), t.TempDir(), size, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, layer := range i.Layers {
		if layer.Size != size {
			t.Errorf("a layer of %d bytes, not %d", layer.Size, size)
		}
		checkBlob(t, i, layer.Digest, layer.Size)
	}
	if i.Layers[0].Digest == i.Layers[1].Digest {
		t.Error("two layers are the same")
	}
	if _, err := Random(t.Context(), t.TempDir(), size+1, 1); err == nil {
		t.Error("a size that no tar has was accepted")
	}
}

func TestAboveAndApplyAreInverse(t *testing.T) {
	lower, upper := Tree{}, Tree{}
	lower.AddFile("etc/kept", 0o644, []byte("same"))
	lower.AddFile("etc/changed", 0o644, []byte("old"))
	lower.AddFile("etc/gone", 0o644, nil)
	lower.AddFile("folder/with/file", 0o644, nil)
	upper.AddFile("etc/kept", 0o644, []byte("same"))
	upper.AddFile("etc/changed", 0o600, []byte("new"))
	upper.AddFile("opt/new", 0o755, []byte("new"))
	upper["opt/link"] = &Entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: "opt/link", Linkname: "etc/kept"}}

	layer := lower.Above(upper)
	var names []string
	for name := range layer {
		names = append(names, name)
	}
	slices.Sort(names)
	// etc/kept comes along as the target of the link.
	want := []string{".wh.folder", "etc", "etc/.wh.gone", "etc/changed", "etc/kept", "opt", "opt/link", "opt/new"}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Errorf("the layer (-want +got):\n%s", diff)
	}

	var written bytes.Buffer
	if _, err := layer.WriteTo(&written); err != nil {
		t.Fatal(err)
	}
	read, err := ReadTree(&written)
	if err != nil {
		t.Fatal(err)
	}
	lower.apply(read)
	for name, e := range upper {
		got := lower[name]
		if got == nil {
			t.Errorf("%s is missing", name)
		} else if e.Header.Typeflag == tar.TypeReg && !bytes.Equal(got.Body, e.Body) {
			t.Errorf("%s holds %q, not %q", name, got.Body, e.Body)
		}
	}
	for _, name := range []string{"etc/gone", "folder", "folder/with/file"} {
		if lower[name] != nil {
			t.Errorf("%s is still there", name)
		}
	}
}

func TestDebianSources(t *testing.T) {
	const oneLine = `# deb http://commented.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://mirror.example/debian bookworm main contrib # why
deb http://mirror.example/debian bookworm-updates main
deb-src http://mirror.example/debian bookworm main
deb https://packages.example/apt cloud-sdk-bookworm main
deb https://download.example/linux/debian bookworm stable
`
	const deb822 = `Types: deb deb-src
# a comment
URIs: http://a.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/b.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: http://key.example/debian
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 -----END PGP PUBLIC KEY BLOCK-----
`
	etc := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(etc, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := debianSources(etc, "bookworm"); err == nil {
		t.Error("no sources at all, and no error")
	}
	write("sources.list", oneLine)
	write("sources.list.d/debian.sources", deb822)
	write("sources.list.d/ignored.save", oneLine)
	sources, err := debianSources(etc, "bookworm")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range sources {
		got = append(got, s.String())
	}
	want := []string{
		"deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] http://mirror.example/debian bookworm main",
		"deb http://mirror.example/debian bookworm-updates main",
		"deb [signed-by=/usr/share/keyrings/b.gpg] http://a.example/debian bookworm main",
		"deb [signed-by=/usr/share/keyrings/b.gpg] http://a.example/debian bookworm-updates main",
		"deb http://key.example/debian bookworm-security main",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("sources (-want +got):\n%s", diff)
	}
}
