package image

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// busyboxRecipe changes whenever the same busybox must give another image.
const busyboxRecipe = "busybox 1"

// environment is that of most base images.
var environment = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// Busybox is an image of three layers around the machine's static busybox, under 2 MB: the programs, the files that a
// program expects, and /app/hello, its command, which prints "hello from busybox".
func Busybox(ctx context.Context, cache string, format Format) (*Image, error) {
	binary, applets, err := busybox(ctx)
	if err != nil {
		return nil, err
	}
	name := "busybox-" + recipe(busyboxRecipe, digest.FromBytes(binary).String()) + "-" + format.String()
	dir, err := cached(ctx, cache, name, func(_ context.Context, dir string) error {
		programs, base := busyboxTrees(binary, applets)
		app := Tree{}
		app.AddFile("app/hello", 0o755, []byte("#!/bin/sh\necho hello from busybox\n"))
		l := &layout{dir: dir}
		for _, layer := range []struct {
			tree    Tree
			comment string
		}{{programs, "busybox"}, {base, "base files"}, {app, "/app/hello"}} {
			if err := l.addTree(layer.tree, format, layer.comment); err != nil {
				return err
			}
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/app/hello"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

// busybox is the machine's, and the names of its programs, one a line.
func busybox(ctx context.Context) (binary, applets []byte, err error) {
	if binary, err = os.ReadFile("/bin/busybox"); err != nil {
		return nil, nil, fmt.Errorf("the small image needs Debian's busybox-static: %w", err)
	}
	if applets, err = exec.CommandContext(ctx, "/bin/busybox", "--list").Output(); err != nil {
		return nil, nil, fmt.Errorf("list the programs of busybox: %w", err)
	}
	return binary, applets, nil
}

// busyboxTrees are its programs, and the files that a program expects.
func busyboxTrees(binary, applets []byte) (programs, base Tree) {
	programs, base = Tree{}, Tree{}
	programs.AddFile("bin/busybox", 0o755, binary)
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			programs.AddLink("bin/"+applet, "busybox")
		}
	}
	base.AddFile("etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	base.AddFile("etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	base.AddDir("root", 0o700)
	base.AddDir("tmp", 0o1777)
	for _, d := range []string{"dev", "proc", "sys", "run", "usr/bin"} {
		base.AddDir(d, 0o755)
	}
	return programs, base
}

// addTree adds a tree as a layer.
func (l *layout) addTree(t Tree, format Format, comment string) error {
	path := filepath.Join(l.dir, "layer.tar")
	if err := t.writeFile(path); err != nil {
		return err
	}
	if err := l.addLayer(path, format, comment); err != nil {
		return err
	}
	return os.Remove(path)
}

func (t Tree) writeFile(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := t.WriteTo(f); err != nil {
		return err
	}
	return f.Close()
}
