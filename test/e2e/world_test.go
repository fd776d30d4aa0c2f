package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	nodedaemon "github.com/docker-quay/docker-quay/test/daemon"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

const (
	// testTimeout bounds each test. The longest takes 40 s on two idle cores; a busy machine was seen to need three times as long.
	testTimeout = 3 * time.Minute
	// pollEvery is how often something without a signal is looked at.
	pollEvery = 20 * time.Millisecond
	// linkRate is the speed of each node's link: a usual one between an office and a registry. It leaves time to kill
	// something in the middle of 64 MiB.
	linkRate = 200 * rig.Mbit

	mib = 1 << 20
)

// private is a registry that lets nobody in without a login, behind a certificate that only those trust who were told.
var private = rig.RegistryOptions{TLS: true, Username: "alice", Password: "open sesame"}

// world is a network of nodes around a registry, and a cluster secret.
type world struct {
	*testing.T
	ctx      context.Context
	rig      *rig.Rig
	network  *rig.Network
	registry *rig.Registry
	secret   string // the file with the cluster's secret
	begun    time.Time
	people   *atomic.Int64 // how many users and processes there were, for their names
}

// newWorld makes a world that lives as long as the test, with one registry.
func newWorld(t *testing.T, nodes int, o rig.RegistryOptions) *world {
	t.Helper()
	return newWorldFor(t, nodes, o, testTimeout)
}

// newWorldFor is newWorld for a test that takes longer than others.
func newWorldFor(t *testing.T, nodes int, o rig.RegistryOptions, timeout time.Duration) *world {
	t.Helper()
	needsNodes(t)
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	t.Cleanup(cancel)
	w := &world{T: t, ctx: ctx, rig: rig.ForTest(t), people: new(atomic.Int64), begun: time.Now()}
	var err error
	w.network, err = w.rig.NewNetwork(rig.NetworkOptions{Nodes: nodes, Rate: linkRate})
	if errors.Is(err, rig.ErrNoNamespaces) {
		t.Skip(err)
	}
	w.must(err)
	o.Node = w.network.Registry()
	w.registry, err = w.rig.StartRegistry(ctx, o)
	w.must(err)
	w.secret = w.newSecret("cluster")
	return w
}

// needsNodes skips a test where no nodes can be started.
func needsNodes(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("starts whole nodes")
	}
	rig.RequireRoot(t)
}

// sub is the same world in a subtest.
func (w *world) sub(t *testing.T) *world {
	child := *w
	child.T = t
	return &child
}

// newSecret makes a cluster secret file.
func (w *world) newSecret(name string) string {
	w.Helper()
	path := filepath.Join(w.dir("secrets"), name)
	w.must(trust.NewSecret().Save(path))
	return path
}

// must ends the test on an error of the world, which is none of docker quay.
func (w *world) must(err error) {
	w.Helper()
	switch {
	case errors.Is(err, rig.ErrNoTool):
		w.Skip(err)
	case err != nil:
		w.Fatal(err)
	}
}

func (w *world) dir(name string) string {
	w.Helper()
	dir, err := w.rig.Dir(name)
	w.must(err)
	return dir
}

// push puts an image into the registry and returns its reference.
func (w *world) push(img *image.Image, repository, tag string) string {
	w.Helper()
	user, password := w.registry.Credentials()
	to := image.Target{URL: w.registry.URL(), Client: w.registry.Client(), Username: user, Password: password}
	w.must(img.Push(w.ctx, to, repository, tag))
	w.registry.ResetStats()
	return w.registry.Ref(repository + ":" + tag)
}

// small is the image whose command prints greeting.
func (w *world) small() *image.Image {
	w.Helper()
	img, err := image.Busybox(w.ctx, rig.ImageDir(), image.Gzip)
	w.must(err)
	return img
}

const greeting = "hello from busybox\n"

// random is an image of so many layers of the same size, in bytes, that nothing can compress. No container can be started
// from it.
func (w *world) random(size int64, layers int) *image.Image {
	w.Helper()
	img, err := image.Random(w.ctx, rig.ImageDir(), size, layers)
	w.must(err)
	return img
}

// denyBlobs has the registry refuse its blobs, but not its manifests, to a node.
func (w *world) denyBlobs(n *rig.Node) {
	w.registry.SetFaults(rig.Faults{Deny: func(r *http.Request) bool {
		host, _, err := net.SplitHostPort(r.RemoteAddr)
		return err != nil || host == n.Addr.String()
	}})
}

// served is how many bytes of blobs the registry has sent since the last reset.
func (w *world) served() int64 { return w.registry.Stats().Blobs }

// until waits for something that has no signal.
func (w *world) until(what string, done func() bool) {
	w.Helper()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-w.ctx.Done():
			w.Fatalf("%s: %v", what, context.Cause(w.ctx))
		}
	}
}

// peer is how others reach what listens for peers on a node; everybody here uses one port.
func peer(n *rig.Node) string { return nodedaemon.Address(n) }

const peerPort = nodedaemon.PeerPort

// blobData is where a store keeps a blob.
func blobData(store string, d digest.Digest) string {
	return filepath.Join(store, "blobs", d.Algorithm().String(), d.Encoded(), "data")
}

// sameBlobs checks that a store has every blob of an image, complete, and that its bytes have the digest. The store's own
// word for it is not enough.
func (w *world) sameBlobs(dir string, img *image.Image) {
	w.Helper()
	st, err := store.Open(store.Options{Dir: dir})
	w.must(err)
	defer st.Close()
	for _, desc := range img.Layers {
		if info, err := st.Stat(desc.Digest); err != nil || !info.Complete {
			w.Errorf("the store has %+v of layer %s, %v", info, desc.Digest, err)
			continue
		}
		sum, err := sha256File(blobData(dir, desc.Digest))
		if err != nil || sum != desc.Digest.Encoded() {
			w.Errorf("layer %s on disk has the digest %s, %v", desc.Digest, sum, err)
		}
	}
}

func sha256File(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// blobBytes are the bytes of blobs that a store holds.
func (w *world) blobBytes(dir string) (n int64) {
	w.Helper()
	st, err := store.Open(store.Options{Dir: dir})
	w.must(err)
	defer st.Close()
	all, err := st.List()
	w.must(err)
	for _, b := range all {
		n += b.Have
	}
	return n
}

// contents are the bytes of blobs and manifests, and the names of images, that a store holds.
func (w *world) contents(dir string) (bytes int64, names int) {
	w.Helper()
	bytes = w.blobBytes(dir)
	st, err := store.Open(store.Options{Dir: dir})
	w.must(err)
	defer st.Close()
	err = filepath.WalkDir(filepath.Join(dir, "content"), func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		bytes += info.Size()
		return err
	})
	w.must(err)
	refs, err := st.Refs()
	w.must(err)
	return bytes, len(refs)
}

// untouched checks that nothing of any image is in a store.
func (w *world) untouched(dir string) {
	w.Helper()
	if bytes, names := w.contents(dir); bytes != 0 || names != 0 {
		w.Errorf("the store at %s has %d bytes and %d names of an image that must not be here", dir, bytes, names)
	}
}
