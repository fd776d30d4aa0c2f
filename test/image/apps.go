package image

import (
	"context"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// appsRecipe changes whenever the same packages must give other layers.
const appsRecipe = "apps 1"

//go:embed apps
var appFiles embed.FS

// App is a program as people ship it, on Debian and out of Debian's packages, whose start can be watched from outside.
type App struct {
	Name string
	// First is how the first useful output is told from everything before it.
	First First

	packages []string
	// hook is a shell command that mmdebstrap runs when all is installed, with the system's folder as $1.
	hook string
	// layers are those between Debian's and the program's own, lowest first. A file goes to the last layer that names a folder
	// above it; the first one names none and takes the rest.
	layers []appLayer
	// file is what becomes /app/FILE, the program's own layer.
	file   string
	config ocispec.ImageConfig
}

type appLayer struct {
	name    string
	folders []string
}

// First is the first useful output of a container: a line of its standard output that begins with Line, or, with a Port, an
// answer to GET / on 127.0.0.1:Port, in the container's network namespace, whose body has Body in it.
type First struct {
	Line string
	Port int
	Body string
}

// Apps are an interpreter with a module in C, a server in JavaScript, a virtual machine, a database and a web server: of 80 to 200 MB
// compressed, each with the minimal Debian that they share as its lowest layer.
func Apps() []App {
	return []App{{
		Name: "python", First: First{Line: "ready: "},
		packages: []string{"python3", "python3-numpy", "python3-pil", "python3-lxml", "python3-requests", "python3-babel"},
		layers:   []appLayer{{name: "python"}, {"modules", []string{"usr/lib/python3/dist-packages/"}}},
		file:     "python.py", config: ocispec.ImageConfig{Cmd: []string{"/usr/bin/python3", "/app/python.py"}},
	}, {
		Name: "node", First: First{Port: 8080, Body: `"ready":true`},
		packages: []string{"nodejs", "node-express", "node-lodash", "webpack", "node-typescript", "node-undici"},
		layers:   []appLayer{{name: "node"}, {"modules", []string{"usr/share/nodejs/", "usr/lib/nodejs/", "usr/share/javascript/"}}},
		file:     "node.js", config: ocispec.ImageConfig{Cmd: []string{"/usr/bin/node", "/app/node.js"}},
	}, {
		// The program's file is none of ours: a build tool that tells its version, out of several archives of classes.
		Name: "jvm", First: First{Line: "Apache Ant"},
		packages: []string{"openjdk-17-jre-headless", "ant"},
		layers:   []appLayer{{name: "java"}, {"ant", []string{"usr/share/ant/", "usr/share/java/", "usr/share/maven-repo/"}}},
		config: ocispec.ImageConfig{Cmd: []string{
			"/usr/bin/java", "-cp", "/usr/share/java/ant-launcher.jar", "-Dant.home=/usr/share/ant", "org.apache.tools.ant.launch.Launcher", "-version",
		}},
	}, {
		Name: "postgres", First: First{Line: "ready: 1"},
		packages: []string{"postgresql-15"},
		// The cluster that the package makes has segments of 16 MiB, most of them zeros.
		hook: `rm -rf "$1/var/lib/postgresql/15" && mkdir -m 0700 "$1/srv/data" && chroot "$1" chown postgres /srv/data &&` +
			` chroot "$1" setpriv --reuid=postgres --clear-groups /usr/lib/postgresql/15/bin/initdb -D /srv/data -A trust -U postgres -E UTF8 --locale=C.UTF-8 --wal-segsize=1 --no-sync >/dev/null`,
		layers: []appLayer{{name: "libraries"}, {"postgresql", []string{"usr/lib/postgresql/", "usr/share/postgresql/"}}, {"data", []string{"srv/"}}},
		file:   "postgres.sh", config: ocispec.ImageConfig{User: "postgres", Cmd: []string{"/bin/sh", "/app/postgres.sh"}},
	}, {
		Name: "nginx", First: First{Port: 8080, Body: "Debian"},
		packages: []string{"nginx", "debian-handbook"},
		layers:   []appLayer{{name: "nginx"}, {"site", []string{"usr/share/doc/debian-handbook/"}}},
		file:     "nginx.conf", config: ocispec.ImageConfig{Cmd: []string{"/usr/sbin/nginx", "-c", "/app/nginx.conf"}},
	}}
}

// FindApp is the one of this name.
func FindApp(name string) (App, error) {
	var names []string
	for _, a := range Apps() {
		if a.Name == name {
			return a, nil
		}
		names = append(names, a.Name)
	}
	return App{}, fmt.Errorf("no image %q: one of %s", name, strings.Join(names, ", "))
}

// Make makes the image, or finds it in the cache. The packages come through the machine's own apt sources. It takes root and a
// minute the first time. Unlike the other images, these are not the same on every machine: a database has a number of its own,
// and packages make keys when they are installed.
func (a App) Make(ctx context.Context, cache string, format Format) (*Image, error) {
	sources, err := debianSources("/etc/apt", codename)
	if err != nil {
		return nil, err
	}
	list := ""
	for _, s := range sources {
		list += s.String() + "\n"
	}
	base, err := cached(ctx, cache, "base-"+recipe(appsRecipe, codename, runtime.GOARCH, list), func(ctx context.Context, dir string) error {
		return baseTar(ctx, dir, list)
	})
	if err != nil {
		return nil, err
	}
	body, err := a.body()
	if err != nil {
		return nil, err
	}
	id := recipe(filepath.Base(base), fmt.Sprint(a), string(body))
	tars, err := cached(ctx, cache, a.Name+"-"+id+"-layers", func(ctx context.Context, dir string) error {
		return a.tars(ctx, dir, filepath.Join(base, baseName), list)
	})
	if err != nil {
		return nil, err
	}
	dir, err := cached(ctx, cache, a.Name+"-"+id+"-"+format.String(), func(_ context.Context, dir string) error {
		l := &layout{dir: dir}
		if err := l.addLayer(filepath.Join(base, baseName), format, "debian"); err != nil {
			return err
		}
		for _, name := range a.layerNames() {
			if err := l.addLayer(filepath.Join(tars, name+".tar"), format, name); err != nil {
				return err
			}
		}
		config := a.config
		config.Env = environment
		return l.finish(config)
	})
	if err != nil {
		return nil, err
	}
	return Load(dir)
}

// body is the program's own file, nil when it has none.
func (a App) body() ([]byte, error) {
	if a.file == "" {
		return nil, nil
	}
	return appFiles.ReadFile("apps/" + a.file)
}

func (a App) layerNames() (names []string) {
	for _, l := range a.layers {
		names = append(names, l.name)
	}
	if a.file != "" {
		names = append(names, "app")
	}
	return names
}

// baseName is the tar of the minimal Debian in its folder of the cache.
const baseName = "debian.tar"

func baseTar(ctx context.Context, dir, list string) error {
	listPath := filepath.Join(dir, "debian.list")
	if err := os.WriteFile(listPath, []byte(list), 0o644); err != nil {
		return err
	}
	tree, err := bootstrap(ctx, dir, "base", listPath, system{})
	if err != nil {
		return err
	}
	return tree.writeFile(filepath.Join(dir, baseName))
}

// tars makes the tars of the layers above Debian's: what a system with the packages has and the base has not.
func (a App) tars(ctx context.Context, dir, base, list string) error {
	listPath := filepath.Join(dir, "debian.list")
	if err := os.WriteFile(listPath, []byte(list), 0o644); err != nil {
		return err
	}
	full, err := bootstrap(ctx, dir, "full", listPath, system{packages: a.packages, hook: a.hook})
	if err != nil {
		return err
	}
	f, err := os.Open(base)
	if err != nil {
		return err
	}
	defer f.Close()
	lower, err := ReadTree(f)
	if err != nil {
		return err
	}
	layers := make([]Tree, len(a.layers))
	for i := range layers {
		layers[i] = Tree{}
	}
	for name, e := range lower.Above(full) {
		layers[a.layerOf(name)][name] = e
	}
	for i, tree := range layers {
		tree.takeParents(full)
		if err := tree.writeFile(filepath.Join(dir, a.layers[i].name+".tar")); err != nil {
			return err
		}
	}
	body, err := a.body()
	if err != nil || body == nil {
		return err
	}
	app := Tree{}
	app.AddFile("app/"+a.file, 0o755, body)
	return app.writeFile(filepath.Join(dir, "app.tar"))
}

func (a App) layerOf(name string) int {
	for i := len(a.layers) - 1; i > 0; i-- {
		for _, folder := range a.layers[i].folders {
			if strings.HasPrefix(name+"/", folder) {
				return i
			}
		}
	}
	return 0
}
