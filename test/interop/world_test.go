package interop

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/docker-quay/docker-quay/fetcher/open"
	"github.com/docker-quay/docker-quay/fetcher/published"
	"github.com/docker-quay/docker-quay/fetcher/store"
	"github.com/docker-quay/docker-quay/fetcher/tracker"
	"github.com/docker-quay/docker-quay/fetcher/trust"
	"github.com/docker-quay/docker-quay/test/image"
	"github.com/docker-quay/docker-quay/test/rig"
)

// insideVariable is set for the program that runs inside the namespace.
const insideVariable = "QUAY_INTEROP_INSIDE"

const (
	// layerSize: 64 pieces of the store, and on loopback a moment.
	layerSize = 16 << 20
	// patience bounds each transfer. The slowest client takes 4 s on an idle machine to notice that there is something to do.
	patience = 60 * time.Second
)

func TestMain(m *testing.M) {
	if os.Getenv(insideVariable) != "" {
		if err := addresses(); err != nil {
			fmt.Fprintln(os.Stderr, "interop:", err)
			os.Exit(1)
		}
		// Most of a test is waiting for somebody's timer: all at once, whatever the number of processors.
		flag.Parse()
		if err := flag.Set("test.parallel", "32"); err != nil {
			fmt.Fprintln(os.Stderr, "interop:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		fmt.Println("interop: skipped: needs root, for a network namespace")
		return
	}
	cmd := exec.Command("unshare", append([]string{"--net", "--", os.Args[0]}, os.Args[1:]...)...)
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// It must not outlive us, and has to clean up when we are told to end.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		fmt.Println("interop: skipped: a network namespace cannot be made here:", err)
	}
}

// The addresses: that of servers, and those of clients and our nodes, one each, so that none is taken for another.
var (
	serverAddr = netip.MustParseAddr("10.99.0.1")
	last       atomic.Uint32 // of those handed out
)

const nodeAddresses = 60

func addresses() error {
	lines := [][]string{{"link", "set", "lo", "up"}}
	for n := range nodeAddresses + 1 {
		lines = append(lines, []string{"addr", "add", fmt.Sprintf("10.99.0.%d/32", n+1), "dev", "lo"})
	}
	for _, args := range lines {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %v: %w: %s", args, err, out)
		}
	}
	return nil
}

// newAddr is one that no other client and no other node of ours has.
func newAddr(t *testing.T) netip.Addr {
	t.Helper()
	n := last.Add(1)
	if n > nodeAddresses {
		t.Fatal("no address is left: raise nodeAddresses")
	}
	return netip.AddrFrom4([4]byte{10, 99, 0, byte(n + 1)})
}

// world is what all tests here share.
type world struct {
	rig      *rig.Rig
	registry *rig.Registry
	layer    ocispec.Descriptor
	path     string // of the layer's file
	plain    *published.Torrent
	webSeed  *published.Torrent // of the registry alone
	blob     *store.Blob        // complete, for our seeders
}

func newWorld(t *testing.T) *world {
	t.Helper()
	for _, name := range []string{"aria2c", "transmission-daemon", "qbittorrent-nox", "opentracker"} {
		if _, err := rig.Bin(name); errors.Is(err, rig.ErrNoTool) {
			t.Skip(err)
		}
	}
	ctx := t.Context()
	r := rig.ForTest(t)
	registry, err := r.StartRegistry(ctx, rig.RegistryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	img, err := image.Random(ctx, rig.ImageDir(), layerSize, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Push(ctx, image.Target{URL: registry.URL(), Client: registry.Client()}, "open/layer", "1"); err != nil {
		t.Fatal(err)
	}
	w := &world{rig: r, registry: registry, layer: img.Layers[0], path: img.Path(img.Layers[0].Digest)}
	w.plain, err = published.Make(ctx, published.MakeOptions{
		Layer: w.layer,
		Open:  func(context.Context) (io.ReadCloser, error) { return os.Open(w.path) },
		// Also that no client goes and looks elsewhere.
		Private: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	w.webSeed = w.plain.With(nil, []string{registry.URL() + "/v2/open/layer/blobs/" + w.layer.Digest.String()})
	w.blob = w.newBlob(t)
	content, err := os.ReadFile(w.path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range w.blob.Pieces() {
		off, n := w.blob.PieceRange(i)
		if _, err := w.blob.WriteAt(content[off:off+n], off); err != nil {
			t.Fatal(err)
		}
		if err := w.blob.MarkPiece(i, store.Origin); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.blob.Verify(ctx); err != nil {
		t.Fatal(err)
	}
	return w
}

// newBlob is the layer in a store of its own, of which nothing is there.
func (w *world) newBlob(t *testing.T) *store.Blob {
	t.Helper()
	s, err := store.Open(store.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	b, err := s.Blob(t.Context(), w.layer.Digest, w.layer.Size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// blobStorage is a blob of the store as the open swarm wants it.
type blobStorage struct{ *store.Blob }

var _ open.Storage = blobStorage{}

func (b blobStorage) MarkPiece(i int, _ string) error { return b.Blob.MarkPiece(i, store.Peer) }

// swarm is a node of ours in the open swarm. Each has its own address: transmission takes all that comes from one for one peer.
func (w *world) swarm(t *testing.T) *open.Swarm {
	t.Helper()
	s, err := open.New(open.Options{Listen: newAddr(t).String(), Ports: trust.PortRange{}, Seed: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// ourTracker serves docker quay's tracker, and returns its announce URL.
func (w *world) ourTracker(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(serverAddr.String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	const token = "a-token-of-the-test"
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- tracker.New(tracker.Options{Token: token}).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String() + "/" + token + "/announce"
}

// opentracker runs opentracker, and returns its announce URL, HTTP or UDP.
func (w *world) opentracker(t *testing.T, scheme string) string {
	t.Helper()
	port := strconv.Itoa(freePort(t, serverAddr))
	dir, err := w.rig.Dir("opentracker-" + port)
	if err != nil {
		t.Fatal(err)
	}
	// It gives up root and changes into the folder first: there it reads the list of torrents that it serves.
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(dir, "whitelist")
	if err := os.WriteFile(list, []byte(w.plain.InfoHash.HexString()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = w.rig.Start(t.Context(), rig.Command{
		Name: filepath.Base(dir), Path: "opentracker", Dir: dir,
		Args: []string{"-i", serverAddr.String(), "-p", port, "-P", port, "-d", dir, "-w", "whitelist"},
		Ready: func(ctx context.Context) error {
			c, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(serverAddr.String(), port))
			if err == nil {
				c.Close()
			}
			return err
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return scheme + "://" + net.JoinHostPort(serverAddr.String(), port) + "/announce"
}

// freePort is one that nobody listens on just now, for TCP and UDP.
func freePort(t *testing.T, addr netip.Addr) int {
	t.Helper()
	for range 20 {
		l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
		if err != nil {
			t.Fatal(err)
		}
		port := l.Addr().(*net.TCPAddr).Port
		p, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, uint16(port))))
		l.Close()
		if err == nil {
			p.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// within waits for a condition.
func within(t *testing.T, what string, ok func() (bool, string)) {
	t.Helper()
	end := time.Now().Add(patience)
	for {
		done, seen := ok()
		if done {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %v, not yet: %s (%s)", patience, what, seen)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
