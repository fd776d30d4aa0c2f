// Command demo shows docker quay at its main job: one image, one registry and three cold nodes, each a network namespace
// with a 200 Mbit/s link, a containerd and a node daemon of its own. All three pull at once and run a program from the image
// before it is there. A table says how long that took and where the bytes came from; then everything is taken down.
//
// It needs root, for network namespaces and containers, and the binaries in build/bin: `make demo` sees to both.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// limit bounds the whole demo; making the image from Debian's packages takes the most of it.
const limit = 30 * time.Minute

func main() {
	var o options
	flag.StringVar(&o.image, "image", "", "an image of a real registry instead of the one made here")
	flag.StringVar(&o.run, "run", "", "with -image: the command whose first output counts (default: the image's own)")
	flag.IntVar(&o.nodes, "nodes", 3, "how many nodes pull at once, 1 to 16")
	flag.IntVar(&o.mbit, "mbit", 200, "speed of every link in Mbit/s, in each direction")
	flag.StringVar(&o.formats, "formats", "gzip,estargz", "the layers of the image made here, one scene each: gzip, estargz, zstdchunked")
	flag.BoolVar(&o.verbose, "v", false, "have the daemons log everything, and print the logs' ends")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := demo(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

type options struct {
	image, run, formats string
	nodes, mbit         int
	verbose             bool
}

func demo(ctx context.Context, o options) (err error) {
	if os.Getuid() != 0 {
		return errors.New("needs root, for network namespaces and containers")
	}
	if o.nodes < 1 || o.nodes > 16 {
		return fmt.Errorf("-nodes %d is not between 1 and 16", o.nodes)
	}
	r, err := rig.New()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil || o.verbose {
			r.DumpLogs(os.Stderr)
		}
		err = errors.Join(err, r.Close())
	}()
	network, err := r.NewNetwork(rig.NetworkOptions{Nodes: o.nodes, Rate: rig.Rate(o.mbit) * rig.Mbit})
	if err != nil {
		return err
	}
	registry, err := r.StartRegistry(ctx, rig.RegistryOptions{Node: network.Registry(), TLS: true})
	if err != nil {
		return err
	}
	scenes, err := o.scenes(ctx, r, registry)
	if err != nil {
		return err
	}
	fmt.Printf("%d nodes and a registry, each on a link of %d Mbit/s\n\n", o.nodes, o.mbit)
	wrong := false
	for _, s := range scenes {
		// Every image finds cold nodes.
		c, err := newCluster(ctx, r, network, registry, o.verbose)
		if err != nil {
			return err
		}
		results, err := s.play(ctx, c, registry)
		if err != nil {
			return err
		}
		wrong = !s.print(os.Stdout, results, registry.Stats().Blobs) || wrong
		if err := c.stop(); err != nil {
			return err
		}
	}
	if wrong {
		return errors.New("a container saw other files than the image has")
	}
	return nil
}

// scene is one image pulled by all nodes at once.
type scene struct {
	title   string
	ref     string
	size    int64    // of the image, compressed, in bytes
	program []string // its first output is waited for; nil is the image's command
	treeSum string   // what /app/treesum.py must print; "" when the image has no such program
}

var titles = map[image.Format]string{
	image.Gzip:        "Debian with Python and NumPy, plain gzip layers",
	image.EStargz:     "the same with eStargz layers: containers start before the image is there",
	image.ZstdChunked: "the same with zstd:chunked layers: containers start before the image is there",
}

// scenes puts the images into the registry.
func (o options) scenes(ctx context.Context, r *rig.Rig, registry *rig.Registry) ([]scene, error) {
	user, password := registry.Credentials()
	to := image.Target{URL: registry.URL(), Client: registry.Client(), Username: user, Password: password}
	if o.image != "" {
		dir, err := r.Dir("image")
		if err != nil {
			return nil, err
		}
		fmt.Printf("copying %s into the demo's registry\n", o.image)
		img, err := download(ctx, o.image, dir)
		if err != nil {
			return nil, err
		}
		s := scene{title: o.image, ref: registry.Ref("demo:image"), size: img.Size(), program: strings.Fields(o.run)}
		return []scene{s}, img.Push(ctx, to, "demo", "image")
	}
	var scenes []scene
	for _, name := range strings.Split(o.formats, ",") {
		format, err := image.ParseFormat(name)
		if err != nil {
			return nil, err
		}
		fmt.Printf("making the image, %s (a few minutes the first time)\n", format)
		img, err := image.Demo(ctx, rig.ImageDir(), format)
		if err != nil {
			return nil, err
		}
		sum, err := img.TreeSum()
		if err != nil {
			return nil, err
		}
		if err := img.Push(ctx, to, "demo", format.String()); err != nil {
			return nil, err
		}
		scenes = append(scenes, scene{
			title: titles[format], ref: registry.Ref("demo:" + format.String()), size: img.Size(),
			program: []string{"/app/hello.py"}, treeSum: sum,
		})
	}
	return scenes, nil
}

// result is what one node did. Times are seconds since the pulls began, sizes bytes.
type result struct {
	output               string // the first line of the program
	firstOutput          time.Duration
	atFirstOutput        int64 // bytes of the image that were here then
	complete             time.Duration
	registry, peers, was int64 // where the bytes came from; was: here before
	treeOK               bool
}

// play pulls and runs on all nodes at once.
func (s scene) play(ctx context.Context, c *cluster, registry *rig.Registry) ([]result, error) {
	registry.ResetStats()
	results := make([]result, len(c.nodes))
	start := time.Now()
	g, ctx := errgroup.WithContext(ctx)
	for i, n := range c.nodes {
		g.Go(func() error {
			if err := n.play(ctx, s, start, &results[i]); err != nil {
				return fmt.Errorf("node %d: %w", i+1, err)
			}
			return nil
		})
	}
	return results, g.Wait()
}

// print writes a scene's table and reports whether all trees were right.
func (s scene) print(w io.Writer, results []result, served int64) bool {
	fmt.Fprintf(w, "\n%s: %s\n", s.title, mb(s.size))
	if len(results) > 0 && results[0].output != "" {
		fmt.Fprintf(w, "  %q\n", results[0].output)
	}
	fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "node\tfirst output s\tfetched by then\tcomplete s\tfrom registry\tfrom peers\tfrom cache\tfiles right\t")
	right := true
	var total int64
	for i, r := range results {
		tree := "-"
		if s.treeSum != "" {
			tree = "no"
			if r.treeOK {
				tree = "yes"
			}
			right = right && r.treeOK
		}
		total += r.registry
		fmt.Fprintf(t, "%d\t%.1f\t%.0f %%\t%.1f\t%s\t%s\t%s\t%s\t\n", i+1, r.firstOutput.Seconds(),
			100*float64(r.atFirstOutput)/float64(s.size), r.complete.Seconds(), mb(r.registry), mb(r.peers), mb(r.was), tree)
	}
	_ = t.Flush()
	fmt.Fprintf(w, "\nThe registry served %s of layers to all %d nodes: %.2f times the image (the nodes count %s).\n",
		mb(served), len(results), float64(served)/float64(s.size), mb(total))
	return right
}

func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
