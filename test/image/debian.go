package image

import (
	"context"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// debianRecipe changes whenever the same packages must give other layers.
const debianRecipe = "debian 1"

const codename = "bookworm"

// pythonPackages make the image heavy enough (over 100 MB compressed) and are what people really ship: an interpreter and
// modules, some in C with libraries of their own, some of many small files. python3-scipy would double it.
var pythonPackages = []string{"python3", "python3-numpy", "python3-pil", "python3-lxml", "python3-babel", "python3-sympy"}

//go:embed hello.py
var helloPy []byte

//go:embed treesum.py
var treesumPy []byte

// debianLayers are the layers' names, lowest first; each has its tar in the recipe's folder.
var debianLayers = []string{"debian", "python", "modules", "app"}

// Demo is Debian with Python in four layers, over 100 MB compressed: the minimal system, the interpreter with what it
// needs, numeric modules, and two small programs: /app/hello.py, the command, and /app/treesum.py, which prints what TreeSum
// computes. The packages come through the machine's own apt sources. It takes root, and a minute or two the first time.
func Demo(ctx context.Context, cache string, format Format) (*Image, error) {
	sources, err := debianSources("/etc/apt", codename)
	if err != nil {
		return nil, err
	}
	list := ""
	for _, s := range sources {
		list += s.String() + "\n"
	}
	id := recipe(debianRecipe, codename, runtime.GOARCH, list, strings.Join(pythonPackages, " "), string(helloPy), string(treesumPy))
	tars, err := cached(ctx, cache, "debian-"+id+"-layers", func(ctx context.Context, dir string) error {
		return debianTars(ctx, dir, list)
	})
	if err != nil {
		return nil, err
	}
	dir, err := cached(ctx, cache, "debian-"+id+"-"+format.String(), func(_ context.Context, dir string) error {
		l := &layout{dir: dir}
		for _, name := range debianLayers {
			if err := l.addLayer(filepath.Join(tars, name+".tar"), format, name); err != nil {
				return err
			}
		}
		return l.finish(ocispec.ImageConfig{Env: environment, Cmd: []string{"/usr/bin/python3", "/app/hello.py"}})
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

// modulesDir is where Debian puts Python modules of packages.
const modulesDir = "usr/lib/python3/dist-packages/"

// debianTars makes the layers' tars in dir: two systems are bootstrapped side by side, without Python and with it, and the layers
// between are their difference. So nothing of the order or time of an installation gets into them.
func debianTars(ctx context.Context, dir, list string) error {
	listPath := filepath.Join(dir, "debian.list")
	if err := os.WriteFile(listPath, []byte(list), 0o644); err != nil {
		return err
	}
	var base, full Tree
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() (err error) { base, err = bootstrap(groupCtx, dir, "base", listPath, system{}); return err })
	group.Go(func() (err error) {
		full, err = bootstrap(groupCtx, dir, "full", listPath, system{packages: pythonPackages})
		return err
	})
	if err := group.Wait(); err != nil {
		return err
	}
	python, modules := Tree{}, Tree{}
	for name, e := range base.Above(full) {
		if strings.HasPrefix(name, modulesDir) {
			modules[name] = e
		} else {
			python[name] = e
		}
	}
	modules.takeParents(full)
	python.takeParents(full)
	app := Tree{}
	app.AddFile("app/hello.py", 0o755, helloPy)
	app.AddFile("app/treesum.py", 0o755, treesumPy)
	for i, tree := range []Tree{base, python, modules, app} {
		if err := tree.writeFile(filepath.Join(dir, debianLayers[i]+".tar")); err != nil {
			return err
		}
	}
	return os.Remove(listPath)
}

// system is what is installed above the minimal Debian.
type system struct {
	packages []string
	hook     string // a shell command for when all is installed, with the system's folder as $1; "": none
}

// bootstrap installs a minimal Debian with these packages and returns its files.
func bootstrap(ctx context.Context, dir, name, list string, s system) (Tree, error) {
	path := filepath.Join(dir, name+"-system.tar")
	// A system that is packed up at once need not survive a power cut: no fsync for each file.
	args := []string{"--quiet", "--variant=minbase", "--mode=root", "--format=tar", "--dpkgopt=force-unsafe-io"}
	options, err := aptOptions(ctx)
	if err != nil {
		return nil, err
	}
	args = append(args, options...)
	if len(s.packages) > 0 {
		args = append(args, "--include="+strings.Join(s.packages, ","))
	}
	if s.hook != "" {
		args = append(args, "--customize-hook="+s.hook)
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(args, codename, path, list)...)
	// mmdebstrap and the packages' scripts make reproducible files when they know the time to use.
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(Epoch.Unix(), 10), "LC_ALL=C.UTF-8")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mmdebstrap: %w: %s", err, out)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	tree, err := ReadTree(f)
	if err != nil {
		return nil, err
	}
	for name := range tree {
		// Devices are the runtime's; name and resolver are those of the machine the image was made on.
		if strings.HasPrefix(name, "dev/") || name == "etc/hostname" || name == "etc/resolv.conf" {
			delete(tree, name)
		}
	}
	return tree, os.Remove(path)
}
