package image

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// nastyRecipe changes whenever the same format must give another image.
const nastyRecipe = "nasty 2"

// Nasty is an image of four layers of all that file systems and layers can say and ordinary images seldom do: each kind of file, owner,
// time, name, attribute and link at its limits, and layers that remove, replace and bring back what is below, in all ways. What a table of
// contents cannot say is in plain formats only. Nothing in it runs.
func Nasty(ctx context.Context, cache string, format Format) (*Image, error) {
	name := "nasty-" + recipe(nastyRecipe) + "-" + format.String()
	dir, err := cached(ctx, cache, name, func(_ context.Context, dir string) error {
		l := &layout{dir: dir}
		for i, fill := range []func(*nastyLayer){nastyBase, nastyChanges, nastyMore, nastyTop} {
			var b bytes.Buffer
			layer := &nastyLayer{out: &b, tar: tar.NewWriter(&b), plain: format != EStargz && format != ZstdChunked, heads: map[string]tar.Header{}}
			fill(layer)
			layer.keep(layer.tar.Close())
			path := filepath.Join(dir, "layer.tar")
			layer.keep(os.WriteFile(path, b.Bytes(), 0o644))
			if layer.err != nil {
				return fmt.Errorf("layer %d: %w", i, layer.err)
			}
			if err := l.addLayer(path, format, fmt.Sprintf("nasty %d", i)); err != nil {
				return err
			}
			if err := os.Remove(path); err != nil {
				return err
			}
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/none"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

func nastyBase(l *nastyLayer) {
	random := rand.New(rand.NewPCG(1, 2))
	big := string(halfRandom(random, 3<<20))

	l.dir("kinds")
	l.file("kinds/empty", "")
	l.file("kinds/byte", "x")
	for _, n := range []int{4095, 4096, 4097, 1<<16 + 1} { // about the file system's blocks
		l.file(fmt.Sprintf("kinds/%d", n), big[:n])
	}
	l.file("kinds/big", big)
	l.add(tar.TypeFifo, "kinds/fifo", "", mode(0o620))
	l.add(tar.TypeChar, "kinds/null", "", device(1, 3), mode(0o666))
	l.add(tar.TypeChar, "kinds/far", "", device(259, 70_000), mode(0o600))
	l.add(tar.TypeBlock, "kinds/disk", "", device(8, 17), owner(0, 6))
	l.dir("kinds/void")
	if l.plain {
		l.sparse("kinds/sparse", 40<<20, "here is something", 0, 4096, 5000, 1<<20, 39<<20)
		l.sparse("kinds/hole", 1<<20, "")
		l.sparse("kinds/hole at the end", 1<<20+1, "begin", 0)
	}

	l.dir("modes", mode(0o7777))
	for _, m := range []int64{0, 0o111, 0o4755, 0o2755, 0o1644, 0o7000, 0o777} {
		l.file(fmt.Sprintf("modes/f%04o", m), "mode", mode(m))
		l.dir(fmt.Sprintf("modes/d%04o", m), mode(m))
	}
	l.file("modes/d0000/inside", "unreachable but for root")
	l.dir("tmp", mode(0o1777))

	l.dir("owners", owner(70_000, 70_001))
	l.file("owners/16 bit", "x", owner(65_535, 65_536))
	l.file("owners/most", "x", owner(1<<32-2, 3_000_000_000), mode(0o6755))
	l.symlink("owners/link", "most", owner(123_456, 65_537))
	l.add(tar.TypeFifo, "owners/fifo", "", owner(1<<31, 1))

	l.dir("times", at(1_000_000_000, 999_999_999))
	l.file("times/epoch", "", at(0, 0))
	l.file("times/before", "", at(-5, 500))
	l.file("times/1ns", "", at(1_600_000_000, 1))
	l.file("times/2038", "", at(1<<31+7, 123_456_789))
	l.file("times/2242", "", at(1<<33, 5))
	l.symlink("times/link", "epoch", at(1_234_567_890, 987_654_321))
	l.add(tar.TypeFifo, "times/fifo", "", at(1_500_000_000, 42))

	l.dir("names")
	l.file("names/"+strings.Repeat("n", 255), "255 bytes")
	l.dir("names/" + strings.Repeat("ü", 127))
	l.file("names/"+strings.Repeat("ü", 127)+"/"+strings.Repeat("m", 255), "long in long")
	deep := "names/deep"
	for i := range 30 {
		l.dir(deep)
		deep += fmt.Sprintf("/%02d-%s", i, strings.Repeat("d", 60))
	}
	l.dir(deep)
	l.file(deep+"/end", "of a path of 1,900 bytes")
	l.link("names/short", deep+"/end")
	for _, n := range []string{" ", "new\nline", "tab\t", "back\\slash", "quote\"'", "-rf", "*", "a:b", "日本", "...", "~", "\x01\x7f"} {
		l.file("names/"+n, n)
	}
	if l.plain {
		l.file("names/caf\xe9", "not UTF-8", xattr("user.odd", "\xff\xfe"))
		l.dir("names/\xff\xfe")
		l.symlink("names/\xff\xfe/\xc0", "\xf0\x28")
	}
	// A directory of several blocks, whose order is not that of the tar.
	l.dir("many")
	for i := range 2000 {
		l.file(fmt.Sprintf("many/%04d-%s", i*7919%2000, strings.Repeat("f", i%40)), "")
	}

	l.dir("xattrs", xattr("user.dir", "of a directory"), xattr("user.empty", ""))
	l.file("xattrs/capable", "binary", xattr("security.capability", netRaw), mode(0o755))
	l.file("xattrs/user", "x", xattr("user.a", "1"), xattr("user.zero", "a\x00b"), xattr("user."+strings.Repeat("n", 200), "long name"))
	l.file("xattrs/big", "x", xattr("user.big", big[:3000]))
	for i := range 50 { // the same for many, as SELinux's are
		l.file(fmt.Sprintf("xattrs/same%02d", i), "x", xattr("user.label", "system_u:object_r:container_file_t:s0"), xattr("user.n", fmt.Sprint(i%3)))
	}
	l.file("xattrs/acl", "x", xattr("system.posix_acl_access", "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"), mode(0o644))
	l.dir("xattrs/default acl", xattr("system.posix_acl_default", "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x05\x00\xff\xff\xff\xff\x20\x00\x05\x00\xff\xff\xff\xff"))
	// These unpackers leave out.
	l.file("xattrs/left out", "x", xattr("trusted.overlay.opaque", "y"), xattr("trusted.mine", "x"))
	l.add(tar.TypeFifo, "xattrs/fifo", "", xattr("user.on a fifo", "x"))

	l.dir("links")
	l.dir("links/a")
	l.dir("links/a/b")
	l.dir("links/z")
	l.file("links/one", "one file", xattr("user.shared", "x"), owner(1, 2))
	l.link("links/two", "links/one")
	l.link("links/a/b/three", "links/two")
	l.link("links/z/four", "/links/a/../one")
	l.add(tar.TypeFifo, "links/fifo", "")
	l.link("links/z/fifo", "links/fifo")
	l.add(tar.TypeChar, "links/zero", "", device(1, 5))
	l.link("links/a/zero", "links/zero")
	for _, n := range []string{"first goes", "second goes", "all go", "replaced", "touched"} {
		l.file("links/"+n, n+" in a layer above")
		l.link("links/z/"+n, "links/"+n)
	}

	l.dir("symlinks")
	for n, to := range []string{"nowhere", "../../../../../..", "/", "/symlinks/0", ".", "loop", "dir/", strings.Repeat("x/", 2000) + "y", "日本\n", " "} {
		l.symlink(fmt.Sprintf("symlinks/%d", n), to)
	}
	l.symlink("symlinks/loop", "loop")

	l.dir("change")
	for _, n := range []string{"gone", "opaque", "back", "todir", "merged", "dir to link", "emptied", "twice", "again"} {
		l.dir("change/"+n, mode(0o750), owner(5, 6), xattr("user.from", "base"))
		l.file("change/"+n+"/old", n)
		l.dir("change/" + n + "/sub")
		l.file("change/"+n+"/sub/old", n)
	}
	for _, n := range []string{"removed", "replaced", "file to dir", "file to link", "hidden by a device", "mode alone"} {
		l.file("change/"+n, "of the base")
	}
	l.symlink("change/link to dir", "merged")
	l.symlink("change/link to file", "removed")

	l.dir("implied", mode(0o711), owner(7, 8), at(1_111_111_111, 111))
	l.dir("implied/there", mode(0o3770), owner(9, 10), xattr("user.kept", "yes"))
	l.dir("implied/there/below", mode(0o700), owner(11, 70_000))
	l.dir("implied/gone", mode(0o700), owner(11, 12))
	l.file("implied/new/of/nobody", "in folders that no layer names")

	if l.plain {
		// In one layer: the last one counts.
		l.dir("same layer")
		l.file("same layer/f", "the first")
		l.link("same layer/survives", "same layer/f")
		l.file("same layer/f", "the second")
		l.dir("same layer/d")
		l.file("same layer/d/in", "x")
		l.file("same layer/d", "a file now")
		l.symlink("same layer/l", "d")
		l.dir("same layer/l")
		l.file("same layer/l/in", "in a directory that was a link")
		l.otherLink("same layer/attributes", "same layer/f", mode(0o604), owner(3, 4))
	}
}

func nastyChanges(l *nastyLayer) {
	l.dir("change", at(1_650_000_000, 1))
	for _, n := range []string{"opaque", "back", "emptied"} {
		l.dir("change/"+n, mode(0o750), owner(5, 6), xattr("user.from", "the second"))
	}
	l.file("change/.wh.gone", "")
	l.file("change/.wh.removed", "")
	l.file("change/opaque/.wh..wh..opq", "")
	l.file("change/opaque/new", "alone here")
	l.file("change/back/.wh.old", "")
	l.file("change/back/.wh.sub", "")
	l.file("change/replaced", "by a file")
	l.dir("change/file to dir", mode(0o701))
	l.file("change/file to dir/in", "x")
	l.symlink("change/file to link", "replaced")
	l.file("change/todir", "was a directory", mode(0o640))
	l.symlink("change/dir to link", "merged")
	l.dir("change/merged", mode(0o705), owner(70_000, 6), at(1_400_000_000, 4))
	l.file("change/merged/new", "beside the old")
	l.dir("change/merged/sub", mode(0))
	l.dir("change/link to dir", mode(0o700))
	l.file("change/link to dir/in", "x")
	l.file("change/link to file", "was a link")
	l.add(tar.TypeChar, "change/hidden by a device", "", device(0, 0), mode(0))
	l.file("change/emptied/.wh.old", "")
	l.file("change/emptied/.wh.sub", "")
	l.file("change/.wh.never was", "")
	l.dir("change/twice", mode(0o750))
	l.file("change/twice/.wh.old", "")
	l.file("change/.wh.again", "")

	l.file("links/.wh.first goes", "")
	l.file("links/z/.wh.second goes", "")
	l.file("links/.wh.all go", "")
	l.file("links/z/.wh.all go", "")
	l.file("links/replaced", "another file")
	l.file("links/touched", "touched in a layer above", mode(0o600))
	l.link("links/z/touched", "links/touched")
	l.link("links/a/third", "links/touched")
	l.file("links/late", "whose name comes before", mode(0o4711), xattr("security.capability", netRaw))
	l.link("links/a/late", "links/late")
	l.otherLink("links/z/late", "links/late", mode(0o4700), xattr("user.more", "x")) // and takes the capability away

	l.file("implied/there/below/f", "in folders that this layer leaves out")
	l.file("implied/there/new/f", "below one that is setgid")
	l.file("implied/.wh.gone", "")
	if l.plain {
		l.file("names/caf\xe9", "replaced")
		l.file("names/\xff\xfe/.wh.\xc0", "")
		l.sparse("kinds/sparse", 8<<20, "another", 1<<20)
	}
	l.file("modes/f4755", "no longer setuid", mode(0o755))
	l.dir("modes/d0000", mode(0o000), owner(70_000, 0))
}

func nastyMore(l *nastyLayer) {
	l.dir("change", at(1_650_000_000, 2))
	for _, n := range []string{"opaque", "back", "twice"} {
		l.dir("change/"+n, mode(0o705), owner(70_000, 6))
	}
	l.dir("change/gone", mode(0o711))
	l.file("change/gone/new", "nothing old may come with it")
	l.file("change/removed", "again")
	l.file("change/opaque/.wh.new", "")
	l.dir("change/opaque/sub", mode(0o555))
	l.file("change/opaque/sub/new", "the old one stays hidden")
	l.file("change/back/old", "back")
	l.dir("change/back/sub")
	l.file("change/file to dir", "and a file again")
	l.dir("change/todir", mode(0o1755))
	l.file("change/todir/new", "nothing old may come with it")
	l.dir("change/dir to link")
	l.file("change/dir to link/new", "a directory again")
	l.file("change/hidden by a device", "there again")
	l.file("change/twice/.wh..wh..opq", "")
	l.file("change/twice/old", "in an opaque directory above one with whiteouts")
	l.dir("change/mode alone.d")
	l.file("change/mode alone", "of the base", mode(0o4755))
	l.add(tar.TypeFifo, "change/replaced", "")
	l.link("change/fifo", "change/replaced")
	l.dir("links")
	l.file("links/all go", "again, alone")
}

func nastyTop(l *nastyLayer) {
	l.dir("usr/lib")
	l.symlink("lib", "usr/lib")
	l.file("lib/through", "a link in the same layer")
	l.dir("change/merged/sub", mode(0o555), owner(1, 1))
	l.file("change/.wh.dir to link", "")
	l.file("implied/gone/f", "in a folder that was removed below")
	l.file("change/again/new", "in a folder that was removed and that this layer leaves out")
	l.file("change/.wh.never was either", "")
	l.dir("change/emptied", xattr("user.from", "the top"))
	l.file("links/.wh.one", "")
	l.file("tmp/.wh..wh..opq", "")
}
